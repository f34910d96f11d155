"""Cheaper ways through the training-time block (paper, Sect. 3.2), chosen by name.

All compute what the three branches compute in training: the batch statistics of each branch, the
gradients to the parameters of each, the running statistics as `nn.BatchNorm2d` keeps them. They
differ in what they keep for the backward pass and in how often they pass over memory; the figures
are in docs/training_block.md.

Axes: N images, C channels, H and W; O output channels, I input channels of one group. The
"inputs" are what the 1×1 and identity branches see: the block's input, of which a stride takes
every s-th row and column.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from repvgg.branches import ConvBN, IdentityBN, Implementation, MultiBranchBlock
from repvgg.errors import InputError
from repvgg.lean_ops import (
    add_conv1x1,
    add_input_grad,
    add_weight_grad,
    batch_statistics,
    channels_last,
    column,
    conv1x1,
    conv3x3,
    conv3x3_backward,
    diagonal,
    grouped,
    in_pieces,
    mean_and_covariance,
    mean_and_var,
    merged_input_grad,
    merged_statistics,
    mixing_kernel,
    norm_sums,
    norms,
    outer,
    output_like,
    pooled,
    row,
    slope_of,
    strided,
    to_values,
)

aten = torch.ops.aten


class Fused(torch.autograd.Function):
    """The block as one operation, which computes again in the backward pass what it did not keep.

    The normalized branches are summed and rectified in one sweep; in the backward pass one sweep
    finds the sums that the batch norms need, and a second one the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: MultiBranchBlock,
        keep: set[str],
        x: Tensor,
        kernel3: Tensor,
        kernel1: Tensor,
        *affine: Tensor,
    ) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉), both channels-last.

        `keep` may hold "3x3" and "1x1", for the outputs of those convolutions; `affine` is scale
        and shift of each batch norm.
        """
        layer = block.layer
        inputs, pieces = strided(x, layer), in_pieces(x, kernel3, layer)
        dense, pointwise, moments = [], [], []
        for piece in pieces:
            dense.append(conv3x3(x[piece], kernel3, layer))
            pointwise.append(conv1x1(inputs[piece], kernel1, layer))
            values = dense[-1], pointwise[-1], inputs[piece]
            moments.append([mean_and_var(y) for y in values[: len(affine) // 2]])
        z = output_like(x, layer)
        stats = batch_statistics(block, pooled(moments, pieces, len(x)), z)
        mean, invstd = stats.unbind(1)
        scale = torch.stack(affine[::2]) * invstd
        shift = (torch.stack(affine[1::2]) - scale * mean).sum(0)

        for piece, of_dense, of_pointwise in zip(pieces, dense, pointwise, strict=True):
            total = z[piece]
            torch.addcmul(row(shift), of_pointwise, row(scale[1]), out=total)
            total.addcmul_(of_dense, row(scale[0]))
            if len(scale) == 3:
                total.addcmul_(inputs[piece], row(scale[2]))
            total.relu_()

        ctx.layer, ctx.pieces, ctx.keep = layer, pieces, keep
        kept = (dense if "3x3" in keep else []), (pointwise if "1x1" in keep else [])
        stats = torch.cat([stats, scale[:, None]], 1)
        ctx.save_for_backward(x, z, kernel3, kernel1, stats, *kept[0], *kept[1])
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Gradients to x, both kernels, and scale and shift of each batch norm."""
        x, z, kernel3, kernel1, stats, *kept = ctx.saved_tensors
        layer, pieces, keep, need = ctx.layer, ctx.pieces, ctx.keep, ctx.needs_input_grad[2:4]
        grad, inputs = channels_last(grads[0]), strided(x, layer)
        dense = kept[: len(pieces)] if "3x3" in keep else []
        pointwise = kept[-len(pieces) :] if "1x1" in keep else []
        # What is computed again is nobody else's, so its gradient may take its place.
        own = ("3x3" not in keep, "1x1" not in keep, False)

        sums = torch.zeros_like(stats[:, :2])
        for number, piece in enumerate(pieces):
            if own[0]:
                dense.append(conv3x3(x[piece], kernel3, layer))
            if own[1]:
                pointwise.append(conv1x1(inputs[piece], kernel1, layer))
            branches = dense[number], pointwise[number], inputs[piece]
            gated = aten.threshold_backward(grad[piece], z[piece], 0)
            for total, values, stat in zip(sums, branches, stats, strict=False):
                total += norm_sums(gated, values, stat)
        slopes = [slope_of(*pair, z) for pair in zip(sums, stats, strict=True)]
        grad1 = torch.zeros_like(kernel1)

        def gradients(piece: slice) -> tuple[Tensor, Tensor | None]:
            gated = aten.threshold_backward(grad[piece], z[piece], 0)
            branches = dense.pop(), pointwise.pop(), inputs[piece]
            to_dense, to_pointwise, *to_identity = (
                to_values(gated, values, slope, in_place)
                for values, slope, in_place in zip(branches, slopes, own, strict=False)
            )
            add_weight_grad(grad1, to_pointwise, inputs[piece], layer)
            if not need[0]:
                return to_dense, None
            to_inputs = to_identity[0] if to_identity else torch.zeros_like(inputs[piece])
            add_input_grad(to_inputs, to_pointwise, kernel1, layer)
            return to_dense, to_inputs

        grad_x, grad3 = conv3x3_backward(x, kernel3, layer, need, pieces, gradients)
        return None, None, grad_x, grad3, grad1, *sums.flatten(0, 1).unbind()


