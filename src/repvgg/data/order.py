"""The order in which the images of a pass are seen: a pure function of (source, seed, epoch)."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

# Shards whose images are mixed with one another; so many must be at hand at a time.
WINDOW = 8


class Source(Protocol):
    """What a loader needs of its images: `Images` is one, `Scenes` another."""

    @property
    def decode(self) -> Callable[[int], Any]:
        """Index → what the transform takes, with a `width` and `height`."""
        ...

    @property
    def groups(self) -> tuple[range, ...]:
        """See `Images.groups`."""
        ...

    @property
    def fetch(self) -> Callable[[int], object] | None:
        """See `Images.fetch`."""
        ...

    def __len__(self) -> int: ...


def epoch_order(images: Source, seed: int, epoch: int) -> list[int]:
    """The index of every image once, shuffled.

    A source whose images are all at hand is shuffled as a whole. One with `groups`, of which each
    must be fetched before an image of it is read, is shuffled in two steps: the groups, and then
    the images of each window of `WINDOW` consecutive groups. So a group is needed in one stretch
    of the pass only, and every group may meet every other in some epoch.

    Args:
        images: the source.
        seed: of the run.
        epoch: number of the pass.
    """
    random = np.random.default_rng([seed, epoch])
    if not images.groups:
        return random.permutation(len(images)).tolist()
    order = random.permutation(len(images.groups))
    windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
    return [
        index
        for window in windows
        for index in random.permutation(
            np.concatenate([images.groups[group] for group in window])
        ).tolist()
    ]


def groups_in_order(images: Source, order: Sequence[int]) -> list[int]:
    """Numbers of the groups that hold the images of an order, those first that are needed first."""
    starts = [group.start for group in images.groups]
    needed, places = np.unique(np.searchsorted(starts, order, side="right") - 1, return_index=True)
    return needed[np.argsort(places)].tolist()
