"""What many processes agree on, tested with threads on a store of torch."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from repvgg.errors import InputError
from repvgg.training.distributed import _of_this_start, joined


def started(store, size):
    """What each process of a start writes and then reads from its neighbour."""

    def one(rank):
        own = _of_this_start(store, rank, size)
        stale = own.check(["written by 0"]) if rank == 0 else False
        own.set(f"written by {rank}", str(rank))
        return stale, own.get(f"written by {(rank + 1) % size}").decode()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_start_sees_nothing_of_those_before_it_on_the_same_store(size):
    store = HashStore()
    store.set_timeout(timedelta(seconds=60))
    for _ in range(3):
        expected = [(False, str((rank + 1) % size)) for rank in range(size)]
        assert started(store, size) == expected


def test_processes_that_never_come_are_named():
    store = HashStore()
    store.set("name of 1", "of a process that died")
    with pytest.raises(InputError, match=r"3 processes needed, those of rank \[1, 2\] never came"):
        _of_this_start(store, 0, 3, patience=timedelta(seconds=0.5))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK .*found nothing; start the processes with torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE .*a number from 1 on needed, found 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE .*a number from 1 on needed, found '0'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK .*below WORLD_SIZE 2 needed, found 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29500"}, "MASTER_ADDR .*found nothing"),
    ],
)
def test_what_torchrun_would_have_set_is_named(monkeypatch, environment, message):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), joined(torch.device("cpu")):
        pass
