"""The branches that Tables 6 and 7 and later papers are made of, beside those of Sect. 3.2.

Axes: N images, C channels, H and W; O output channels, I input channels of one group.
"""

import functools
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.branches import Branch, Conv, ConvBN, sum_of
from repvgg.errors import InputError
from repvgg.fold import (
    fold_batch_norm,
    fold_conv_and_norm,
    identity_kernel,
    norm_constants,
    pad_to_3x3,
    to_fp64,
)
from repvgg.spec import Layer


class Identity(Branch):
    """The input itself, without batch norm ("Identity w/o BN" of Table 7).

    Raises:
        InputError: the layer changes the shape, so that it can have no identity branch.
    """

    def __init__(self, layer: Layer):
        super().__init__()
        if not layer.keeps_shape:
            raise InputError(f"an identity branch needs equal shapes and stride 1, found {layer}")
        self.channels, self.groups = layer.out_channels, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same."""
        return x

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """See `Branch.equivalent`."""
        kernel = identity_kernel(self.channels, self.groups).double()
        return pad_to_3x3(kernel), kernel.new_zeros(self.channels)


class NormedSum(Branch):
    """A batch norm after the addition of branches ("Post-addition BN" of Table 7; QARepVGG)."""

    def __init__(self, layer: Layer, branches: Mapping[str, Branch]):
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.bn = nn.BatchNorm2d(layer.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        return self.bn(
            functools.reduce(torch.add, (branch(x) for branch in self.branches.values()))
        )

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """See `Branch.equivalent`."""
        kernel, bias = sum_of(self.branches)
        return fold_batch_norm(kernel, bias, **norm_constants(self.bn))


class Rectified(Branch):
    """A branch with a ReLU before the addition ("+ReLU in branch" of Table 7).

    It is of no practical use, since no convolution is equal to it.
    """

    def __init__(self, branch: Branch):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        return self.branch(x).relu()

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Always raises.

        Raises:
            InputError: a ReLU is not linear.
        """
        raise InputError("a branch ends in a ReLU, so that no single convolution is equal to it")


class ReparameterizedConvBN(ConvBN):
    """A 3×3 convolution whose kernel is a function of its weight, then batch norm.

    The function is the identity, for others to replace.
    """

    def kernel(self) -> Tensor:
        """(O, I, 3, 3), from the parameters."""
        return self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        return self.bn(self.conv._conv_forward(x, self.kernel(), None))

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """See `Branch.equivalent`."""
        return fold_batch_norm(to_fp64(self.kernel()), None, **norm_constants(self.bn))


def dirac_kernel(like: Tensor, groups: int) -> Tensor:
    """(O, I, 3, 3) that maps as many channels of each group to themselves as there are on both
    sides."""
    eye = torch.eye(len(like) // groups, like.shape[1], dtype=like.dtype, device=like.device)
    return pad_to_3x3(eye.repeat(groups, 1)[:, :, None, None])


class Dirac(ReparameterizedConvBN):
    """diag(a) I + diag(b) W, each filter of W normalized (DiracNets, Zagoruyko and Komodakis).

    As in the official code a begins as 1 and b as 0.1, and where a layer changes the number of
    channels, I maps as many as there are on both sides.
    """

    def __init__(self, layer: Layer):
        super().__init__(layer)
        self.a = nn.Parameter(torch.ones(layer.out_channels))
        self.b = nn.Parameter(torch.full((layer.out_channels,), 0.1))

    def kernel(self) -> Tensor:
        """(O, I, 3, 3)."""
        weight = self.conv.weight
        delta = dirac_kernel(weight, self.conv.groups)
        weight = F.normalize(weight.flatten(1)).view_as(weight)
        return self.a[:, None, None, None] * delta + self.b[:, None, None, None] * weight


class Trivial(ReparameterizedConvBN):
    """I + W ("Trivial Re-param" of Table 7); W alone where the layer changes the shape."""

    def __init__(self, layer: Layer):
        super().__init__(layer)
        self.keeps_shape = layer.keeps_shape

    def kernel(self) -> Tensor:
        """(O, I, 3, 3)."""
        weight = super().kernel()
        return weight + dirac_kernel(weight, self.conv.groups) if self.keeps_shape else weight


# Diverse Branch Block


class PaddedNorm(nn.Module):
    """Batch norm, then padding by what it makes of zeros, so that padding first would be the same.

    As in the official code the padding follows the running statistics, in training too.
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H + 2 p, W + 2 p)."""
        bn = self.bn
        mean, var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
        x = bn(x)
        border = (bn.bias - mean * bn.weight * torch.rsqrt(var + bn.eps))[:, None, None]
        return F.pad(x - border, [self.padding] * 4) + border


class PointwiseThen(Branch):
    """1×1-BN and then 3×3-BN, or average pooling and BN (DBB, Ding et al., CVPR 2021).

    Args:
        layer: the 3×3 layer that this is a branch of.
        pooled: an average over 3×3 pixels in place of the 3×3 convolution.

    Raises:
        InputError: a padding mode that is not zeros.
    """

    def __init__(self, layer: Layer, *, pooled: bool = False):
        super().__init__()
        if layer.padding_mode != "zeros":
            raise InputError(f"a branch in sequence needs padding_mode='zeros', found {layer}")
        self.layer, self.pooled = layer, pooled
        middle = layer.out_channels if pooled else layer.in_channels
        self.first = nn.Conv2d(layer.in_channels, middle, 1, groups=layer.groups, bias=False)
        self.padded = PaddedNorm(middle, layer.dilation)
        self.second = None if pooled else Conv(layer).conv
        if self.second is not None:
            self.second.padding = (0, 0)
        self.bn = nn.BatchNorm2d(layer.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        x = self.padded(self.first(x))
        if self.second is not None:
            return self.bn(self.second(x))
        average = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
        layer = self.layer
        x = F.conv2d(x, average, None, layer.stride, 0, layer.dilation, x.shape[1])
        return self.bn(x)

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """See `Branch.equivalent`."""
        groups = self.layer.groups
        first, bias = fold_conv_and_norm(self.first, self.padded.bn)
        if self.second is None:
            eye = identity_kernel(len(first), groups, like=first)
            second = eye.expand(-1, -1, 3, 3) / 9
        else:
            second = to_fp64(self.second.weight)
        # In each group: kernel of the second after that of the first.
        firsts = first.flatten(1).view(groups, -1, first.shape[1])
        seconds = second.view(groups, -1, *second.shape[1:])
        kernel = torch.einsum("gomhw,gmi->goihw", seconds, firsts).flatten(0, 1)
        through = torch.einsum("gomhw,gm->go", seconds, bias.view(groups, -1)).flatten()
        return fold_batch_norm(kernel, through, **norm_constants(self.bn))
