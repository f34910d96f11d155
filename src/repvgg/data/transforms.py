"""What is done to an image before a network sees it.

Images stay 8-bit until they are a batch on the device, where `normalize` makes them floats: a
quarter of the memory between processes, and no float arithmetic in the workers.
"""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from repvgg.preprocessing import Preprocessing
from repvgg.training.config import Augmentation

Transform = Callable[[Image.Image], Tensor]


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Resize the shorter side, crop the centre: image → (C, size, size), uint8."""
    return v2.Compose(
        [
            v2.Resize(preprocessing.resize_size, InterpolationMode(preprocessing.interpolation)),
            v2.CenterCrop(preprocessing.size),
            v2.PILToTensor(),
        ]
    )


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
    alternate = augmentation == "shift-alternate-flip"
    if augmentation.endswith("crop-flip"):
        steps: list[v2.Transform] = [v2.RandomResizedCrop(size, interpolation=interpolation)]
    else:
        steps = [
            v2.Resize(size, interpolation),
            v2.CenterCrop(size),
            v2.RandomCrop(
                size,
                # At most what there is to reflect.
                padding=min(max(1, size // 8), size - 1) if alternate else max(1, size // 8),
                padding_mode="reflect" if alternate else "constant",
            ),
        ]
    if augmentation.endswith("flip") and not alternate:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.startswith("autoaugment"):
        steps.append(v2.AutoAugment(interpolation=interpolation))
    return v2.Compose([*steps, v2.PILToTensor()])


def normalize(
    images: Tensor, preprocessing: Preprocessing, *, channels_last: bool = True
) -> Tensor:
    """A uint8 batch (N, C, H, W) → fp32, with the mean taken out and divided by the deviation."""
    constants = torch.tensor([preprocessing.mean, preprocessing.std]).to(images.device) * 255
    mean, std = constants[:, None, :, None, None]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return ((images - mean) / std).contiguous(memory_format=layout)
