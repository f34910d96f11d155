"""Stochastic gradient descent and its schedule, as in the paper (Sect. 4.1)."""

import math

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from repvgg.training.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with momentum; weight decay on the kernels of conv and linear layers only."""
    kernels = {
        id(module.weight) for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)
    }
    decayed = [p for p in model.parameters() if id(p) in kernels]
    others = [p for p in model.parameters() if id(p) not in kernels]
    return torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.scaled_learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


def learning_rate(config: TrainConfig, epochs_done: float) -> float:
    """The rate of the step that begins after so many epochs, whole ones and parts.

    It rises in proportion over the warm-up, and falls to 0 over the rest, linearly or along half a
    cosine.
    """
    if epochs_done < config.warmup_epochs:
        return config.scaled_learning_rate * epochs_done / config.warmup_epochs
    falling = max(config.epochs - config.warmup_epochs, 1e-12)
    progress = min(1.0, (epochs_done - config.warmup_epochs) / falling)
    if config.schedule == "linear":
        return config.scaled_learning_rate * (1 - progress)
    return config.scaled_learning_rate * (1 + math.cos(math.pi * progress)) / 2
