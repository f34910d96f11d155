"""Stochastic gradient descent and its schedule, as in the paper (Sect. 4.1)."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from repvgg.training.config import RunConfig

# Of the schedule "poly" (Sect. 4.3, as in the official PSPNet).
POLY_POWER = 0.9


def build_optimizer(
    model: nn.Module, config: RunConfig, faster: Sequence[nn.Module] = (), factor: float = 1.0
) -> torch.optim.SGD:
    """SGD with momentum; weight decay on the kernels of conv and linear layers only.

    Args:
        model: whose parameters are trained.
        config: of the run.
        faster: parts of the model that learn at `factor` times the rate, which is the entry
            "factor" of their groups.
        factor: see `faster`.
    """
    kernels = {
        id(module.weight) for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)
    }
    fast = {id(parameter) for module in faster for parameter in module.parameters()}
    groups = [
        {
            "params": [p for p in model.parameters() if (id(p) in fast, id(p) in kernels) == kind],
            "weight_decay": config.weight_decay if kind[1] else 0.0,
            "factor": factor if kind[0] else 1.0,
        }
        for kind in ((False, True), (False, False), (True, True), (True, False))
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.scaled_learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


def learning_rate(config: RunConfig, epochs_done: float) -> float:
    """The rate of the step that begins after so many epochs, whole ones and parts.

    It rises in proportion over the warm-up, and falls to 0 over the rest: linearly, along half a
    cosine, or in proportion to a power of what is still to be done.
    """
    if epochs_done < config.warmup_epochs:
        return config.scaled_learning_rate * epochs_done / config.warmup_epochs
    falling = max(config.epochs - config.warmup_epochs, 1e-12)
    progress = min(1.0, (epochs_done - config.warmup_epochs) / falling)
    if config.schedule != "cosine":
        power = POLY_POWER if config.schedule == "poly" else 1
        return config.scaled_learning_rate * (1 - progress) ** power
    return config.scaled_learning_rate * (1 + math.cos(math.pi * progress)) / 2
