"""How good a network is on labelled images."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.data.images import Images
from repvgg.data.loader import Loader
from repvgg.data.transforms import Once, evaluation_transform, normalize
from repvgg.errors import InputError
from repvgg.model import RepVGG
from repvgg.training.distributed import World
from repvgg.verification import at_inference


@dataclass(frozen=True)
class Evaluation:
    """Results on all images of a source.

    Attributes:
        top1, top5: share of images whose class is the first, or among the first five.
        loss: mean cross-entropy in nats.
        predictions: (N,) int64, the first class of each image of this process, in their order.
    """

    top1: float
    top5: float
    loss: float
    predictions: Tensor


def evaluation_loader(
    network: RepVGG,
    images: Images,
    batch_size: int = 256,
    workers: int | None = None,
    world: World | None = None,
) -> Loader:
    """Batches of all images in their order, prepared as the network needs them.

    Args:
        network: says how.
        images: of which each process of the world gets its part.
        batch_size: images at a time in each process.
        workers: processes that decode.
        world: the processes that share the work; this one alone if not given.

    Raises:
        InputError: images of other channels than the network's.
    """
    if images.channels != network.in_chans:
        raise InputError(
            f"the images have {images.channels} channels, the network needs {network.in_chans}"
        )
    return Loader(
        images,
        Once(evaluation_transform(network.preprocessing)),
        batch_size,
        workers=workers,
        pin_memory=next(network.parameters()).is_cuda,
        rank=world.rank if world else 0,
        size=world.size if world else 1,
    )


def with_classes_of(network: RepVGG, images: Images) -> tuple[Images, str]:
    """The images with labels that are classes of the network, and a note on how they were matched.

    By name, where the network has names and the source no others; else by order, where there are
    equally many.

    Raises:
        InputError: neither can be done.
    """
    theirs, ours = images.class_names, network.class_names or ()
    if set(theirs) <= set(ours):
        labels = [ours.index(name) for name in theirs]
        return dataclasses.replace(images, labels=[labels[i] for i in images.labels]), ""
    if len(theirs) != network.num_classes:
        strangers = [name for name in theirs if name not in ours]
        also = f", and does not know {', '.join(strangers[:3])}" if ours else ""
        raise InputError(
            f"the images have {len(theirs)} classes, the network {network.num_classes}{also}"
        )
    note = f"classes matched by order: {theirs[0]} is {ours[0]}, …" if ours else ""
    return images, note


@torch.inference_mode()
def evaluate(
    network: RepVGG, loader: Loader, progress: Any = iter, world: World | None = None
) -> Evaluation:
    """Run the network at inference, whatever its mode, over an `evaluation_loader`.

    Args:
        network: training-time or plain.
        loader: whose labels are classes of the network, see `with_classes_of`.
        progress: wraps the iterator over the batches, to show how far it is.
        world: the processes that share the images of the loader; all must call this.

    Raises:
        InputError: an image that cannot be decoded, since the result would be of other images.
    """
    like = next(network.parameters())
    top1 = top5 = count = 0
    loss, predictions = 0.0, []
    with at_inference(network):
        for batch in progress(loader.epoch()):
            if batch.broken:
                raise InputError(batch.broken[0])
            images = normalize(batch.images.to(like.device), network.preprocessing).to(like.dtype)
            logits = network(images).double().cpu()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == batch.labels[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(1).sum())
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
            count += len(batch.labels)
            predictions.append(best[:, 0])
    if world:
        top1, top5, loss, count = world.sum(top1, top5, loss, count)
    return Evaluation(top1 / count, top5 / count, loss / count, torch.cat(predictions))
