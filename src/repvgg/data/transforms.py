"""What is done to an image before a network sees it.

Images stay 8-bit until they are a batch on the device, where `normalize` makes them floats: a
quarter of the memory between processes, and no float arithmetic in the workers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from repvgg.preprocessing import Preprocessing
from repvgg.training.config import Augmentation, TrainConfig


class Transform(Protocol):
    """What a loader does to images, in two parts."""

    def prepare(self, image: Any, /) -> Any:
        """What is the same in every epoch, of one image: a loader may keep the result."""
        ...

    def change(self, prepared: Sequence[Any], seeds: np.ndarray) -> Any:
        """What is not: prepared images → (N, C, H, W) uint8, or that and labels (N, H, W).

        Args:
            prepared: results of `prepare`, one or more.
            seeds: (N,) int64, not negative, on which every random choice for the image depends.
        """
        ...


class Once:
    """A `Transform` without random choices.

    Args:
        prepare: image → (C, H, W) uint8; or scene → that and labels (H, W) uint8.
    """

    def __init__(self, prepare: Callable[[Any], Any]):
        self.prepare = prepare

    def change(self, prepared: Sequence[Any], seeds: np.ndarray) -> Any:
        """All in one tensor."""
        return _stacked(prepared)


class Each:
    """A `Transform` that changes image after image.

    Args:
        transform: image → (C, H, W) uint8, or scene → that and labels (H, W) uint8; its random
            choices come from torch's global generator, as those of torchvision's transforms.
    """

    def __init__(self, transform: Callable[[Any], Any]):
        self.transform = transform

    def prepare(self, image: Any, /) -> Any:
        """The image as it is."""
        return image

    def change(self, prepared: Sequence[Any], seeds: np.ndarray) -> Any:
        """The global generator is afterwards as it was before."""
        changed = []
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(prepared, seeds.tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                changed.append(self.transform(image))
        return _stacked(changed)


def _stacked(items: Sequence[Any]) -> Any:
    if isinstance(items[0], Tensor):
        return torch.stack(list(items))
    return tuple(torch.stack(list(tensors)) for tensors in zip(*items, strict=True))


def evaluation_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """Resize the shorter side, crop the centre: image → (C, size, size), uint8."""
    return v2.Compose([Fit(preprocessing, preprocessing.resize_size), v2.PILToTensor()])


def training_transform(
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    max_shift: float = TrainConfig.max_shift,
) -> Transform:
    """Random changes of images: to (C, size, size), uint8.

    Args:
        preprocessing: says the size and how to resize.
        augmentation: "crop-flip": a random part, of 8 to 100 % of the area, resized, and a flip
            (paper, Sect. 4.1, as in the PyTorch example); "autoaugment-crop-flip": the same and
            then AutoAugment's policy for ImageNet (Sect. 4.1, heavyweight models); "shift-flip":
            padding, a random crop, and a flip, the usual for CIFAR;
            "shift-alternate-flip": the same with the image's own reflection as padding and without
            the flip, which `Loader(alternate_flip=True)` does; "shift": "shift-flip" without the
            flip, for images whose sides have a meaning; "none".
        max_shift: largest shift, as a share of the size; the padding.
    """
    size, interpolation = preprocessing.size, InterpolationMode(preprocessing.interpolation)
    if augmentation == "none":
        return Once(evaluation_transform(preprocessing))
    if augmentation.startswith("shift"):
        return Shift(
            preprocessing,
            max_shift,
            reflect=augmentation == "shift-alternate-flip",
            flip=augmentation == "shift-flip",
        )
    steps: list[v2.Transform] = [v2.RandomResizedCrop(size, interpolation=interpolation)]
    steps.append(v2.RandomHorizontalFlip())
    if augmentation.startswith("autoaugment"):
        steps.append(v2.AutoAugment(interpolation=interpolation))
    return Each(v2.Compose([*steps, v2.PILToTensor()]))


class Fit:
    """Resize the shorter side, crop the centre; an image that has the size stays, at no cost."""

    def __init__(self, preprocessing: Preprocessing, resize_size: int):
        self.size, self.resize_size = preprocessing.size, resize_size
        interpolation = InterpolationMode(preprocessing.interpolation)
        self.change = v2.Compose([v2.Resize(resize_size, interpolation), v2.CenterCrop(self.size)])

    def __call__(self, image: Image.Image) -> Any:
        """The image in the size."""
        fits = self.resize_size == self.size and image.size == (self.size, self.size)
        return image if fits else self.change(image)


class Shift:
    """A `Transform`: random shifts, of a whole batch at once.

    The same as torchvision's `RandomCrop` with padding and `RandomHorizontalFlip`, which take an
    image at a time: for small images that costs more than a small network.

    Args:
        preprocessing: says the size, to which images are brought first.
        max_shift: as a share of the size; at least a pixel, unless it is 0.
        reflect: whether the image's reflection is beyond its border, and not black.
        flip: whether a random half of the images is flipped from left to right.
    """

    def __init__(
        self, preprocessing: Preprocessing, max_shift: float, *, reflect: bool, flip: bool
    ):
        self.size = preprocessing.size
        self.reach = max(1, int(self.size * max_shift)) if max_shift else 0
        self.fit = Fit(preprocessing, self.size)
        self.reflect, self.flip = reflect, flip

    def prepare(self, image: Image.Image, /) -> np.ndarray:
        """The image in the size, with its border: (size + 2 reach, size + 2 reach, C)."""
        pixels = np.asarray(self.fit(image)).reshape(self.size, self.size, -1)
        border = ((self.reach, self.reach), (self.reach, self.reach), (0, 0))
        return np.pad(pixels, border, mode="reflect" if self.reflect else "constant")

    def change(self, prepared: Sequence[np.ndarray], seeds: np.ndarray) -> Tensor:
        """A part of each, in channels-last layout."""
        places = 2 * self.reach + 1
        down, right, side = seeds % places, seeds // places % places, seeds // places**2 % 2
        flipped = (side == 1) & self.flip
        parts = np.empty((len(prepared), self.size, self.size, prepared[0].shape[2]), np.uint8)
        # Row by row: one gather of all pixels takes four to twelve times as long.
        choices = zip(parts, prepared, down.tolist(), right.tolist(), flipped.tolist(), strict=True)
        for part, image, y, x, turned in choices:
            inside = image[y : y + self.size, x : x + self.size]
            part[:] = inside[:, ::-1] if turned else inside
        return torch.from_numpy(parts).permute(0, 3, 1, 2)


def normalize(
    images: Tensor, preprocessing: Preprocessing, *, channels_last: bool = True
) -> Tensor:
    """A uint8 batch (N, C, H, W) → fp32, with the mean taken out and divided by the deviation."""
    constants = torch.tensor([preprocessing.mean, preprocessing.std]).to(images.device) * 255
    mean, std = constants[:, None, :, None, None]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return ((images - mean) / std).contiguous(memory_format=layout)
