"""Batches of images, whose every random choice is a function of (seed, epoch, sample index).

So a sample is augmented in the same way whatever the number of workers, and a run that goes on
after a stop sees what it would have seen.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repvgg.data.images import Images
from repvgg.data.transforms import Transform
from repvgg.errors import InputError

# Fewer images than this are decoded faster than worker processes start.
WORTH_WORKERS = 5000


@dataclass(frozen=True)
class Batch:
    """Images (N, C, H, W) uint8, labels (N,) int64, and what could not be decoded and why."""

    images: Tensor
    labels: Tensor
    broken: tuple[str, ...] = ()

    def pin_memory(self) -> "Batch":
        """Called by the loader where batches go to a GPU."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.broken)


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on all of the numbers, equal everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Samples(Dataset[Any]):
    """Transformed images; a key is (epoch, index)."""

    def __init__(self, images: Images, transform: Transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | InputError:
        """The image (C, H, W) and its label, or why it cannot be decoded."""
        epoch, index = key
        try:
            image = self.images.decode(index)
        except InputError as error:
            return error
        # torchvision's transforms draw from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed(self.seed, epoch, index))
            return self.transform(image), self.images.labels[index]


class BatchSampler:
    """The keys of `Samples` for each batch of a pass.

    Their order is a permutation that depends on (seed, epoch), or, without seed, that of the
    source.

    Attributes:
        epoch: set before each pass.
    """

    def __init__(self, size: int, batch_size: int, seed: int | None):
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def __len__(self) -> int:
        # In training a short last batch would weigh its images more, and its statistics are poor.
        drops_last = self.seed is not None and self.size > self.batch_size
        return self.size // self.batch_size if drops_last else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = range(self.size)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist()
        for batch in range(len(self)):
            start = batch * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]


class Loader:
    """Batches of a source of images.

    Args:
        images: the source.
        transform: image → (C, H, W) uint8.
        batch_size: images a batch.
        seed: of order and augmentation; None keeps the order of the source and every last image.
        workers: processes that decode; None chooses by the processors and the number of images.
        pin_memory: whether the batches go to a GPU.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        batch_size: int,
        *,
        seed: int | None = None,
        workers: int | None = None,
        pin_memory: bool = False,
    ):
        if workers is None:
            workers = 0 if len(images) < WORTH_WORKERS else max(1, (os.cpu_count() or 2) - 1)
        self.sampler = BatchSampler(len(images), batch_size, seed)
        self._loader = DataLoader(
            Samples(images, transform, seed or 0),
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one pass, which depend on the number of the pass if there is a seed."""
        self.sampler.epoch = epoch
        return iter(self._loader)


def _collate(items: list[tuple[Tensor, int] | InputError]) -> Batch:
    good = [item for item in items if not isinstance(item, InputError)]
    broken = tuple(str(item) for item in items if isinstance(item, InputError))
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return Batch(images, torch.tensor([label for _, label in good], dtype=torch.int64), broken)
