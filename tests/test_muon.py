"""Orthogonalized steps, against singular value decompositions and torch's own Muon."""

import pytest
import torch
from torch import nn

from repvgg import create_model
from repvgg.training.config import TrainConfig
from repvgg.training.muon import Muon, orthogonalized
from repvgg.training.optimizer import build_optimizers


@pytest.mark.parametrize("shape", [(16, 90), (90, 16), (32, 32), (1, 9), (4, 8, 90)])
def test_singular_vectors_stay_and_singular_values_become_about_1(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ orthogonalized(matrices) @ right.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(values, torch.diag_embed(diagonal), atol=1e-9, rtol=0)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3


def test_the_scale_of_a_matrix_does_not_matter_and_zeros_stay():
    matrix = torch.randn(8, 20, dtype=torch.float64)
    torch.testing.assert_close(orthogonalized(1e-9 * matrix), orthogonalized(matrix))
    assert not orthogonalized(torch.zeros(3, 4)).any()


def test_steps_turn_a_kernel_as_torchs_own_muon_does():
    """torch's works on matrices, in bf16, and does not fix their length."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(16, 4, 3, 3))
    with torch.no_grad():
        kernel *= 4 / kernel.norm()
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    ours = Muon([{"params": [kernel], "groups": 1, "lr": 0.1}], momentum=0.9)
    torchs = torch.optim.Muon([matrix], lr=0.1, momentum=0.9, weight_decay=0.0)
    for step in range(3):
        kernel.grad = torch.randn(16, 4, 3, 3)
        matrix.grad = kernel.grad.flatten(1).clone()
        length = matrix.detach().norm()
        with torch.no_grad():
            matrix *= 4 / length
        ours.step()
        torchs.step()
        difference = (kernel.detach().flatten(1) - matrix.detach()).norm()
        assert difference < 0.02 * 0.1 * 4 * (step + 1)


def test_groups_of_a_convolution_are_turned_each_by_itself():
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 4, 3, 3))
    gradient = torch.randn(6, 4, 3, 3)
    whole.grad = gradient.clone()
    before = whole.detach() * 6**0.5 / whole.detach().norm()
    Muon([{"params": [whole], "groups": 2, "lr": 0.1}], momentum=0.0).step()
    for rows in (slice(0, 3), slice(3, 6)):
        expected = before[rows] - 0.1 * orthogonalized(gradient[rows].flatten(1)).view(3, 4, 3, 3)
        torch.testing.assert_close(whole.detach()[rows], expected)


def test_the_layout_of_a_kernel_does_not_matter():
    torch.manual_seed(0)
    kernel, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    turned = []
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(kernel.clone().contiguous(memory_format=layout))
        parameter.grad = gradient.clone().contiguous(memory_format=layout)
        Muon([{"params": [parameter], "groups": 1, "lr": 0.1}], momentum=0.9).step()
        turned.append(parameter.detach())
    torch.testing.assert_close(turned[0], turned[1])


def test_each_parameter_is_learned_by_one_optimizer_at_its_own_rate():
    network = create_model("repvgg_digits:groups=2", num_classes=10)
    network.stages[0][0].branches.conv3x3.conv.weight.requires_grad_(False)  # pyright: ignore
    config = TrainConfig(
        optimizer="muon", muon_rate=0.03, bias_rate=8, learning_rate=0.2, weight_decay=0.01
    )
    sgd, muon = build_optimizers(network, config)
    rates = {}
    for optimizer in (sgd, muon):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in rates
                found = (group["lr"], group.get("weight_decay"), group.get("groups"))
                rates[id(parameter)] = found
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            is_fixed = name == "stages.0.0.branches.conv3x3.conv"
            expected = None if is_fixed else (0.03, None, module.groups)
            assert rates.get(id(module.weight)) == expected
        elif isinstance(module, nn.BatchNorm2d):
            assert rates[id(module.weight)] == (0.2, 0.0, None)
            assert rates[id(module.bias)] == (1.6, 0.0, None)
    assert rates[id(network.get_classifier().weight)] == (0.2, 0.01, None)
    assert rates[id(network.get_classifier().bias)] == (1.6, 0.0, None)
    assert len(rates) == len(list(network.parameters())) - 1


def test_convolutions_that_make_logits_are_not_turned():
    network = create_model("pspnet_repvgg_small", num_classes=4, width=16)
    sgd, muon = build_optimizers(network, TrainConfig(optimizer="muon", weight_decay=0.01))
    turned = {id(p) for group in muon.param_groups for p in group["params"]}
    decayed = {id(p) for g in sgd.param_groups if g["weight_decay"] for p in g["params"]}
    of_bias = {False: turned, True: decayed}
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert {conv.bias is not None for conv in convs} == {False, True}
    for conv in convs:
        assert id(conv.weight) in of_bias[conv.bias is not None]
    assert sum(map(len, of_bias.values())) == len(convs)
