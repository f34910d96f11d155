"""Training-time branches and the block that adds them up (paper, Sect. 3.2, Eq. 1).

A branch is linear at inference, so it can state the one 3×3 kernel and bias that it is equal to.
The RepVGG block is the list of branches 3×3-BN, 1×1-BN and identity-BN.

Axes: N images, C channels, H and W; O output channels, I input channels of one group.
"""

import functools
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from repvgg.errors import InputError
from repvgg.fold import fold_conv_and_norm, fold_norm, pad_to_3x3, to_fp64
from repvgg.spec import Layer


class Branch(nn.Module):
    """A module (N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉) that is linear at inference."""

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel (O, I, 3, 3) and bias (O,) of the 3×3 convolution equal to this at inference.

        Both in fp64 and differentiable with respect to the parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} must state its equivalent kernel")


class Conv(Branch):
    """Convolution of 3×3, 1×1, 1×3 or 3×1, without batch norm.

    Args:
        layer: the 3×3 layer that this is a branch of.
        kernel_size: height and width, each 1 or 3.

    Raises:
        InputError: another kernel size.
    """

    def __init__(self, layer: Layer, kernel_size: tuple[int, int] = (3, 3)):
        super().__init__()
        if not set(kernel_size) <= {1, 3}:
            raise InputError(f"kernel_size={kernel_size}: each must be 1 or 3")
        # A strided 1×1 convolution is a strided slice and then a convolution of stride 1. oneDNN's
        # weight gradient of the strided form writes out of bounds for few channels, channels-last
        # (uxlfoundation/oneDNN issue 6035), which is just what the stem has.
        self.slice_step = layer.stride if kernel_size == (1, 1) else 1
        self.conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            kernel_size,
            stride=layer.stride // self.slice_step,
            padding=(
                layer.dilation * (kernel_size[0] // 2),
                layer.dilation * (kernel_size[1] // 2),
            ),
            dilation=layer.dilation,
            groups=layer.groups,
            bias=False,
            padding_mode=layer.padding_mode,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        if self.slice_step > 1:
            x = x[..., :: self.slice_step, :: self.slice_step]
        return self.conv(x)

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """See `Branch.equivalent`."""
        kernel = to_fp64(self.conv.weight)
        return pad_to_3x3(kernel), kernel.new_zeros(len(kernel))


class ConvBN(Conv):
    """A convolution, then batch norm; arguments and errors as of `Conv`."""

    def __init__(self, layer: Layer, kernel_size: tuple[int, int] = (3, 3)):
        super().__init__(layer, kernel_size)
        self.bn = nn.BatchNorm2d(layer.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        return self.bn(super().forward(x))

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """See `Branch.equivalent`."""
        kernel, bias = fold_conv_and_norm(self.conv, self.bn)
        return pad_to_3x3(kernel), bias


class IdentityBN(Branch):
    """Batch norm of the input itself.

    Raises:
        InputError: the layer changes the shape, so that it can have no identity branch.
    """

    def __init__(self, layer: Layer):
        super().__init__()
        if not layer.keeps_shape:
            raise InputError(f"an identity branch needs equal shapes and stride 1, found {layer}")
        self.groups = layer.groups
        self.bn = nn.BatchNorm2d(layer.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        return self.bn(x)

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """See `Branch.equivalent`."""
        kernel, bias = fold_norm(self.bn, self.groups)
        return pad_to_3x3(kernel), bias


def sum_of(branches: nn.ModuleDict) -> tuple[Tensor, Tensor]:
    """Kernel (O, I, 3, 3) and bias (O,) equal to the sum of branches at inference, fp64."""
    kernels, biases = zip(
        *(cast(Branch, branch).equivalent() for branch in branches.values()), strict=True
    )
    device = kernels[0].device  # a branch without parameters does not know where it is
    return (
        functools.reduce(torch.add, (kernel.to(device) for kernel in kernels)),
        functools.reduce(torch.add, (bias.to(device) for bias in biases)),
    )


# Another way to compute what a block does in training; None where it cannot (see lean.py).
Implementation = Callable[["MultiBranchBlock", Tensor], Tensor | None]


class MultiBranchBlock(nn.Module):
    """The sum of branches, then an activation; equal at inference to one 3×3 convolution and it.

    Args:
        layer: the 3×3 layer that the block becomes.
        branches: at least one, by name.
        activation: what follows the sum; `nn.ReLU` if none is given.

    Raises:
        InputError: no branch.
    """

    implementation: Implementation | None = None  # set by `repvgg.lean.use_implementation`

    def __init__(
        self, layer: Layer, branches: Mapping[str, Branch], activation: nn.Module | None = None
    ):
        super().__init__()
        if not branches:
            raise InputError("branches: at least one needed, found none")
        self.layer = layer
        self.branches = nn.ModuleDict(branches)
        self.activation = nn.ReLU(inplace=True) if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        if self.training and self.implementation is not None:
            result = self.implementation(self, x)
            if result is not None:
                return result
        first, *others = self.branches.values()
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return self.activation(total)

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Kernel (O, I, 3, 3) and bias (O,), fp64: the sums of those of the branches (Fig. 4)."""
        return sum_of(self.branches)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return str(self.layer)


def repvgg_block(layer: Layer) -> MultiBranchBlock:
    """The block of Sect. 3.2: 3×3-BN + 1×1-BN + identity-BN (where shapes match), then ReLU.

    In training it computes in the form that is fastest on the device; see
    `repvgg.lean.use_implementation`.
    """
    from repvgg.lean import auto  # which imports this module

    branches: dict[str, Branch] = {
        "conv3x3": ConvBN(layer, (3, 3)),
        "conv1x1": ConvBN(layer, (1, 1)),
    }
    if layer.keeps_shape:
        branches["identity"] = IdentityBN(layer)
    block = MultiBranchBlock(layer, branches)
    block.implementation = auto
    return block
