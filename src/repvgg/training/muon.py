"""Momentum whose direction is orthogonalized, for the kernels of convolutions.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, in the form that
its author trains CIFAR-10 with (cifar10-airbench, `airbench94_muon.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Of a polynomial a x + b x³ + c x⁵ that takes singular values from 0 to 1 fast to about 1; it
# trades the last digits for speed, which no optimizer needs.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(Optimizer):
    """Steps that turn a kernel, of a length in proportion to the kernel's own.

    The kernel (O, I, H, W) is seen as the matrix (O, I·H·W) of each of its groups. The gradient
    with Nesterov's momentum is replaced by the nearest matrix whose singular values are about 1, so
    all directions are learned at once, the rare ones too. With a batch norm behind it, the length
    of a kernel has no meaning, and so a rate has none unless the length is fixed: before each step
    it is made √O, which is that of the step too (of no more outputs than inputs), so that the rate
    is about the angle of a step. No weight decay is needed.

    Each branch of a block has a batch norm of its own, so that 3×3 and 1×1 kernels are treated
    alike, each by itself.

    Args:
        groups: parameter groups; their key "groups" has the groups of their convolutions, and "lr"
            the length of a step relative to the kernel.
        momentum: share of the sum of earlier gradients that a step keeps.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float):
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all kernels that have a gradient."""
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is not None:
                    self._turn(kernel, **{key: group[key] for key in ("lr", "momentum", "groups")})

    def _turn(self, kernel: nn.Parameter, lr: float, momentum: float, groups: int) -> None:
        gradient, state = kernel.grad, self.state[kernel]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        total = state["momentum_buffer"].mul_(momentum).add_(gradient)
        ahead = gradient.add(total, alpha=momentum)
        direction = orthogonalized(ahead.reshape(groups, len(kernel) // groups, -1))
        kernel.mul_(len(kernel) ** 0.5 / kernel.norm())
        kernel.sub_(direction.view(kernel.shape), alpha=lr)


def orthogonalized(matrices: Tensor) -> Tensor:
    """(…, M, N) → (…, M, N) with the same singular vectors and singular values about 1.

    By a Newton-Schulz iteration, matrix products alone. Singular values below a thousandth of the
    matrix's norm stay behind; the others end between 0.6 and 1.3.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    # Each step multiplies x by a polynomial of x xᵀ, and these commute. So the steps are taken on
    # the square x xᵀ alone, and x, nine times as wide for a 3×3 kernel, is multiplied once.
    square = x @ x.mT
    factor = polynomial = _polynomial(square)
    for _ in range(STEPS - 1):
        square = polynomial @ square @ polynomial
        polynomial = _polynomial(square)
        factor = polynomial @ factor
    x = factor @ x
    return x.mT if tall else x


def _polynomial(square: Tensor) -> Tensor:
    """By what a step multiplies a matrix x, of its square x xᵀ."""
    a, b, c = COEFFICIENTS
    result = b * square + c * square @ square
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result
