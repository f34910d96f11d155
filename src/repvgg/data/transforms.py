"""What is done to an image before a network sees it.

Images stay 8-bit until they are a batch on the device, where `normalize` makes them floats: a
quarter of the memory between processes, and no float arithmetic in the workers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from repvgg.preprocessing import Preprocessing
from repvgg.training.config import Augmentation

Transform = Callable[[Image.Image], Tensor]


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Resize the shorter side, crop the centre: image → (C, size, size), uint8."""
    return v2.Compose([Fit(preprocessing, preprocessing.resize_size), v2.PILToTensor()])


def training_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Transform:
    """Random changes of an image: image → (C, size, size), uint8.

    Args:
        preprocessing: says the size and how to resize.
        augmentation: "crop-flip": a random part, of 8 to 100 % of the area, resized, and a flip
            (paper, Sect. 4.1, as in the PyTorch example); "autoaugment-crop-flip": the same and
            then AutoAugment's policy for ImageNet (Sect. 4.1, heavyweight models); "shift-flip":
            1/8 of the size as padding, a random crop, and a flip, the usual for CIFAR;
            "shift-alternate-flip": the same with the image's own reflection as padding and without
            the flip, which `Loader(alternate_flip=True)` does; "shift": "shift-flip" without the
            flip, for images whose sides have a meaning; "none".
    """
    size, interpolation = preprocessing.size, InterpolationMode(preprocessing.interpolation)
    if augmentation == "none":
        return evaluation_transform(preprocessing)
    if augmentation.startswith("shift"):
        shift = Shift(
            size,
            reflect=augmentation == "shift-alternate-flip",
            flip=augmentation == "shift-flip",
        )
        return v2.Compose([Fit(preprocessing, size), shift])
    steps: list[v2.Transform] = [v2.RandomResizedCrop(size, interpolation=interpolation)]
    steps.append(v2.RandomHorizontalFlip())
    if augmentation.startswith("autoaugment"):
        steps.append(v2.AutoAugment(interpolation=interpolation))
    return v2.Compose([*steps, v2.PILToTensor()])


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
    """A shift by up to 1/8 of the size: image of that size → (C, size, size), uint8.

    The same as torchvision's `RandomCrop` with padding and `RandomHorizontalFlip`, which take
    several times as long for small images, and on few cores stand between the steps of a network.

    Args:
        size: of the square image, pixels.
        reflect: whether the image's reflection is beyond its border, and not black.
        flip: whether a random half of the images is flipped from left to right.
    """

    def __init__(self, size: int, *, reflect: bool, flip: bool):
        self.size, self.reach, self.flip = size, max(1, size // 8), flip
        # Where each row and column of the larger image comes from; the last one is black.
        places, pad = np.arange(size), self.reach
        self.places = (
            np.pad(places, pad, mode="reflect")
            if reflect
            else np.pad(places, pad, constant_values=size)
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """The image, shifted."""
        pixels = np.asarray(image).reshape(self.size, self.size, -1)
        padded = np.zeros((self.size + 1, self.size + 1, pixels.shape[2]), np.uint8)
        padded[:-1, :-1] = pixels
        down, right, side = torch.randint(0, 1 << 30, (3,)).tolist()
        rows, columns = (self._seen(offset) for offset in (down, right))
        if self.flip and side % 2:
            columns = columns[::-1]
        return torch.from_numpy(padded.transpose(2, 0, 1)[:, rows[:, None], columns])

    def _seen(self, offset: int) -> np.ndarray:
        start = offset % (2 * self.reach + 1)
        return self.places[start : start + self.size]


def normalize(
    images: Tensor, preprocessing: Preprocessing, *, channels_last: bool = True
) -> Tensor:
    """A uint8 batch (N, C, H, W) → fp32, with the mean taken out and divided by the deviation."""
    constants = torch.tensor([preprocessing.mean, preprocessing.std]).to(images.device) * 255
    mean, std = constants[:, None, :, None, None]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return ((images - mean) / std).contiguous(memory_format=layout)
