"""How good a segmentation is: the figures of Table 8."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repvgg.segmentation.data import VOID


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels by class and by predicted class, (K, K) int64; `VOID` pixels are left out.

    Args:
        predicted: classes, any shape.
        labels: classes or `VOID`, the same shape.
        num_classes: K.
    """
    predicted, labels = predicted.long(), labels.long()
    counted = labels != VOID
    pairs = labels[counted] * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Shares from 0 to 1.

    Attributes:
        miou: mean of `iou` over the classes that have one.
        pixel_accuracy: pixels whose class is right, of all that have a class.
        iou: for each class its pixels that are found over those that are its or are taken for
            it; NaN for a class that is neither there nor predicted.
    """

    miou: float
    pixel_accuracy: float
    iou: tuple[float, ...]


def scores(matrix: Tensor | Sequence[Sequence[int]]) -> Scores:
    """Of a `confusion` matrix, or the sum of several. All NaN if it counts no pixel."""
    counts = torch.as_tensor(matrix).double()
    right = counts.diagonal()
    iou = right / (counts.sum(0) + counts.sum(1) - right)
    known = iou[~iou.isnan()]
    return Scores(
        miou=known.mean().item() if len(known) else math.nan,
        pixel_accuracy=(right.sum() / counts.sum()).item(),
        iou=tuple(iou.tolist()),
    )
