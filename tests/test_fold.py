"""Eq. 1–4 of the paper: against numbers worked out by hand, NumPy loops and finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from repvgg.branches import MultiBranchBlock, repvgg_block
from repvgg.errors import InputError
from repvgg.fold import (
    fold_batch_norm,
    fold_conv_and_norm,
    fold_norm,
    identity_kernel,
    pad_to_3x3,
)
from repvgg.spec import Layer


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("bias", "gamma", "beta", "kernel_after", "bias_after"),
    [
        # γ/σ = 3/√(3 + 1) = 1.5, so W' = 1.5 · 2 and b' = −5 · 1.5 + 7 (Eq. 3).
        (None, t(3), t(7), 3.0, -0.5),
        (t(1), t(3), t(7), 3.0, 1.0),
        (t(1), t(3), None, 3.0, -6.0),
        (None, t(-3), t(7), -3.0, 14.5),
        (t(1), t(0), t(7), 0.0, 7.0),
        (None, None, None, 1.0, -2.5),
    ],
)
def test_folding_gives_what_was_worked_out_by_hand(bias, gamma, beta, kernel_after, bias_after):
    kernel = t(2).reshape(1, 1, 1, 1)
    folded = fold_batch_norm(kernel, bias, mean=t(5), var=t(3), gamma=gamma, beta=beta, eps=1)
    assert folded[0].shape == (1, 1, 1, 1)
    assert folded[0].item() == pytest.approx(kernel_after, rel=1e-15)
    assert folded[1].tolist() == pytest.approx([bias_after], rel=1e-15)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    size=st.sampled_from([(3, 3), (1, 1), (1, 3), (3, 1)]),
    log_var=st.floats(-3, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_folded_convolution_is_convolution_then_bn(
    naive_conv, naive_norm, groups, stride, dilation, size, log_var, seed
):
    """Eq. 4, both sides as loops."""
    random = np.random.default_rng(seed)
    image = random.normal(size=(1, 2 * groups, 5, 6))
    kernel = random.normal(size=(groups, 2, *size))
    mean, gamma, beta = random.normal(size=(3, groups))
    var = 10 ** (log_var * random.uniform(size=groups))
    geometry = {"stride": stride, "groups": groups, "dilation": dilation, "padding": (2, 2)}
    expected = naive_norm(naive_conv(image, kernel, **geometry), mean, var, gamma, beta, 1e-5)
    folded_kernel, folded_bias = fold_batch_norm(
        torch.from_numpy(kernel),
        None,
        mean=torch.from_numpy(mean),
        var=torch.from_numpy(var),
        gamma=torch.from_numpy(gamma),
        beta=torch.from_numpy(beta),
        eps=1e-5,
    )
    actual = naive_conv(image, folded_kernel, folded_bias, **geometry)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)])
def test_the_identity_kernel_changes_nothing(naive_conv, channels, groups):
    image = np.random.default_rng(0).normal(size=(2, channels, 3, 4))
    kernel = identity_kernel(channels, groups)
    assert kernel.shape == (channels, channels // groups, 1, 1)
    assert np.array_equal(naive_conv(image, kernel, groups=groups), image)


def test_the_identity_kernel_is_like_what_it_is_for():
    assert identity_kernel(2, like=t(1)).dtype == torch.float64
    assert identity_kernel(2, like=torch.empty(1, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("kernel", "padded"),
    [
        ([[5.0]], [[0, 0, 0], [0, 5, 0], [0, 0, 0]]),
        ([[1.0, 2, 3]], [[0, 0, 0], [1, 2, 3], [0, 0, 0]]),
        ([[1.0], [2], [3]], [[0, 1, 0], [0, 2, 0], [0, 3, 0]]),
        ([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ],
)
def test_a_small_kernel_lies_in_the_middle_of_3x3(kernel, padded):
    assert pad_to_3x3(torch.tensor([[kernel]])).tolist() == [[padded]]


@pytest.mark.parametrize("size", [(2, 2), (5, 5), (1, 5), (3, 2)])
def test_a_kernel_that_does_not_fit_into_3x3_is_refused(size):
    with pytest.raises(InputError, match=f"{size[0]}×{size[1]}"):
        pad_to_3x3(torch.zeros(1, 1, *size))


def test_folding_is_differentiable_in_all_that_it_takes():
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in [(3, 2, 1, 3), *[(3,)] * 5]]
    inputs[3] = inputs[3].exp()
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def fold(kernel, bias, mean, var, gamma, beta):
        kernel, bias = fold_batch_norm(
            kernel, bias, mean=mean, var=var, gamma=gamma, beta=beta, eps=1e-5
        )
        return pad_to_3x3(kernel), bias

    assert gradcheck(fold, inputs)


def test_the_kernel_of_a_block_is_differentiable_in_its_parameters(randomized):
    block: MultiBranchBlock = randomized(repvgg_block(Layer(4, 4, groups=2)).double())
    names = [name for name, _ in block.named_parameters()]

    class Equivalent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self):
            return self.block.equivalent()

    def equivalent(*values):
        named = dict(zip((f"block.{name}" for name in names), values, strict=True))
        return torch.func.functional_call(Equivalent(), named, ())

    assert gradcheck(equivalent, [p.detach().requires_grad_() for p in block.parameters()])


def test_gradients_through_the_folded_kernel_are_those_of_the_branches(randomized):
    block = randomized(repvgg_block(Layer(4, 4)).double()).eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    outputs = [block(x), torch.conv2d(x, *block.equivalent(), padding=1).relu()]
    gradients = [
        torch.autograd.grad((output * weight).sum(), tuple(block.parameters()))
        for output in outputs
    ]
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_modules_are_folded_in_fp64_whatever_their_dtype(randomized, dtype, affine, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=bias).to(dtype)
    norm = randomized(nn.BatchNorm2d(4, affine=affine)).eval().to(dtype)
    kernel, shift = fold_conv_and_norm(conv, norm)
    assert kernel.dtype == shift.dtype == torch.float64
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = norm.double()(conv.double()(x))
    torch.testing.assert_close(torch.conv2d(x, kernel, shift), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_batch_norm_alone_is_a_1x1_convolution(randomized, groups):
    norm = randomized(nn.BatchNorm2d(4)).double().eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    actual = torch.conv2d(x, *fold_norm(norm, groups), groups=groups)
    torch.testing.assert_close(actual, norm(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4), nn.Identity()]
)
def test_what_has_no_running_statistics_cannot_be_folded(norm):
    with pytest.raises(InputError, match=f"{type(norm).__name__} has no running mean"):
        fold_conv_and_norm(nn.Conv2d(4, 4, 3), norm)
    with pytest.raises(InputError, match=f"{type(norm).__name__} has no running mean"):
        fold_norm(norm)
