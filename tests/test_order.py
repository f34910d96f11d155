"""The order of a pass."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from repvgg.data.images import Images
from repvgg.data.order import WINDOW, epoch_order, groups_in_order


def images_in(sizes, grouped=True):
    bounds = np.cumsum([0, *sizes]).tolist()
    groups = tuple(range(bounds[i], bounds[i + 1]) for i in range(len(sizes))) if grouped else ()
    return Images([""] * bounds[-1], [0] * bounds[-1], ("a",), 3, lambda index: None, groups)  # pyright: ignore


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=40)
numbers = st.integers(0, 2**40)


@given(sizes, numbers, numbers)
def test_an_order_is_a_permutation_that_keeps_to_a_window_of_shards(sizes, seed, epoch):
    images = images_in(sizes)
    order = epoch_order(images, seed, epoch)
    assert sorted(order) == list(range(len(images)))
    assert order == epoch_order(images, seed, epoch)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    visited = shard_of[order]
    begin = {shard: np.flatnonzero(visited == shard)[0] for shard in range(len(sizes))}
    end = {shard: np.flatnonzero(visited == shard)[-1] for shard in range(len(sizes))}
    for place in range(len(order)):
        assert sum(begin[shard] <= place <= end[shard] for shard in begin) <= WINDOW


@given(sizes.filter(lambda sizes: sum(sizes) >= 30), numbers, numbers)
def test_an_order_depends_on_seed_and_epoch(sizes, seed, epoch):
    for images in (images_in(sizes), images_in(sizes, grouped=False)):
        order = epoch_order(images, seed, epoch)
        assert order != epoch_order(images, seed + 1, epoch)
        assert order != epoch_order(images, seed, epoch + 1)


def test_without_groups_the_order_is_one_permutation_of_all():
    order = epoch_order(images_in([500, 500], grouped=False), 3, 4)
    assert order == np.random.default_rng([3, 4]).permutation(1000).tolist()


def test_shards_change_their_place_and_their_neighbours_from_pass_to_pass():
    images = images_in([4] * (3 * WINDOW))
    shard_of = np.repeat(np.arange(3 * WINDOW), 4)
    first = [frozenset(shard_of[epoch_order(images, 0, e)[: 4 * WINDOW]]) for e in range(30)]
    assert len(set(first)) == 30
    assert set.union(*map(set, first)) == set(range(3 * WINDOW))


@given(sizes, numbers, st.data())
def test_groups_come_in_the_order_in_which_they_are_first_needed(sizes, seed, data):
    images = images_in(sizes)
    order = epoch_order(images, seed, 0)[data.draw(st.integers(0, sum(sizes))) :]
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    assert groups_in_order(images, order) == list(dict.fromkeys(group_of[order].tolist()))
