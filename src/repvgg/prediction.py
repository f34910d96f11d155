"""What a network sees in image files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repvgg.data.images import decode_image
from repvgg.data.transforms import evaluation_transform, normalize
from repvgg.errors import InputError
from repvgg.model import RepVGG
from repvgg.verification import at_inference


@dataclass(frozen=True)
class Prediction:
    """The first classes of one image.

    Attributes:
        path: the image.
        classes: (name, probability), the most probable first; a class without name has its number.
        error: why the image could not be decoded; then there are no classes.
    """

    path: Path
    classes: tuple[tuple[str, float], ...]
    error: str = ""


def predict(
    network: RepVGG, paths: Sequence[Path], top_k: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """The most probable classes of each image, in the order of the paths.

    Args:
        network: run at inference, whatever its mode.
        paths: image files.
        top_k: classes to name, at most all of them.
        batch_size: images at a time.

    Raises:
        InputError: no classes to name.
    """
    if top_k < 1 or not network.num_classes:
        raise InputError(
            f"top_k={top_k} of {network.num_classes} classes: at least 1 of 1 is needed"
        )
    for start in range(0, len(paths), batch_size):
        yield from _predict_batch(network, paths[start : start + batch_size], top_k)


def _predict_batch(network: RepVGG, paths: Sequence[Path], top_k: int) -> Iterator[Prediction]:
    transform = evaluation_transform(network.preprocessing)
    decoded: dict[Path, Tensor] = {}
    errors: dict[Path, str] = {}
    for path in paths:
        try:
            decoded[path] = transform(decode_image(path, network.in_chans))
        except InputError as error:
            errors[path] = str(error)
    probabilities = dict(zip(decoded, _probabilities(network, list(decoded.values())), strict=True))
    for path in paths:
        if path in errors:
            yield Prediction(path, (), errors[path])
            continue
        best = probabilities[path].topk(min(top_k, network.num_classes))
        names = network.class_names or range(network.num_classes)
        yield Prediction(
            path,
            tuple(
                (str(names[i]), p) for i, p in zip(best.indices, best.values.tolist(), strict=True)
            ),
        )


@torch.no_grad()
def _probabilities(network: RepVGG, images: list[Tensor]) -> Tensor:
    if not images:
        return torch.empty(0, network.num_classes)
    like = next(network.parameters())
    batch = normalize(torch.stack(images).to(like.device), network.preprocessing)
    with at_inference(network):
        return network(batch.to(like.dtype)).float().softmax(1).cpu()
