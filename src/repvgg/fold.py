"""Re-parameterization of tensors (paper, Sect. 3.3, Eq. 1–4, Fig. 4).

Pure, differentiable functions. They compute in the dtype that they are given; conversion gives
them fp64 and casts the result back.

Axes: O output channels, I input channels of one group, H and W of the kernel.
"""

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.errors import InputError


def fold_batch_norm(
    kernel: Tensor,
    bias: Tensor | None,
    *,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the convolution equal to a convolution and then a batch norm (Eq. 3).

    Args:
        kernel: (O, I, H, W), or any shape that begins with O.
        bias: (O,) of the convolution, if it has one.
        mean, var: (O,), the accumulated statistics.
        gamma, beta: (O,), scale and shift; `None` means 1 and 0.
        eps: what the batch norm adds to the variance.

    Returns:
        Kernel of the shape of `kernel`, bias (O,).
    """
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale if bias is None else (bias - mean) * scale
    if beta is not None:
        shift = shift + beta
    return kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1)), shift


def identity_kernel(channels: int, groups: int = 1, *, like: Tensor | None = None) -> Tensor:
    """The (O, I, 1, 1) kernel of the 1×1 convolution that changes nothing; dtype of `like`."""
    per_group = channels // groups
    kernel = torch.eye(per_group) if like is None else torch.eye(per_group).to(like)
    return kernel.repeat(groups, 1)[:, :, None, None]


def pad_to_3x3(kernel: Tensor) -> Tensor:
    """Zero-pad a (O, I, H, W) kernel, H and W being 1 or 3, to (O, I, 3, 3) around its centre.

    Raises:
        InputError: another extent.
    """
    height, width = kernel.shape[-2:]
    if height not in (1, 3) or width not in (1, 3):
        raise InputError(f"kernel of {height}×{width}: only extents of 1 and 3 fit into 3×3")
    rows, columns = (3 - height) // 2, (3 - width) // 2
    return F.pad(kernel, (columns, columns, rows, rows))


def fold_conv_and_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`fold_batch_norm` of two modules, in fp64: kernel (O, I, H, W) and bias (O,).

    Raises:
        InputError: `norm` keeps no running statistics, so that it is not linear.
    """
    return fold_batch_norm(to_fp64(conv.weight), to_fp64(conv.bias), **norm_constants(norm))


def fold_norm(norm: nn.Module, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A batch norm alone as a 1×1 convolution, in fp64: kernel (O, I, 1, 1) and bias (O,).

    Raises:
        InputError: `norm` keeps no running statistics, so that it is not linear.
    """
    constants = norm_constants(norm)
    mean = constants["mean"]
    kernel = identity_kernel(mean.numel(), groups, like=mean)
    return fold_batch_norm(kernel, None, **constants)


def norm_constants(norm: Any) -> dict[str, Any]:
    """What `fold_batch_norm` needs of a batch norm, in fp64.

    Raises:
        InputError: `norm` keeps no running statistics, so that it is not linear.
    """
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise InputError(
            f"{type(norm).__name__} has no running mean and variance (with "
            "track_running_stats=False it uses the statistics of each batch at inference too)"
        )
    return {
        "mean": to_fp64(mean),
        "var": to_fp64(var),
        "gamma": to_fp64(norm.weight),
        "beta": to_fp64(norm.bias),
        "eps": norm.eps,
    }


@overload
def to_fp64(tensor: Tensor) -> Tensor: ...
@overload
def to_fp64(tensor: None) -> None: ...
def to_fp64(tensor: Tensor | None) -> Tensor | None:
    """The tensor in fp64, on the CPU if its own device (Apple's GPU) has no fp64."""
    if tensor is None:
        return None
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
