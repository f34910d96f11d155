"""`verify`: what it measures, that it refuses, that it says where, and that it leaves no trace."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repvgg.branches import repvgg_block
from repvgg.errors import InputError
from repvgg.model import RepVGG, create_model
from repvgg.reparam import reparameterize
from repvgg.spec import Layer, Spec
from repvgg.verification import exact_fp32, verify

SPEC = Spec((1, 2, 2), strides=(2, 2, 1), widths=(8, 8, 16))


class Gives(nn.Module):
    """A network whose output is given."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, _x: Tensor) -> Any:
        return self.output


def agreement(expected: Any, actual: Any):
    return verify(Gives(expected), Gives(actual), torch.zeros(1))


def shifted(model: nn.Module, parameter: str) -> nn.Module:
    model.get_parameter(parameter).data += 0.1
    return model


@pytest.fixture
def network(randomized) -> RepVGG:
    torch.manual_seed(0)
    return randomized(create_model(SPEC, num_classes=10).double())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(
        8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def test_errors_and_agreement_are_those_worked_out_by_hand():
    expected = torch.tensor([[1.0, -4.0], [2.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    actual = torch.tensor([[1.0, -4.0], [2.5, 2.0], [1.0, 0.5], [0.0, 1.0]])
    found = agreement(expected, actual)
    assert found.max_abs_error == 1.0
    assert found.max_rel_error == 0.25
    assert found.top1_agreement == 0.75
    assert found.layer_errors == {}
    assert str(found) == "max abs error 1.00e+00, relative 2.50e-01, top-1 agreement 75.00 % of 4"


@pytest.mark.parametrize(
    "form", [list, tuple, lambda outputs: dict(zip("ab", outputs, strict=True))]
)
def test_all_outputs_are_compared_whatever_they_come_in(form):
    expected = [torch.tensor([[1.0, 2.0]]), torch.tensor([[8.0, 1.0]])]
    actual = [torch.tensor([[1.0, 2.0]]), torch.tensor([[8.0, 3.0]])]
    found = agreement(form(expected), form(actual))
    assert (found.max_abs_error, found.max_rel_error) == (2.0, 0.25)
    assert found.top1_agreement == 1.0
    assert agreement([form(expected)], [form(actual)]) == found


def test_pixels_agree_one_by_one():
    expected = torch.zeros(1, 2, 2, 2)
    expected[0, 1] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert agreement(expected, expected.flip(2)).top1_agreement == 0.0
    assert agreement(expected, expected.flip(3)).top1_agreement == 1.0


@pytest.mark.parametrize("output", [torch.ones(4), torch.ones(4, 1)])
def test_there_is_no_agreement_without_classes(output):
    found = agreement(output, output)
    assert found.top1_agreement is None
    assert str(found) == "max abs error 0.00e+00, relative 0.00e+00"


@pytest.mark.parametrize(
    ("expected", "actual"),
    [(1.0, math.nan), (math.nan, 1.0), (math.nan, math.nan), (math.inf, 1.0), (0.0, 1e-30)],
)
@pytest.mark.parametrize("position", [0, 1])
def test_what_is_not_a_number_is_infinitely_wrong(expected, actual, position):
    outputs = [[torch.ones(1, 2), torch.ones(1, 2)] for _ in range(2)]
    outputs[0][position] = torch.tensor([[expected, 0.0]])
    outputs[1][position] = torch.tensor([[actual, 0.0]])
    found = agreement(*outputs)
    assert found.max_rel_error == math.inf
    with pytest.raises(InputError, match="relative inf"):
        found.require(1e9)


def test_outputs_of_zero_agree():
    assert agreement(torch.zeros(2, 3), torch.zeros(2, 3)).max_rel_error == 0.0


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (torch.ones(2, 3), torch.ones(2, 4)),
        ([torch.ones(2, 3)], [torch.ones(2, 3), torch.ones(2, 3)]),
    ],
)
def test_outputs_of_other_shapes_are_refused(expected, actual):
    with pytest.raises(InputError, match=r"shape of their output: \[\(2, 3\)\] and \[\(2, "):
        agreement(expected, actual)


def test_an_output_that_holds_no_tensors_is_refused():
    with pytest.raises(InputError, match="output is a str"):
        agreement("cat", "cat")


def test_a_converted_network_passes_with_an_error_for_each_block(network, images):
    found = verify(network, reparameterize(network), images, max_rel_error=1e-12)
    assert 0 < found.max_rel_error <= 1e-12
    assert found.max_abs_error > 0
    assert found.top1_agreement == 1.0
    names = ["stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0", "stages.2.1"]
    assert list(found.layer_errors) == names
    assert all(0 < error <= 1e-12 for error in found.layer_errors.values())


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Module.eval])
@pytest.mark.parametrize("altered", ["stages.0.0", "stages.1.1", "stages.2.1"])
def test_the_first_layer_that_differs_is_named(network, images, altered, wrap):
    model, plain = wrap(network), shifted(reparameterize(network), f"{altered}.conv.bias")
    with pytest.raises(InputError, match=f"the first layer that differs is {altered}$") as caught:
        verify(model, plain, images, max_rel_error=1e-6)
    found = verify(model, plain, images)
    assert f"relative {found.max_rel_error:.2e}" in str(caught.value)
    assert "of at most 1e-06" in str(caught.value)
    assert next(name for name, error in found.layer_errors.items() if error > 1e-6) == altered


