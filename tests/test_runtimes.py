"""Every runtime computes what PyTorch computes, and says what it cannot do."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from PIL import Image

from repvgg.baselines import create_named
from repvgg.data.transforms import evaluation_transform, normalize
from repvgg.errors import InputError
from repvgg.model import create_model
from repvgg.preprocessing import Preprocessing
from repvgg.protocol import Protocol
from repvgg.reparam import reparameterize
from repvgg.reproduce.bench import bench, draw
from repvgg.runtimes import installed_runtimes, prepare, torch_device

CPU = Protocol(batch=3, device="cpu")


# With what each of them computes in fp32; MNN's Winograd is the one that loses most.
BOUNDS = {"torch": 1e-6, "onnxruntime": 1e-6, "openvino": 1e-5, "ncnn": 1e-5, "mnn": 3e-5}


@pytest.fixture(scope="module")
def photographs(imagenet_sample):
    """Three of them, (3, 3, 64, 64)."""
    preprocessing = Preprocessing(size=64)
    transform = evaluation_transform(preprocessing)
    files = sorted(imagenet_sample.rglob("*.JPEG"))[::400]
    pixels = [transform(Image.open(file).convert("RGB")) for file in files]
    return normalize(torch.stack(pixels), preprocessing).contiguous()


@pytest.fixture(scope="module")
def case(randomized, photographs):
    torch.manual_seed(0)
    network = reparameterize(randomized(create_model("repvgg_digits", num_classes=7, in_chans=3)))
    with torch.inference_mode():
        return network, photographs, network(photographs)


@pytest.mark.parametrize("runtime", BOUNDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_runtime_gives_the_logits_of_pytorch(case, runtime, threads, relative_error):
    if runtime not in installed_runtimes():
        pytest.skip(f"{runtime} is not installed")
    network, images, expected = case
    run = prepare(network, images, dataclasses.replace(CPU, runtime=runtime, threads=threads))
    for _ in range(2):
        found = run()
        assert found.shape == expected.shape
        assert relative_error(expected, found) <= BOUNDS[runtime]


ONE_THREAD = """
import sys, time, torch
from repvgg import create_model, reparameterize
from repvgg.protocol import Protocol
from repvgg.runtimes import prepare

torch.manual_seed(0)
network = reparameterize(create_model("repvgg_a0").eval())
protocol = Protocol(runtime=sys.argv[1], batch=4, threads=1, device="cpu")
run = prepare(network, torch.randn(4, 3, 224, 224), protocol)
run()
wall, processor = time.perf_counter(), time.process_time()
for _ in range(5):
    run()
print((time.process_time() - processor) / (time.perf_counter() - wall))
"""


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [*BOUNDS, "native"])
def test_one_thread_is_one(runtime):
    """In a process of its own, whose processor time cannot pass the time on the wall then."""
    if runtime not in installed_runtimes():
        pytest.skip(f"{runtime} is not installed")
    command = [sys.executable, "-c", ONE_THREAD, runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 1.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet-50", "EfficientNet-B0", "RegNetX-3.2GF", "RepVGG-A0"])
@pytest.mark.parametrize("runtime", [name for name in BOUNDS if name != "torch"])
def test_the_networks_of_the_paper_run_everywhere(
    name, runtime, photographs, randomized, relative_error
):
    network = reparameterize(randomized(create_named(name)))
    with torch.inference_mode():
        expected = network(photographs)
    found = prepare(network, photographs, dataclasses.replace(CPU, runtime=runtime))()
    assert relative_error(expected, found) <= 1e-4


def test_images_are_held_for_as_long_as_a_network_runs(case, relative_error):
    network, images, _ = case
    many = images.repeat(40, 1, 1, 1) * torch.linspace(0.1, 2, 120)[:, None, None, None]
    with torch.inference_mode():
        expected = network(many)
    for runtime in ("ncnn", "mnn"):
        if runtime not in installed_runtimes():
            pytest.skip(f"{runtime} is not installed")
        # A copy that nobody else holds.
        run = prepare(network, many.clone(), dataclasses.replace(CPU, runtime=runtime, batch=120))
        others = [torch.full_like(many, float("nan")) for _ in range(3)]
        assert relative_error(expected, run()) <= 3e-5
        assert len(others) == 3


def test_what_a_converter_cannot_read_is_named(case, tmp_path):
    network, images, _ = case
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    for runtime in ("ncnn", "mnn"):
        if runtime not in installed_runtimes():
            pytest.skip(f"{runtime} is not installed")
        protocol = dataclasses.replace(CPU, runtime=runtime)
        with pytest.raises(InputError, match=f"runtime {runtime}: "):
            prepare(network, images, protocol, tmp_path / "broken.onnx")


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


def test_a_title_says_what_the_runtime_was_told():
    assert Protocol().title == "torch, fp32, batch 128, channels-last"
    assert Protocol(runtime="ncnn", threads=1).title == "ncnn, fp32, batch 128, threads: 1"


def test_quick_leaves_what_was_chosen():
    assert Protocol().quick() == Protocol(batch=8, warmup=1, rounds=5)
    assert Protocol(batch=32).quick() == Protocol(batch=32, warmup=1, rounds=5)


def test_ones_own_network_is_benched_on_every_runtime(randomized, tmp_path):
    network = randomized(create_model("repvgg_digits", num_classes=10, in_chans=1))
    protocol = Protocol(batch=1, warmup=1, rounds=2, threads=1, device="cpu")
    report = bench(network, protocol, (1, 4))
    kinds = [row[:3] for row in report.rows]
    plain = [("plain", runtime) for runtime in installed_runtimes() if runtime != "compile"]
    expected = [("training-time", "torch"), *plain]
    assert kinds == [(*kind, batch) for batch in (1, 4) for kind in expected]
    assert all(float(row[-1] or 0) <= 1e-5 for row in report.rows)
    assert len(report.notes) == 3
    draw(tmp_path / "bench.png", report)
    assert (tmp_path / "bench.svg").exists()
