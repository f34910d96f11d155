"""Batches of images, whose every random choice is a function of (seed, epoch, sample index).

So a sample is augmented in the same way whatever the number of workers, and a run that goes on
after a stop sees what it would have seen.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repvgg.data.ahead import fetched_ahead
from repvgg.data.order import Source, epoch_order, groups_in_order
from repvgg.data.transforms import Transform
from repvgg.errors import InputError

# Fewer images than this are decoded faster than worker processes start.
WORTH_WORKERS = 5000
# A CPU that runs the network too gives this share of its cores to worker processes; on two cores
# they hold up the network more than decoding between its steps does (benchmarks/loader.py).
WORKERS_BESIDE_NETWORK = 1 / 4
# Prepared images that a process keeps, so that small ones are decoded once and not every epoch.
REMEMBERED_BYTES = 512 << 20


@dataclass(frozen=True)
class Batch:
    """What a process sees of a step.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, a class for each image; or (N, H, W) uint8, one for each pixel.
        mix: (N,) fp32, the share that each image keeps when it is mixed with its neighbour.
        broken: images that could not be decoded, and why.
    """

    images: Tensor
    labels: Tensor
    mix: Tensor
    broken: tuple[str, ...] = ()

    def pin_memory(self) -> "Batch":
        """Called by the loader where batches go to a GPU."""
        images, labels, mix = (t.pin_memory() for t in (self.images, self.labels, self.mix))
        return Batch(images, labels, mix, self.broken)


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on all of the numbers, equal everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_seeds(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """A 63-bit seed for each sample of a batch: (N,) int64 → (N,) int64.

    The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014), for a batch at once: a generator of its own for each image would
    cost more than to shift it.
    """
    steps = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = steps + np.uint64(derived_seed(seed, epoch))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


class Samples(Dataset[Any]):
    """Batches of changed images; a key is (epoch, index)."""

    def __init__(
        self,
        images: Any,
        transform: Transform,
        seed: int,
        mixup: float = 0.0,
        alternate_flip: bool = False,
        remember: bool = False,
    ):
        self.images, self.transform, self.seed, self.mixup = images, transform, seed, mixup
        self.prepared: Callable[[int], Any] = self._prepare
        if remember:
            self.prepared = Remembered(self._prepare)
        self.sides: np.ndarray | None = None
        if alternate_flip:
            self.sides = np.random.default_rng(derived_seed(seed)).integers(2, size=len(images))

    def __len__(self) -> int:
        return len(self.images)

    def _prepare(self, index: int) -> Any:
        return self.transform.prepare(self.images.decode(index))

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """All of one epoch; those that cannot be decoded are left out and named."""
        epoch, good, prepared, broken = keys[0][0], [], [], []
        for _, index in keys:
            try:
                prepared.append(self.prepared(index))
                good.append(index)
            except InputError as error:
                broken.append(str(error))
        if not good:
            return Batch(torch.empty(0), torch.empty(0), torch.empty(0), tuple(broken))
        indices = np.array(good)
        images = self.transform.change(prepared, sample_seeds(self.seed, epoch, indices))
        if isinstance(images, tuple):  # scenes: with a label for each pixel
            images, labels = images
        else:
            labels = torch.tensor([self.images.labels[index] for index in good])
        if self.sides is not None:
            turned = torch.from_numpy((self.sides[indices] + epoch) % 2 == 1)
            images = torch.where(turned[:, None, None, None], images.flip(-1), images)
        return Batch(images, labels, self._shares(epoch, good), tuple(broken))

    def _shares(self, epoch: int, indices: list[int]) -> Tensor:
        """What each image keeps when it is mixed with its neighbour."""
        if not self.mixup:
            return torch.ones(len(indices))
        generators = (np.random.default_rng([self.seed, epoch, index]) for index in indices)
        shares = [generator.beta(self.mixup, self.mixup) for generator in generators]
        return torch.tensor(shares, dtype=torch.float32)


class BatchSampler:
    """The keys of `Samples` that one process gets of each batch of a pass.

    With a seed, for training: the order of `epoch_order` is cut into batches, the same for any
    number of processes, and each process gets an equal part of each. Without, for tests: each
    process gets every size-th image in its order, none of them twice.

    Attributes:
        epoch: set before each pass.
        skip: batches to leave out at its begin, since they were seen before a stop.
    """

    def __init__(
        self, images: Source, batch_size: int, seed: int | None, rank: int = 0, size: int = 1
    ):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.size = rank, size
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(range(self.rank, len(self.images), self.size)) // self.batch_size)
        # In training a short last batch would weigh its images more, and its statistics are poor.
        return max(1, len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.seed is None:
            own = range(self.rank, len(self.images), self.size)
            for start in range(0, len(own), self.batch_size):
                yield [(self.epoch, index) for index in own[start : start + self.batch_size]]
            return
        order = self.order()
        for start in range(0, len(order), self.batch_size):
            share = min(self.batch_size, len(order) - start) // self.size
            start += self.rank * share
            yield [(self.epoch, index) for index in order[start : start + share]]

    def order(self) -> Sequence[int]:
        """The images that are still to be seen in this pass, by all processes together."""
        if self.seed is None:
            return range(len(self.images))
        order = epoch_order(self.images, self.seed, self.epoch)
        return order[self.skip * self.batch_size : len(self) * self.batch_size]


class Loader:
    """Batches of a source of images.

    Args:
        images: the source.
        transform: what is done to them.
        batch_size: images a batch; in training over all processes, else of each.
        seed: of order and augmentation; None keeps the order of the source and every last image.
        mixup: alpha of the beta distribution of `Batch.mix`; 0 makes it all ones.
        alternate_flip: flip each image from left to right in every second pass, a random half of
            them in the even ones. So two passes show both sides of all, where independent flips
            show a half of the images twice from one side (K. Jordan, "94% on CIFAR-10 in 3.29
            Seconds on a Single GPU", 2024).
        workers: processes that decode; None chooses by the cores and the number of images. With 0
            the images that fit in a bounded memory are decoded and prepared only once.
        pin_memory: whether the batches go to a GPU.
        rank, size: this training process, and how many there are.
    """

    def __init__(
        self,
        images: Any,
        transform: Transform,
        batch_size: int,
        *,
        seed: int | None = None,
        mixup: float = 0.0,
        alternate_flip: bool = False,
        workers: int | None = None,
        pin_memory: bool = False,
        rank: int = 0,
        size: int = 1,
    ):
        if workers is None:
            workers = default_workers(len(images), beside_network=not pin_memory)
        self.sampler = BatchSampler(images, batch_size, seed, rank, size)
        self._loader = DataLoader(
            Samples(images, transform, seed or 0, mixup, alternate_flip, remember=workers == 0),
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int = 0, skip: int = 0) -> Iterator[Batch]:
        """The batches of one pass, which depend on its number if there is a seed.

        Args:
            epoch: the number of the pass.
            skip: batches to leave out at its begin.
        """
        self.sampler.epoch, self.sampler.skip = epoch, skip
        batches = iter(self._loader)  # starts the workers: a process with threads should not fork
        with self._fetched_ahead():
            yield from batches

    def _fetched_ahead(self) -> AbstractContextManager[None]:
        images = self.sampler.images
        if images.fetch is None or int(os.environ.get("LOCAL_RANK", 0)) != 0:
            return nullcontext()  # the first process of a machine does it for all
        return fetched_ahead(images.fetch, groups_in_order(images, self.sampler.order()))


def default_workers(images: int, *, beside_network: bool) -> int:
    """Processes that decode for each training process, where none are asked for.

    Args:
        images: of the source.
        beside_network: whether the network runs on the same CPU.
    """
    if images < WORTH_WORKERS:
        return 0
    cores = granted_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(cores * WORKERS_BESIDE_NETWORK) if beside_network else max(1, cores - 1)


def granted_cores() -> int:
    """What this process may use, which a container or a scheduler can make less than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Remembered:
    """A function of an index that keeps its results, as long as there is room."""

    def __init__(self, prepare: Callable[[int], Any], room: int = REMEMBERED_BYTES):
        self.prepare, self.room = prepare, room
        self.kept: dict[int, Any] = {}

    def __call__(self, index: int) -> Any:
        """The prepared image of this index."""
        if (kept := self.kept.get(index)) is not None:
            return kept
        prepared = self.prepare(index)
        size = _bytes_of(prepared)
        if size <= self.room:
            self.room -= size
            self.kept[index] = prepared
        return prepared


def _bytes_of(prepared: Any) -> int:
    """What an image takes as an array, a tensor or several, or Pillow's."""
    if isinstance(prepared, tuple):
        return sum(map(_bytes_of, prepared))
    if isinstance(prepared, np.ndarray | Tensor):
        return prepared.nbytes + 512
    # Pillow's pixels, and all else of an image; the labels of a scene are a quarter more.
    return 4 * prepared.width * prepared.height + 1024


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process alone answers to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
