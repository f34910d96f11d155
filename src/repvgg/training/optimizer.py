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
        lr=config.learning_rate,
        momentum=config.momentum,
    )


def cosine_rate(progress: float, initial: float) -> float:
    """The learning rate when a share `progress`, 0 to 1, of all steps is done; 0 at the end."""
    return initial * (1 + math.cos(math.pi * progress)) / 2
