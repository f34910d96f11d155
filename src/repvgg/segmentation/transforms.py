"""What is done to a scene before a network sees it: to its image and label map alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from repvgg.preprocessing import Preprocessing
from repvgg.segmentation.data import VOID, Scene

SceneTransform = Callable[[Scene], tuple[Tensor, Tensor]]

# Of the blur of the official PSPNet: OpenCV's for a kernel of 5 pixels.
BLUR_SIGMA = 1.1


def evaluation_transform(scene: Scene) -> tuple[Tensor, Tensor]:
    """As it is: image (3, H, W) uint8, labels (H, W) uint8."""
    return F.pil_to_tensor(scene.image), F.pil_to_tensor(scene.labels)[0]


def training_transform(
    preprocessing: Preprocessing,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    rotate: float = 10.0,
    blur: bool = True,
    flip: bool = True,
) -> SceneTransform:
    """Random changes of a scene: image (3, S, S) uint8, labels (S, S) uint8.

    As in the official PSPNet: scaled; in half of the cases rotated, in half blurred, in half
    flipped; then a part of S × S pixels. Where there is no image, it is filled with the mean color
    and the labels with `VOID`.

    Args:
        preprocessing: says S and the mean.
        scale: lowest and highest factor of height and width.
        rotate: by up to so many degrees; 0 for never.
        blur, flip: whether to.
    """
    fill: dict[Any, Any] = {
        tv_tensors.Image: [round(255 * value) for value in preprocessing.mean],
        tv_tensors.Mask: VOID,
    }
    steps: list[Any] = []
    if scale != (1, 1):
        steps.append(RandomScale(*scale))
    if rotate:
        rotation = v2.RandomRotation(  # pyright: ignore[reportArgumentType]
            (-rotate, rotate), InterpolationMode.BILINEAR, fill=fill
        )
        steps.append(v2.RandomApply([rotation], p=0.5))
    if blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(5, BLUR_SIGMA)], p=0.5))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    steps.append(v2.RandomCrop(preprocessing.size, pad_if_needed=True, fill=fill))
    changed = v2.Compose(steps)

    def transform(scene: Scene) -> tuple[Tensor, Tensor]:
        image, labels = evaluation_transform(scene)
        image, labels = changed(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    return transform


class RandomScale(v2.Transform):
    """Height and width times one factor, drawn evenly from `low` to `high`."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The new height and width."""
        factor = torch.empty(()).uniform_(self.low, self.high).item()
        height, width = flat_inputs[0].shape[-2:]
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Bilinear on an image, the nearest label on a label map."""
        return self._call_kernel(F.resize, inpt, **params, antialias=True)
