"""What the forms of the training-time block in lean.py are made of.

All images are channels-last, so that they are matrices (N·H·W, C) too, and a 1×1 convolution is a
matrix product that can add to what is there.

Axes: N images, C channels, H and W; O output channels, I input channels of one group. The
"inputs" are what the 1×1 and identity branches see: the block's input, of which a stride takes
every s-th row and column.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from repvgg.branches import MultiBranchBlock
from repvgg.spec import Layer

aten = torch.ops.aten

# On CPUs work goes piece by piece, so that each operation finds in the cache what the one before
# it left there. This is the size of the output's piece.
PIECE_BYTES = 4 << 20
# But a piece is this often the size of the 3×3 kernel, which it reads and adds a gradient to.
PIECE_KERNELS = 2


class Slope(NamedTuple):
    """The gradient to what a batch norm normalized, y, is `grad · g + values · y + constant`."""

    grad: Tensor
    values: Tensor
    constant: Tensor


# Shapes and pieces


def channels_last(x: Tensor) -> Tensor:
    """The same values, channels-last; no copy if they are."""
    return x.contiguous(memory_format=torch.channels_last)


def as_matrix(x: Tensor) -> Tensor:
    """(N, C, H, W), channels-last, seen as (N·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def row(channels: Tensor) -> Tensor:
    """(C,), to be broadcast over (N, C, H, W)."""
    return channels[:, None, None]


def column(channels: Tensor) -> Tensor:
    """(O,), to be broadcast over a kernel (O, I, 1, 1)."""
    return channels[:, None, None, None]


def strided(x: Tensor, layer: Layer) -> Tensor:
    """Every s-th row and column, channels-last."""
    return channels_last(x[..., :: layer.stride, :: layer.stride])


def output_like(x: Tensor, layer: Layer) -> Tensor:
    """Room for the output of the block, (N, O, ⌈H/s⌉, ⌈W/s⌉), channels-last."""
    high, wide = (-(-size // layer.stride) for size in x.shape[2:])
    shape = len(x), layer.out_channels, high, wide
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def in_pieces(x: Tensor, kernel: Tensor, layer: Layer) -> list[slice]:
    """Runs of images, about equally long. On GPUs one run, because launches cost more there."""
    count = step = len(x)
    if x.device.type == "cpu":
        size = max(PIECE_BYTES, PIECE_KERNELS * kernel.numel() * kernel.element_size())
        step = max(1, size // (output_like(x[:1], layer).numel() * x.element_size()))
        step = -(-count // -(-count // step))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


# Convolutions


def conv3x3(x: Tensor, kernel: Tensor, layer: Layer) -> Tensor:
    """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
    padding = layer.dilation
    return channels_last(
        torch.conv2d(x, kernel, None, layer.stride, padding, layer.dilation, layer.groups)
    )


def conv3x3_backward(
    x: Tensor,
    kernel: Tensor,
    layer: Layer,
    need: tuple[bool, bool],
    pieces: list[slice],
    gradients: Callable[[slice], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to x and the kernel, each only if needed.

    `gradients` gives those of a piece to the output of the convolution, and those to the inputs
    through the other branches.
    """
    stride, dilation = [layer.stride] * 2, [layer.dilation] * 2
    settings = (None, stride, dilation, dilation, False, [0, 0], layer.groups, [*need, False])
    whole = torch.empty_like(x) if need[0] and len(pieces) > 1 else None
    only: Tensor | None = None  # of one piece no copy is made
    grad_kernel = torch.zeros_like(kernel) if need[1] else None
    for piece in reversed(pieces):  # the last ones may still be in the cache
        to_output, to_inputs = gradients(piece)
        if not any(need):
            continue
        part, part_kernel, _ = aten.convolution_backward(to_output, x[piece], kernel, *settings)
        if grad_kernel is not None:
            grad_kernel += part_kernel
        if to_inputs is not None:
            part[..., :: layer.stride, :: layer.stride] += to_inputs
        if whole is not None:
            whole[piece] = part
        else:
            only = part
    return (only if whole is None else whole), grad_kernel


def conv1x1(inputs: Tensor, kernel: Tensor, layer: Layer) -> Tensor:
    """The 1×1 convolution of the inputs."""
    # Of stride 1 always: see `ConvBN` for what oneDNN does to a strided one.
    return channels_last(torch.conv2d(inputs, kernel, groups=layer.groups))


def by_group(images: Tensor, layer: Layer) -> list[Tensor]:
    """The matrix (N·H·W, C / groups) of each group."""
    return list(as_matrix(images).chunk(layer.groups, 1))


def grouped(kernel: Tensor, layer: Layer) -> Tensor:
    """(O, I, 1, 1) → (groups, O / groups, I)."""
    return kernel.view(layer.groups, -1, kernel.shape[1])


def add_conv1x1(total: Tensor, inputs: Tensor, kernel: Tensor, layer: Layer) -> None:
    """total += the 1×1 convolution of the inputs."""
    groups = by_group(total, layer), by_group(inputs, layer), grouped(kernel, layer)
    for outputs, part, weight in zip(*groups, strict=True):
        outputs.addmm_(part, weight.T)


def add_weight_grad(total: Tensor, grad: Tensor, inputs: Tensor, layer: Layer) -> None:
    """total += its gradient to the kernel."""
    groups = grouped(total, layer), by_group(grad, layer), by_group(inputs, layer)
    for weight, part, values in zip(*groups, strict=True):
        weight.addmm_(part.T, values)


def add_input_grad(total: Tensor, grad: Tensor, kernel: Tensor, layer: Layer) -> None:
    """total += its gradient to the inputs."""
    groups = by_group(total, layer), by_group(grad, layer), grouped(kernel, layer)
    for inputs, part, weight in zip(*groups, strict=True):
        inputs.addmm_(part, weight)


# Batch norm


def norms(block: MultiBranchBlock) -> list[nn.BatchNorm2d]:
    """The batch norm of each branch."""
    return [cast(nn.BatchNorm2d, branch.bn) for branch in block.branches.values()]


def mean_and_var(values: Tensor) -> Tensor:
    """(N, C, H, W) → (2, C), the variance being that of the values, not of a population."""
    return torch.stack(torch.batch_norm_update_stats(values, None, None, 0.0))


def pooled(moments: list[list[Tensor]], pieces: list[slice], count: int) -> Tensor:
    """Means and variances of pieces → those of the whole, (branches, 2, C)."""
    parts = torch.stack([torch.stack(of_piece) for of_piece in moments])
    share = parts.new_tensor([(piece.stop - piece.start) / count for piece in pieces])
    means, variances = parts.unbind(2)
    mean = torch.tensordot(share, means, 1)
    var = torch.tensordot(share, variances + (means - mean).square(), 1)
    return torch.stack([mean, var], 1)


def batch_statistics(block: MultiBranchBlock, moments: Tensor, like: Tensor) -> Tensor:
    """Mean and variance of each branch → mean and 1/σ, (branches, 2, O).

    The running statistics move on; `like` has the shape of the normalized.
    """
    count = like.numel() // like.shape[1]
    stats = []
    for norm, (mean, var) in zip(norms(block), moments, strict=True):
        momentum = cast(float, norm.momentum)
        cast(Tensor, norm.running_mean).lerp_(mean, momentum)
        cast(Tensor, norm.running_var).lerp_(var * (count / (count - 1)), momentum)
        cast(Tensor, norm.num_batches_tracked).add_(1)
        stats.append(torch.stack([mean, (var + norm.eps).rsqrt_()]))
    return torch.stack(stats)


def norm_sums(grad: Tensor, values: Tensor, stats: Tensor) -> Tensor:
    """Gradients to scale and shift of a batch norm, (2, O): Σ g (y − mean) / σ and Σ g."""
    mean, invstd, scale = stats
    mask = [False, True, True]
    _, to_scale, to_shift = aten.native_batch_norm_backward(
        grad, values, scale, None, None, mean, invstd, True, 0.0, mask
    )
    return torch.stack([to_scale, to_shift])


def slope_of(sums: Tensor, stats: Tensor, like: Tensor) -> Slope:
    """From both sums, and mean, 1/σ and scale; `like` has the shape of the normalized."""
    (to_scale, to_shift), (mean, invstd, scale) = sums, stats
    count = like.numel() // like.shape[1]
    values = -scale * invstd * to_scale / count
    return Slope(scale, values, -scale * to_shift / count - values * mean)


def to_values(grad: Tensor, values: Tensor, slope: Slope, in_place: bool) -> Tensor:
    """The gradient to what the batch norm normalized, in place of it if that is allowed."""
    total = values if in_place else torch.empty_like(values)
    torch.addcmul(row(slope.constant), values, row(slope.values), out=total)
    return total.addcmul_(grad, row(slope.grad))


# The merged form


def mean_and_covariance(inputs: Tensor, pieces: list[slice], layer: Layer) -> tuple[Tensor, Tensor]:
    """(C,) and (groups, I, I), of a batch; centered before it is squared, so that none cancels."""
    matrix = as_matrix(inputs)
    mean = matrix.mean(0)
    size = inputs.shape[1] // layer.groups
    covariance = inputs.new_zeros(layer.groups, size, size)
    for piece in pieces:
        parts = by_group(inputs[piece] - row(mean), layer)
        for total, part in zip(covariance, parts, strict=True):
            total.addmm_(part.T, part)
    return mean, covariance / len(matrix)


def merged_statistics(
    block: MultiBranchBlock, dense: Tensor, center: Tensor, covariance: Tensor, kernel1: Tensor
) -> Tensor:
    """Like `batch_statistics`."""
    weight = grouped(kernel1, block.layer)
    mean = (weight @ center.view(len(weight), -1, 1)).flatten()
    var = (weight @ covariance * weight).sum(-1).flatten()
    moments = [mean_and_var(dense), torch.stack([mean, var])]
    if len(norms(block)) == 3:
        moments.append(torch.stack([center, covariance.diagonal(dim1=1, dim2=2).flatten()]))
    return batch_statistics(block, torch.stack(moments), dense)


def mixing_kernel(scale: Tensor, kernel1: Tensor, identity: Tensor | None) -> Tensor:
    """diag(scale) W + diag(identity), as a kernel (O, I, 1, 1)."""
    mixing = column(scale) * kernel1
    if identity is not None:
        rows = torch.arange(len(mixing), device=mixing.device)
        mixing[rows, rows % mixing.shape[1], 0, 0] += identity
    return mixing


def outer(outputs: Tensor, inputs: Tensor, layer: Layer) -> Tensor:
    """(O,) and (C,) → the products within each group, (O, I, 1, 1)."""
    groups = layer.groups
    product = outputs.view(groups, -1, 1) * inputs.view(groups, 1, -1)
    return product.view(len(outputs), -1, 1, 1)


def diagonal(kernel: Tensor, layer: Layer) -> Tensor:
    """Of each group's square matrix, (O,)."""
    return grouped(kernel, layer).diagonal(dim1=1, dim2=2).flatten()


def merged_input_grad(
    kernel1: Tensor, slopes: list[Slope], layer: Layer
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels (O, I, 1, 1) on g and (C, I, 1, 1) on the inputs, and a constant (C,), summing up to
    the gradient to the inputs through the 1×1 and identity branches."""
    weight = grouped(kernel1, layer)
    _, pointwise, *identity = slopes
    values, constants = (part.view(layer.groups, -1, 1) for part in pointwise[1:])
    direct = mixing_kernel(pointwise.grad, kernel1, identity[0].grad if identity else None)
    crossed = (weight.mT @ (values * weight)).flatten(0, 1)[..., None, None]
    constant = (weight * constants).sum(1).flatten()
    if identity:
        crossed = mixing_kernel(torch.ones_like(identity[0].values), crossed, identity[0].values)
        constant = constant + identity[0].constant
    return direct, crossed, constant