class Merged(torch.autograd.Function):
    """The 1×1 and identity branches as one matrix, from the covariance of the inputs.

    The statistics of W x + b of any linear branch follow from the mean and the covariance of x, so
    neither its output nor that of its batch norm is ever made. The inputs and the 3×3 output are
    kept. Two products of the inputs' size more than the three branches need.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: MultiBranchBlock,
        x: Tensor,
        kernel3: Tensor,
        kernel1: Tensor,
        *affine: Tensor,
    ) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉), both channels-last; `affine` as in `Fused`."""
        layer = block.layer
        inputs, dense = strided(x, layer), conv3x3(x, kernel3, layer)
        pieces = in_pieces(x, kernel3, layer)
        center, covariance = mean_and_covariance(inputs, pieces, layer)
        stats = merged_statistics(block, dense, center, covariance, kernel1)
        mean, invstd = stats.unbind(1)
        scale = torch.stack(affine[::2]) * invstd
        shift = (torch.stack(affine[1::2]) - scale * mean).sum(0)
        mixing = mixing_kernel(scale[1], kernel1, scale[2] if len(scale) == 3 else None)

        z = torch.empty_like(dense)
        for piece in pieces:
            total = z[piece]
            torch.addcmul(row(shift), dense[piece], row(scale[0]), out=total)
            add_conv1x1(total, inputs[piece], mixing, layer)
            total.relu_()
        ctx.layer = layer
        ctx.save_for_backward(
            x, z, dense, kernel3, kernel1, covariance, center, torch.cat([stats, scale[:, None]], 1)
        )
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Gradients to x, both kernels, and scale and shift of each batch norm."""
        x, z, dense, kernel3, kernel1, covariance, center, stats = ctx.saved_tensors
        layer, need = ctx.layer, ctx.needs_input_grad[1:3]
        grad, inputs = channels_last(grads[0]), strided(x, layer)
        pieces = in_pieces(x, kernel3, layer)

        sums, product = torch.zeros_like(stats[:, :2]), torch.zeros_like(kernel1)
        for piece in pieces:
            gated = aten.threshold_backward(grad[piece], z[piece], 0)
            sums[0] += norm_sums(gated, dense[piece], stats[0])
            add_weight_grad(product, gated, inputs[piece], layer)
        total = sums[0, 1]
        sums[1:, 1] = total
        product -= outer(total, center, layer)  # now of g and the centered inputs
        sums[1, 0] = stats[1, 1] * (kernel1 * product).flatten(1).sum(1)
        if len(stats) == 3:
            sums[2, 0] = stats[2, 1] * diagonal(product, layer)
        slopes = [slope_of(*pair, z) for pair in zip(sums, stats, strict=True)]
        projected = grouped(kernel1, layer) @ covariance * (z.numel() // z.shape[1])
        grad1 = column(slopes[1].grad) * product
        grad1 += column(slopes[1].values) * projected.view_as(kernel1)
        direct, crossed, constant = merged_input_grad(kernel1, slopes, layer)

        def gradients(piece: slice) -> tuple[Tensor, Tensor | None]:
            gated = aten.threshold_backward(grad[piece], z[piece], 0)
            to_dense = to_values(gated, dense[piece], slopes[0], in_place=False)
            if not need[0]:
                return to_dense, None
            to_inputs = torch.zeros_like(inputs[piece]) + row(constant)
            add_input_grad(to_inputs, gated, direct, layer)
            add_input_grad(to_inputs, inputs[piece], crossed, layer)
            return to_dense, to_inputs

        grad_x, grad3 = conv3x3_backward(x, kernel3, layer, need, pieces, gradients)
        return None, grad_x, grad3, grad1, *sums.flatten(0, 1).unbind()


# Which block takes which form


def branches(block: MultiBranchBlock, x: Tensor) -> None:
    """The branches as the modules that they are; keeps the inputs and both outputs."""
    return


def fused(block: MultiBranchBlock, x: Tensor) -> Tensor | None:
    """As "branches" in fewer passes over memory; keeps the same."""
    return _apply_fused(block, x, {"3x3", "1x1"})


def recompute_cheap(block: MultiBranchBlock, x: Tensor) -> Tensor | None:
    """As "fused", but computes the 1×1 output again; keeps the inputs and the 3×3 output.

    A 3×3 convolution of few inputs, as the stem's, is computed again too: where it costs no more
    than a 1×1 convolution from O to O channels.
    """
    per_output = 9 * block.layer.in_channels // block.layer.groups
    return _apply_fused(block, x, {"3x3"} if per_output > block.layer.out_channels else set())


def recompute_all(block: MultiBranchBlock, x: Tensor) -> Tensor | None:
    """As "fused", but computes both outputs again; keeps the inputs alone."""
    return _apply_fused(block, x, set())


def merged(block: MultiBranchBlock, x: Tensor) -> Tensor | None:
    """See `Merged`; keeps the inputs and the 3×3 output, and never makes the 1×1 output."""
    if not _suits(block, x):
        return None
    return cast(Tensor, Merged.apply(block, channels_last(x), *_kernels_and_affine(block)))


def auto(block: MultiBranchBlock, x: Tensor) -> Tensor | None:
    """The fastest by measurement: "fused" on CPUs. On GPUs, where none was measured, "branches"."""
    return fused(block, x) if type(x) is Tensor and x.device.type == "cpu" else None


IMPLEMENTATIONS: dict[str, Implementation] = {
    "auto": auto,
    "branches": branches,
    "fused": fused,
    "recompute_cheap": recompute_cheap,
    "recompute_all": recompute_all,
    "merged": merged,
}


def use_implementation(model: nn.Module, name: str = "auto") -> nn.Module:
    """Set how all multi-branch blocks of a model compute in training. Returns the model.

    Weights, names and results stay the same, up to rounding. A block that is not the paper's, is
    in eval mode, has hooks on its branches or frozen statistics, or runs under autocast or
    `torch.compile`, computes as its branches do, whatever the name.

    Args:
        model: any module; blocks are found wherever they sit.
        name: a key of `IMPLEMENTATIONS`.

    Raises:
        InputError: an unknown name.
    """
    if name not in IMPLEMENTATIONS:
        raise InputError(f"implementation={name!r}: one of {', '.join(IMPLEMENTATIONS)} needed")
    for module in model.modules():
        if isinstance(module, MultiBranchBlock):
            module.implementation = IMPLEMENTATIONS[name]
    return model


def _apply_fused(block: MultiBranchBlock, x: Tensor, keep: set[str]) -> Tensor | None:
    if not _suits(block, x):
        return None
    inputs = channels_last(x), *_kernels_and_affine(block)
    return cast(Tensor, Fused.apply(block, keep, *inputs))


def _kernels_and_affine(block: MultiBranchBlock) -> list[Tensor]:
    parts: Any = block.branches
    affine = [value for norm in norms(block) for value in (norm.weight, norm.bias)]
    return [parts.conv3x3.conv.weight, parts.conv1x1.conv.weight, *affine]


STANDARD = {"conv3x3": ConvBN, "conv1x1": ConvBN, "identity": IdentityBN}


def _suits(block: MultiBranchBlock, x: Tensor) -> bool:
    """Whether this is the block of the paper, untouched, on a tensor that the forms can take."""
    if type(x) is not Tensor or _is_transformed(x):
        return False
    names = list(STANDARD)[: 3 if block.layer.keeps_shape else 2]
    return (
        [(name, type(branch)) for name, branch in block.branches.items()]
        == [(name, STANDARD[name]) for name in names]
        and block.layer.padding_mode == "zeros"
        and type(block.activation) is nn.ReLU
        and all(map(_is_usual_norm, norms(block)))
        and all(map(_is_usual_conv, list(block.branches.values())[:2], (3, 1)))
        and not any(map(_is_hooked, [*block.branches.modules(), block.activation]))
        and not torch_module._has_any_global_hook()
        and _is_usual_batch(block, x)
    )


def _is_usual_norm(norm: nn.Module) -> bool:
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.momentum is not None
    )


def _is_usual_conv(branch: Any, size: int) -> bool:
    conv = branch.conv
    return type(conv) is nn.Conv2d and conv.kernel_size == (size, size) and conv.bias is None


def _is_hooked(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def _is_usual_batch(block: MultiBranchBlock, x: Tensor) -> bool:
    """An image batch of the block's dtype and device, with more than one value a channel."""
    if x.dim() != 4 or x.shape[1] != block.layer.in_channels:
        return False
    count, _, high, wide = x.shape
    values = count * -(-high // block.layer.stride) * -(-wide // block.layer.stride)
    tensors = [*block.parameters(), *(cast(Tensor, n.running_mean) for n in norms(block))]
    return (
        values > 1
        and x.device.type in ("cpu", "cuda")
        and x.dtype in (torch.float32, torch.float64)
        and all((t.dtype, t.device) == (x.dtype, x.device) for t in tensors)
    )


def _is_transformed(x: Tensor) -> bool:
    """Whether something else than plain eager autograd runs: it knows the modules best."""
    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )
