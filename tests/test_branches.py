"""The training-time block: against Eq. 1 and 2 as loops, and its conversion on random blocks."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.branches import Branch, ConvBN, IdentityBN, MultiBranchBlock, repvgg_block
from repvgg.errors import InputError
from repvgg.fold import identity_kernel, pad_to_3x3
from repvgg.reparam import reparameterize
from repvgg.spec import PADDING_MODES, Layer

SIZES = [(3, 3), (1, 1), (1, 3), (3, 1)]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs, outputs = draw(st.tuples(*[st.integers(1, 64 // groups)] * 2))
    return Layer(
        inputs * groups,
        (inputs if draw(st.booleans()) else outputs) * groups,
        stride=draw(st.sampled_from([1, 2])),
        groups=groups,
        dilation=draw(st.sampled_from([1, 2])),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
    )


def with_hard_statistics(module: nn.Module, seed: int) -> Any:
    """Scales that are negative, tiny and zero, and variances from 1e-3 to 1e3."""
    random = torch.Generator().manual_seed(seed)
    norms: list[Any] = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        kinds = torch.tensor([1, -1, 1e-8, 0])[
            torch.randint(4, norm.weight.shape, generator=random)
        ]
        norm.weight.data = kinds * torch.randn(norm.weight.shape, generator=random)
        norm.bias.data.normal_(generator=random)
        norm.running_mean.normal_(generator=random)
        norm.running_var.copy_(10 ** (6 * torch.rand(norm.weight.shape, generator=random) - 3))
    return module.eval()


@pytest.mark.parametrize("dtype", BOUNDS)
@settings(max_examples=60, deadline=None)
@given(
    layer=layers(),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_random_block_is_equal_to_its_convolution(dtype, layer, size, seed):
    torch.manual_seed(seed)
    block = repvgg_block(layer)
    block.activation = nn.Identity()  # the sum itself, so that no ReLU hides a difference
    block = with_hard_statistics(block, seed).to(dtype)
    x = torch.randn(2, layer.in_channels, *size, dtype=dtype)
    with torch.no_grad():
        expected, actual = block(x), reparameterize(block)(x)
        # Relative to the largest of the terms: those of one channel may cancel, as 0.608 − 0.604.
        largest = max(branch(x).abs().max() for branch in block.branches.values())
    assert (expected - actual).abs().max() <= BOUNDS[dtype] * largest


@pytest.mark.parametrize("kernel_size", SIZES)
@settings(max_examples=30, deadline=None)
@given(
    layer=layers(),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_random_branch_is_equal_to_its_3x3_kernel(relative_error, kernel_size, layer, size, seed):
    torch.manual_seed(seed)
    branch: Any = with_hard_statistics(ConvBN(layer, kernel_size), seed).double()
    alone = MultiBranchBlock(layer, {"only": branch}, nn.Identity()).eval()
    x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(branch(x), reparameterize(alone)(x)) <= 1e-12


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        Layer(4, 4),
        Layer(4, 4, groups=2),
        Layer(4, 4, stride=2),
        Layer(2, 6, groups=2),
        Layer(3, 3, dilation=2),
    ],
)
def test_the_block_is_eq_1(naive_conv, naive_norm, randomized, layer, training):
    block = randomized(repvgg_block(layer).double()).train(training)
    branches = block.branches
    x = np.random.default_rng(0).normal(size=(2, layer.in_channels, 5, 6))

    def bn(features, norm):
        mean, var = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
        if training:  # of this batch, as long as the statistics are not frozen
            mean, var = features.mean((0, 2, 3)), features.var((0, 2, 3))
        return naive_norm(features, mean, var, norm.weight.detach(), norm.bias.detach(), norm.eps)

    geometry: dict[str, Any] = {"stride": layer.stride, "groups": layer.groups}
    dense = naive_conv(
        x,
        branches.conv3x3.conv.weight.detach(),
        dilation=layer.dilation,
        padding=(layer.dilation,) * 2,
        **geometry,
    )
    pointwise = naive_conv(x, branches.conv1x1.conv.weight.detach(), **geometry)
    expected = bn(dense, branches.conv3x3.bn) + bn(pointwise, branches.conv1x1.bn)
    if layer.keeps_shape:
        expected += bn(x, branches.identity.bn)
    actual = block(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(actual, np.maximum(expected, 0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "has_identity"),
    [
        (Layer(4, 4), True),
        (Layer(4, 4, groups=4, dilation=2, padding_mode="circular"), True),
        (Layer(4, 8), False),
        (Layer(4, 4, stride=2), False),
    ],
)
def test_there_is_an_identity_branch_only_where_shapes_match(layer, has_identity):
    names = list(repvgg_block(layer).branches)
    assert names == ["conv3x3", "conv1x1"] + ["identity"] * has_identity
    if not has_identity:
        with pytest.raises(InputError, match="identity"):
            IdentityBN(layer)


@pytest.mark.parametrize("kernel_size", SIZES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (4, 5), (7, 6)])
def test_stride_s_maps_n_to_n_over_s_rounded_up(kernel_size, stride, dilation, size):
    branch = ConvBN(Layer(2, 3, stride, dilation=dilation), kernel_size).eval()
    high, wide = (-(-n // stride) for n in size)
    assert branch(torch.zeros(1, 2, *size)).shape == (1, 3, high, wide)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_1x1_branch_has_the_groups_of_the_3x3(groups):
    branches: Any = repvgg_block(Layer(8, 8, groups=groups)).branches
    assert branches.conv3x3.conv.groups == branches.conv1x1.conv.groups == groups


class Scale(Branch):
    """Somebody else's branch: the input times a number."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer, self.factor = layer, nn.Parameter(torch.tensor(-1.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def equivalent(self) -> tuple[Tensor, Tensor]:
        kernel = identity_kernel(self.layer.in_channels, self.layer.groups)
        kernel = pad_to_3x3(kernel.double() * self.factor)
        return kernel, kernel.new_zeros(self.layer.out_channels)