def test_many_batches_are_one_comparison(network, images):
    plain = shifted(reparameterize(network), "stages.1.1.conv.bias")
    whole = verify(network, plain, images)
    found = verify(network, plain, (images[i : i + 3] for i in (0, 3, 6)))
    assert found.images == whole.images == 8
    assert found.max_abs_error == pytest.approx(whole.max_abs_error, rel=1e-12)
    assert found.top1_agreement == pytest.approx(whole.top1_agreement, rel=1e-12)
    assert found.layer_errors.keys() == whole.layer_errors.keys()
    assert found.layer_errors["stages.0.0"] <= 1e-12 < found.layer_errors["stages.1.1"]


def test_no_batch_is_refused(network):
    with pytest.raises(InputError, match="at least one batch"):
        verify(network, network, [])


def test_a_difference_behind_the_blocks_names_no_layer(network, images):
    plain = shifted(reparameterize(network), "classifier.bias")
    with pytest.raises(InputError, match=r"is needed$"):
        verify(network, plain, images, max_rel_error=1e-6)


def test_a_later_layer_that_works_in_place_hides_no_difference(randomized, images):
    block = randomized(repvgg_block(Layer(3, 3)).double())
    block.activation = nn.Identity()
    model = nn.Sequential(block, nn.Threshold(1e9, 0, inplace=True))
    found = verify(model, shifted(reparameterize(model), "0.conv.bias"), images)
    assert found.max_rel_error == 0
    assert found.layer_errors["0"] > 1e-3


def test_the_bound_itself_passes():
    found = agreement(torch.tensor([[4.0, 0.0]]), torch.tensor([[4.0, 1.0]]))
    found.require(0.25)
    with pytest.raises(InputError, match=r"relative 2\.50e-01, top-1 agreement 100"):
        found.require(0.2499)


@pytest.mark.parametrize("fails", [False, True])
def test_both_networks_are_left_as_they_were(network, images, fails):
    plain = reparameterize(network)
    network.train()
    network.stages[1].eval()
    plain.train()
    if fails:
        shifted(plain, "stages.0.0.conv.bias")
    before = [copy.deepcopy(model) for model in (network, plain)]
    try:
        verify(network, plain, images, max_rel_error=1e-6)
    except InputError:
        assert fails
    for model, old in zip((network, plain), before, strict=True):
        assert [m.training for m in model.modules()] == [m.training for m in old.modules()]
        assert not any(module._forward_hooks for module in model.modules())
        for name, tensor in old.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)


def test_modes_come_back_when_a_network_fails(network, images):
    network.train()
    with pytest.raises(RuntimeError):
        verify(network, reparameterize(network), images[:, :2])
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())


def test_networks_in_train_mode_are_compared_at_inference(network, images):
    plain = reparameterize(network).train()
    assert verify(network.train(), plain, images).max_rel_error <= 1e-12


def test_fp32_is_exact_for_a_while_unless_the_newer_settings_were_used():
    cudnn: Any = torch.backends.cudnn
    assert cudnn.allow_tf32  # PyTorch's default
    with exact_fp32():
        assert not cudnn.allow_tf32
    assert cudnn.allow_tf32
    if not hasattr(cudnn, "conv"):
        pytest.skip("this version of PyTorch has no newer settings")
    cudnn.conv.fp32_precision = "ieee"
    with pytest.raises(RuntimeError, match="allow_tf32"):
        _ = cudnn.allow_tf32
    with exact_fp32():
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
    cudnn.allow_tf32 = True
    assert cudnn.conv.fp32_precision == "tf32"
