"""What a run trains: the loop knows a task by this interface alone."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from repvgg.data.loader import Loader
from repvgg.data.transforms import normalize
from repvgg.preprocessing import Preprocessing
from repvgg.training.config import RunConfig
from repvgg.training.distributed import World


class Task(Protocol):
    """A network, its data, the loss of a step, and the test after an epoch.

    Attributes:
        network: what is tested and kept, on its device, before the first step; its weights depend
            on the config and the data alone.
        trained: what the steps train: the network, perhaps in what it trains with alone.
        faster: its parts that learn at `factor` times the rate.
        factor: see `faster`.
        images: how many there are to train on.
        loader: this process's part of the batches.
        hits: what the share of right answers in training is called in the history.
        score: the result of `test` that is best where it is highest.
    """

    network: Any
    trained: Any
    faster: Sequence[nn.Module]
    factor: float
    images: int
    loader: Loader
    hits: str
    score: str

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, mix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean loss of a part of a batch, and how many of its answers are right, in images.

        Args:
            model: what computes the step: `trained`, perhaps wrapped.
            images: (N, C, H, W) uint8.
            labels: whatever the loader gives.
            mix: (N,), see `Batch`.
        """
        ...

    def test(self, network: Any) -> dict[str, float]:
        """Results on the images to test on, over all processes, which all must call it.

        Args:
            network: this task's, as it is after an epoch, folded where that can be done.
        """
        ...


# Makes the task of a config; the data and config that cannot be used raise an `InputError`.
TaskFactory = Callable[[Any, World], Task]


def prepared(
    images: Tensor, network: nn.Module, preprocessing: Preprocessing, config: RunConfig
) -> Tensor:
    """A uint8 batch as the network takes it in training."""
    x = normalize(images, preprocessing, channels_last=config.channels_last)
    return x.to(next(network.parameters()).dtype)


def in_precision(model: nn.Module, x: Tensor, config: RunConfig) -> Any:
    """What the model computes, its convolutions in the precision of the config."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.precision)
    with torch.autocast(x.device.type, half, enabled=half is not None):
        return model(x)


def at_least_fp32(logits: Tensor) -> Tensor:
    """Logits in which a loss can be computed."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
