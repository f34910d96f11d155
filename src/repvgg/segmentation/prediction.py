"""What a PSPNet sees in image files, drawn over them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from repvgg.data.images import decode_image
from repvgg.files import written_aside
from repvgg.segmentation.data import palette
from repvgg.segmentation.evaluation import View, probabilities
from repvgg.segmentation.pspnet import PSPNet


def write_prediction(
    network: PSPNet, path: Path, target: Path, view: View, opacity: float | None
) -> None:
    """Segment an image and write it as PNG, atomically.

    Args:
        network: run at inference, whatever its mode.
        path: of the image.
        target: the PNG file.
        view: see `probabilities`.
        opacity: of the colors over the image; None for the numbers of the classes themselves.

    Raises:
        InputError: an image that cannot be decoded, a file that cannot be written.
    """
    image = decode_image(path, network.in_chans)
    device = next(network.parameters()).device
    labels = predicted(network, pil_to_tensor(image)[None].to(device), view)
    colors = palette(network.class_names, network.num_classes)
    with written_aside(target) as aside:
        if opacity is None:
            Image.fromarray(labels).save(aside)
        else:
            overlay(image.convert("RGB"), labels, colors, opacity).save(aside, optimize=True)


def predicted(network: PSPNet, image: torch.Tensor, view: View | None = None) -> np.ndarray:
    """The class of each pixel: (1, C, H, W) uint8 → (H, W) uint8."""
    return probabilities(network, image, view)[0].argmax(0).to(torch.uint8).cpu().numpy()


def overlay(
    image: Image.Image,
    labels: np.ndarray,
    colors: tuple[tuple[int, int, int], ...],
    opacity: float = 0.6,
) -> Image.Image:
    """An image with the colors of its classes over it; pixels beyond the classes stay as they are.

    Args:
        image: RGB.
        labels: (H, W) uint8.
        colors: for each class.
        opacity: from 0, the image alone, to 1, the colors alone.
    """
    pixels = np.asarray(image, dtype=np.float32)
    table = np.zeros((256, 3), np.float32)
    table[: len(colors)] = colors
    share = np.where(labels < len(colors), opacity, 0.0)[..., None]
    mixed = pixels * (1 - share) + table[labels] * share
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def legend(network: PSPNet) -> list[tuple[str, str]]:
    """Names of the classes, or their numbers, and their colors."""
    colors = palette(network.class_names, network.num_classes)
    names = network.class_names or tuple(map(str, range(network.num_classes)))
    return [(name, " ".join(map(str, color))) for name, color in zip(names, colors, strict=True)]
