"""What only a GPU can show: that the same training ends with the same bits there too."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import repvgg
from repvgg.branches import repvgg_block
from repvgg.checkpoint import load
from repvgg.lean import IMPLEMENTATIONS, use_implementation
from repvgg.memory import activation_memory, measured_memory
from repvgg.spec import Layer
from repvgg.training import loop
from repvgg.training.recipes import digits
from repvgg.verification import exact_fp32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS = [Layer(8, 8), Layer(8, 12, stride=2), Layer(8, 8, groups=2, dilation=2), Layer(3, 8, 2)]


def outcome(block, x):
    """Output, gradients and running statistics of a step."""
    x = x.clone().requires_grad_()
    output = block(x)
    (output * torch.linspace(-1, 1, output.numel()).to(output).view_as(output)).sum().backward()
    return [output, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


@pytest.mark.parametrize("form", [form for form in IMPLEMENTATIONS if form != "branches"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_each_form_of_the_block_is_the_three_branches(layer, form):
    torch.manual_seed(0)
    block = repvgg_block(layer).double()
    x = torch.randn(4, layer.in_channels, 9, 10, dtype=torch.float64)
    here = use_implementation(block, "branches")
    there = use_implementation(copy.deepcopy(block).cuda(), form)
    for expected, found in zip(outcome(here, x), outcome(there, x.cuda()), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-10)


def config_of(**changes):
    return dataclasses.replace(digits(), epochs=2, device="cuda", **changes)


def weights(path):
    return load(path / "last.safetensors").state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_that_goes_on_ends_with_the_same_bits(precision, tmp_path):
    config = config_of(precision=precision, checkpoint_minutes=0, kept_checkpoints=100)
    run = loop.train(config, tmp_path / "whole")
    expected = weights(run.path)
    kept = sorted((run.path / "checkpoints").iterdir())
    for state in kept[30:]:
        state.unlink()
    loop.train(config, run.path)
    found = weights(run.path)
    assert len(kept) > 40
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"optimizer": "muon"}, {"accumulate": 2}])
def test_every_option_trains(options, tmp_path):
    run = loop.train(config_of(**options), tmp_path / "run")
    assert run.read_history()[-1]["test_top1"] > 0.5


def test_a_network_is_folded_where_it_is():
    torch.manual_seed(0)
    network = repvgg.create_model("repvgg_a0", num_classes=10).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_mean"), -0.1, 0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network.double()(images.double())
        plain = repvgg.reparameterize(network.float().cuda())
        with exact_fp32():
            found = plain(images.cuda())
    assert found.is_cuda
    assert (found.cpu() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_allocator_sees_at_least_what_the_graph_says():
    network = repvgg.reparameterize(repvgg.create_model("repvgg_a0").eval()).cuda()
    images = torch.randn(8, 3, 224, 224, device="cuda")
    computed = activation_memory(network, tuple(images.shape)).during
    assert computed <= measured_memory(network, images) < 3 * computed
