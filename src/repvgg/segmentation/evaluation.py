"""Segmentation of images of any size: whole, by a window that slides, at several scales, flipped.

Axes: N images, K classes, H and W.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.data.loader import Loader
from repvgg.data.transforms import Once, normalize
from repvgg.errors import InputError
from repvgg.segmentation.data import VOID, Scenes
from repvgg.segmentation.metrics import Scores, confusion, scores
from repvgg.segmentation.pspnet import PSPNet
from repvgg.segmentation.transforms import evaluation_transform
from repvgg.training.distributed import World
from repvgg.verification import at_inference

# Of two neighbouring windows, as in the official PSPNet.
OVERLAP = 1 / 3


@dataclass(frozen=True)
class View:
    """How a network looks at an image; the probabilities of all looks are averaged.

    Attributes:
        window: side in pixels of a square that slides over the image, by two thirds of itself; 0
            for the whole image at once.
        scales: factors of height and width.
        flip: also from left to right.

    Raises:
        InputError: naming the field.
    """

    window: int = 0
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.window < 0:
            raise InputError(f"window: 0 or a number of pixels needed, found {self.window}")
        if not self.scales or not all(0 < scale <= 16 for scale in self.scales):
            raise InputError(f"scales: numbers above 0, at most 16, needed, found {self.scales}")


@torch.inference_mode()
def probabilities(network: PSPNet, images: Tensor, view: View | None = None) -> Tensor:
    """Of each class at each pixel: (N, C, H, W) uint8 → (N, K, H, W), at inference.

    Args:
        network: run at inference, whatever its mode; on the device of the images.
        images: of one size.
        view: the whole image at its own scale, if not given.
    """
    view = view or View()
    x = normalize(images, network.preprocessing).to(next(network.parameters()).dtype)
    total = x.new_zeros(())
    with at_inference(network):
        for scale in view.scales:
            scaled = x if scale == 1 else _resized(x, _scaled_size(x, scale))
            found = _windows(network, scaled, view.window)
            if view.flip:
                found = (found + _windows(network, scaled.flip(-1), view.window).flip(-1)) / 2
            if scale != 1:
                found = _resized(found, (x.shape[-2], x.shape[-1]))
            total = total + found
    return total / len(view.scales)


def _scaled_size(x: Tensor, scale: float) -> tuple[int, int]:
    return max(1, round(x.shape[-2] * scale)), max(1, round(x.shape[-1] * scale))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _windows(network: PSPNet, x: Tensor, window: int) -> Tensor:
    """Probabilities (N, K, H, W): of the whole, or the mean over all windows on a pixel."""
    height, width = x.shape[-2:]
    if not window:
        return network(x).softmax(1)
    # After normalization the mean color, with which a small image is filled up, is 0.
    x = F.pad(x, (0, max(0, window - width), 0, max(0, window - height)))
    total = x.new_zeros(len(x), network.num_classes, *x.shape[-2:])
    count = x.new_zeros(x.shape[-2:])
    for top in starts(x.shape[-2], window):
        for left in starts(x.shape[-1], window):
            there = (..., slice(top, top + window), slice(left, left + window))
            total[there] += network(x[there]).softmax(1)
            count[there] += 1
    return (total / count)[..., :height, :width]


def starts(extent: int, window: int) -> list[int]:
    """Where windows begin that cover an extent, evenly and with at least `OVERLAP`."""
    if extent <= window:
        return [0]
    step = max(1, int(window * (1 - OVERLAP)))
    count = -(-(extent - window) // step) + 1
    return [round(index * (extent - window) / (count - 1)) for index in range(count)]


@dataclass(frozen=True)
class Evaluation(Scores):
    """`Scores` on scenes, and the mean cross-entropy of a pixel in nats."""

    loss: float = 0.0


def evaluation_loader(
    scenes: Scenes, workers: int | None = None, world: World | None = None
) -> Loader:
    """Scenes one by one, since their sizes may differ, as they are; a share for each process."""
    return Loader(
        scenes,
        Once(evaluation_transform),
        1,
        workers=workers,
        rank=world.rank if world else 0,
        size=world.size if world else 1,
    )


@torch.inference_mode()
def evaluate(
    network: PSPNet,
    loader: Loader,
    view: View | None = None,
    progress: Any = iter,
    world: World | None = None,
) -> Evaluation:
    """Run the network at inference, whatever its mode, over an `evaluation_loader`.

    Args:
        network: training-time or plain.
        loader: whose labels are classes of the network.
        view: see `probabilities`.
        progress: wraps the iterator over the scenes, to show how far it is.
        world: the processes that share the scenes of the loader; all must call this.

    Raises:
        InputError: a scene that cannot be decoded, or no pixel that has a class.
    """
    device = next(network.parameters()).device
    classes = network.num_classes
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    loss = 0.0
    for batch in progress(loader.epoch()):
        if batch.broken:
            raise InputError(batch.broken[0])
        labels = batch.labels.long().to(device)
        found = probabilities(network, batch.images.to(device), view)
        matrix += confusion(found.argmax(1), labels, classes).cpu()
        loss += F.nll_loss(
            found.float().clamp(min=1e-12).log(), labels, ignore_index=VOID, reduction="sum"
        ).item()
    if world:
        loss, *cells = world.sum(loss, *matrix.flatten().tolist())
        matrix = torch.tensor(cells, dtype=torch.float64).reshape(classes, classes)
    if not (pixels := matrix.sum().item()):
        raise InputError("no pixel of these scenes has a class")
    result = scores(matrix)
    return Evaluation(result.miou, result.pixel_accuracy, result.iou, loss / pixels)
