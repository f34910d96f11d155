"""Every runtime computes what PyTorch computes, and says what it cannot do."""

import dataclasses

import pytest
import torch

from repvgg.errors import InputError
from repvgg.model import create_model
from repvgg.protocol import Protocol
from repvgg.reparam import reparameterize
from repvgg.runtimes import installed_runtimes, prepare, torch_device

CPU = Protocol(batch=3, device="cpu")


@pytest.fixture(scope="module")
def case(randomized):
    torch.manual_seed(0)
    network = reparameterize(randomized(create_model("repvgg_digits", num_classes=7, in_chans=3)))
    images = torch.randn(3, 3, 24, 24)
    with torch.inference_mode():
        return network, images, network(images)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_runtime_gives_the_logits_of_pytorch(case, runtime, threads, relative_error):
    if runtime not in installed_runtimes():
        pytest.skip(f"{runtime} is not installed")
    network, images, expected = case
    found = prepare(network, images, dataclasses.replace(CPU, runtime=runtime, threads=threads))()
    assert found.shape == expected.shape
    assert relative_error(expected, found) <= 1e-5


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.1), ("fp16", 0.02), ("tf32", 1e-6)])
def test_half_precision_is_near(case, precision, bound, relative_error):
    network, images, expected = case
    runner = prepare(network, images, dataclasses.replace(CPU, precision=precision))
    assert relative_error(expected, runner().float()) <= bound


@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_the_layout_changes_nothing_and_the_network_stays_as_it_is(case, layout, relative_error):
    network, images, expected = case
    before = network.stages[0][0].conv.weight.stride()
    runner = prepare(network, images, dataclasses.replace(CPU, layout=layout))
    assert relative_error(expected, runner()) <= 1e-5
    assert network.stages[0][0].conv.weight.stride() == before


@pytest.mark.slow
def test_compiled_networks_give_the_same(case, relative_error):
    network, images, expected = case
    runner = prepare(network, images, dataclasses.replace(CPU, runtime="compile"))
    assert relative_error(expected, runner()) <= 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch: 1 or more needed, found 0"),
        ({"rounds": 0}, "rounds: 1 or more needed, found 0"),
        (
            {"runtime": "openvino", "precision": "bf16"},
            "in fp32 alone, found bf16",
        ),
        ({"runtime": "openvino", "device": "cuda"}, "on CPUs alone, found cuda"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Protocol(**fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named():
    with pytest.raises(InputError, match="a CUDA device is needed, found none"):
        torch_device(Protocol(device="cuda"))


def test_quick_leaves_what_was_chosen():
    assert Protocol().quick() == Protocol(batch=8, warmup=1, rounds=5)
    assert Protocol(batch=32).quick() == Protocol(batch=32, warmup=1, rounds=5)