def test_any_list_of_branches_converts(relative_error, randomized):
    layer = Layer(6, 6, groups=2)
    branches = {f"conv{h}x{w}": ConvBN(layer, (h, w)) for h, w in SIZES}
    block = MultiBranchBlock(
        layer,
        {**branches, "bn": IdentityBN(layer), "bn2": IdentityBN(layer), "scale": Scale(layer)},
    )
    block = randomized(block).double().eval()
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    assert relative_error(block(x), reparameterize(block)(x)) <= 1e-12


def test_a_branch_must_state_its_kernel():
    class Silent(Branch):
        pass

    with pytest.raises(NotImplementedError, match="Silent"):
        Silent().equivalent()


@pytest.mark.parametrize("kernel_size", [(5, 5), (1, 2), (3, 0)])
def test_a_branch_of_another_size_is_refused(kernel_size):
    with pytest.raises(InputError, match="kernel_size"):
        ConvBN(Layer(4, 4), kernel_size)


def test_a_block_without_branches_is_refused():
    with pytest.raises(InputError, match="branches"):
        MultiBranchBlock(Layer(4, 4), {})


# oneDNN's weight gradient of a strided 1×1 convolution of few channels, channels-last, writes out
# of bounds (uxlfoundation/oneDNN issue 6035): seen as a crash at these sizes. Our stem has such a
# branch.


@pytest.mark.parametrize(("channels", "size"), [(1, 112), (3, 112), (3, 113), (8, 112), (15, 112)])
def test_gradients_of_the_stem_are_those_of_the_strided_convolution(relative_error, channels, size):
    torch.manual_seed(0)
    x = torch.randn(2, channels, size, size)
    direction = torch.randn(2, 16, *[(size + 1) // 2] * 2)
    branch: Any = ConvBN(Layer(channels, 16, stride=2), (1, 1))
    branch.bn = nn.Identity()

    naive_x, naive_weight = x.double(), branch.conv.weight.detach().double()
    naive = torch.conv2d(naive_x.requires_grad_(), naive_weight.requires_grad_(), stride=2)
    expected = torch.autograd.grad((naive * direction).sum(), (naive_weight, naive_x))

    branch.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    output = branch(x) * direction.to(memory_format=torch.channels_last)
    actual = torch.autograd.grad(output.sum(), (branch.conv.weight, x))
    for ours, truth in zip(actual, expected, strict=True):
        assert relative_error(truth, ours) <= 1e-5


def test_training_a_stem_channels_last_is_training_it_contiguous():
    losses: list[list[float]] = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        stem = repvgg_block(Layer(3, 16, stride=2)).to(memory_format=memory_format)
        optimizer = torch.optim.SGD(stem.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(20):
            x = torch.randn(2, 3, 96, 96).to(memory_format=memory_format)
            loss = (stem(x) - x[:, :1, ::2, ::2]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert all(parameter.isfinite().all() for parameter in stem.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][-1] < 0.7 * losses[1][0]
