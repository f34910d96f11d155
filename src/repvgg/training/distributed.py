"""One process or many, started by `torchrun`: who this one is, sums over all, batch statistics.

Everything works alike in one process without any set-up: its world is of size 1.
"""

import gc
import importlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.constants import default_pg_timeout

from repvgg.errors import InputError


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: 0 to size − 1; rank 0 alone writes.
        size: number of processes.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes, in fp64; every process must call it."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; every process must call it."""
        return self.sum(float(flag))[0] > 0


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that `torchrun` started, if it started this one; leave them at the end.

    NCCL on GPUs, one GPU a process; Gloo on CPUs.

    Raises:
        InputError: the environment speaks of several processes, but not as `torchrun` sets it.
    """
    size = _given_number("WORLD_SIZE", least=1) if "WORLD_SIZE" in os.environ else 1
    if size == 1:
        yield World(0, 1, device)
        return
    _check_environment(size)
    if device.type == "cuda":
        device = torch.device("cuda", _given_number("LOCAL_RANK"))
        torch.cuda.set_device(device)
    # Imported by DDP otherwise; at its import it would take hold of a group that is there by then.
    importlib.import_module("torch._dynamo")
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_of_this_start(store, rank, size),
        rank=rank,
        world_size=size,
    )
    group = dist.group.WORLD
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
        # The end of the group, by its last reference, waits for its threads: one that is still at
        # the last sum when the interpreter ends would abort the process.
        gc.collect()
        del group


def _check_environment(size: int) -> None:
    """Raise InputError where what `torchrun` sets for each of several processes is missing."""
    rank = _given_number("RANK")
    if rank >= size:
        raise InputError(f"RANK (environment): below WORLD_SIZE {size} needed, found {rank}")
    _given_number("MASTER_PORT")
    _given("MASTER_ADDR")


def _given(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InputError(
            f"{name} (environment): needed where WORLD_SIZE is set, found nothing; "
            "start the processes with torchrun, or unset WORLD_SIZE to train in one"
        )
    return value


def _given_number(name: str, least: int = 0) -> int:
    value = _given(name)
    if not value.isdecimal() or int(value) < least:
        raise InputError(f"{name} (environment): a number from {least} on needed, found {value!r}")
    return int(value)


def _of_this_start(
    store: Store, rank: int, size: int, patience: timedelta = default_pg_timeout
) -> Store:
    """A part of the store that only the processes of this start see.

    `torchrun` keeps one store for all its restarts, in which the addresses of processes that have
    died would be taken for those of their successors. The count of restarts does not tell the
    starts apart: each machine counts its own. So the first process makes up a token, and each of
    the others asks for it under a name that nobody had before.

    Raises:
        InputError: processes that did not come within `patience`.
    """
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"name of {rank}", name)
        token = store.get(f"token for {name}").decode()
        store.set(f"{token} has {rank}", "yes")
        return PrefixStore(token, store)
    token, missing = uuid.uuid4().hex, set(range(1, size))
    deadline = time.monotonic() + patience.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise InputError(f"{size} processes needed, those of rank {sorted(missing)} never came")
        for other in missing:
            if store.check([f"name of {other}"]):
                store.set(f"token for {store.get(f'name of {other}').decode()}", token)
        missing = {other for other in missing if not store.check([f"{token} has {other}"])}
        time.sleep(0.02)
    return PrefixStore(token, store)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose batch is that of all processes, on any device.

    torch's own `SyncBatchNorm` does not run on CPUs. Same state dict as `nn.BatchNorm2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = _SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean[:, None, None]
        # A second sum, of what is centred: the difference of two large sums would lose digits.
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._update(mean.detach(), var.detach() * count / (count - 1).clamp(min=1))
        scale = torch.rsqrt(var + self.eps)
        result = centred * (scale * self.weight)[:, None, None] + self.bias[:, None, None]
        return result.to(input.dtype)

    def _update(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            return
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms whose batch is that of all processes, made in place.

    On a GPU they are torch's own, which are fused.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
