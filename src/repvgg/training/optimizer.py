"""Stochastic gradient descent and its schedule, as in the paper (Sect. 4.1), and what we added."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from repvgg.training.config import RunConfig
from repvgg.training.muon import Muon

# Of the schedule "poly" (Sect. 4.3, as in the official PSPNet).
POLY_POWER = 0.9


def build_optimizers(
    model: nn.Module, config: RunConfig, faster: Sequence[nn.Module] = (), factor: float = 1.0
) -> list[Optimizer]:
    """SGD with momentum; weight decay on the kernels of conv and linear layers only.

    With `optimizer="muon"` a second one takes the kernels of the convolutions but for those with a
    bias, which make logits: without a batch norm behind it the length of a kernel counts, and Muon
    fixes it. Parameters that need no gradient are left out. Each group has its highest rate as
    "initial_lr", see `set_rates`.

    Args:
        model: whose parameters are trained.
        config: of the run.
        faster: parts of the model that learn at `factor` times the rate of SGD.
        factor: see `faster`.
    """
    modules = list(model.modules())
    convs = [m for m in modules if isinstance(m, _ConvNd) and m.weight.requires_grad]
    turned = [conv for conv in convs if config.optimizer == "muon" and conv.bias is None]
    decayed = [m.weight for m in modules if isinstance(m, nn.Linear)]
    decayed += [conv.weight for conv in convs if conv not in turned]
    shifts = [m.bias for m in modules if isinstance(m, _BatchNorm | nn.Linear)]
    if config.bias_rate == 1:
        shifts = []
    elsewhere = {id(p) for p in (*decayed, *shifts, *(conv.weight for conv in convs))}
    others = [p for p in model.parameters() if id(p) not in elsewhere]
    rate = config.scaled_learning_rate
    fast = {id(p) for part in faster for p in part.parameters()}
    groups = []
    for is_fast in (False, True) if fast else (False,):
        highest = rate * (factor if is_fast else 1)
        of_kind = [
            [p for p in kind if p is not None and (id(p) in fast) == is_fast]
            for kind in (decayed, others, shifts)
        ]
        groups += [
            _group(of_kind[0], highest, weight_decay=config.weight_decay),
            _group(of_kind[1], highest),
            _group(of_kind[2], highest * config.bias_rate),
        ]
    optimizers: list[Optimizer] = [
        torch.optim.SGD(
            [group for group in groups if group["params"]],
            momentum=config.momentum,
            nesterov=config.nesterov,
        )
    ]
    if turned:
        counts = sorted({conv.groups for conv in turned})
        groups = [
            _group((c.weight for c in turned if c.groups == n), config.muon_rate, groups=n)
            for n in counts
        ]
        optimizers.append(Muon(groups, momentum=config.momentum))
    return optimizers


def _group(parameters: Iterable[Any], rate: float, **options: float) -> dict[str, Any]:
    learned = [p for p in parameters if p is not None and p.requires_grad]
    return {"params": learned, "lr": rate, "initial_lr": rate, **options}


def set_rates(optimizers: Iterable[Optimizer], share: float) -> None:
    """Set the rate of every group to this share of its highest."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]


def schedule(config: RunConfig, epochs_done: float) -> float:
    """The share of its highest rate that a step has after so many epochs, whole ones and parts.

    It rises in proportion over the warm-up, and falls to 0 over the rest: linearly, along half a
    cosine, or in proportion to a power of what is still to be done.
    """
    if epochs_done < config.warmup_epochs:
        return epochs_done / config.warmup_epochs
    falling = max(config.epochs - config.warmup_epochs, 1e-12)
    progress = min(1.0, (epochs_done - config.warmup_epochs) / falling)
    if config.schedule != "cosine":
        return (1 - progress) ** (POLY_POWER if config.schedule == "poly" else 1)
    return (1 + math.cos(math.pi * progress)) / 2
