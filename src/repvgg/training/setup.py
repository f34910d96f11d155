"""Where and how a network trains: device, layout, batch norms, wrappers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from repvgg.errors import InputError
from repvgg.lean import use_implementation
from repvgg.training.auxiliary import Supervised
from repvgg.training.config import RunConfig
from repvgg.training.distributed import World, synchronized

Network = TypeVar("Network", bound=nn.Module)


def choose_device(name: str) -> torch.device:
    """The device of a config's `device`.

    Raises:
        InputError: a GPU is asked for where torch finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in found and not found[name]():
        raise InputError(f"device={name}: torch finds no such device here")
    return torch.device(name)


@contextmanager
def repeatable() -> Iterator[None]:
    """On GPUs, only algorithms of cuDNN that give the same bits each time.

    Of the others cuDNN does not promise it, so that a run that goes on need not end as one that was
    never stopped.
    """
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def on_device(network: Network, config: RunConfig, world: World) -> Network:
    """Move a network to where it trains, in the layout and with the batch norms of the config.

    Raises:
        InputError: a batch that the processes cannot share evenly.
    """
    if config.batch_size % (world.size * config.accumulate):
        raise InputError(
            f"batch_size: a multiple of {world.size} processes × accumulate {config.accumulate} "
            f"needed, found {config.batch_size}"
        )
    network.to(world.device, torch.float64 if config.precision == "fp64" else torch.float32)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    use_implementation(network, config.implementation)
    if config.sync_bn and world.size > 1:
        synchronized(network, world.device)
    return network


def for_steps(model: Any, config: RunConfig, world: World) -> nn.Module:
    """What the steps of the optimizer run: the model, wrapped as the config and world need.

    Args:
        model: with `stages`, each of which can be recomputed by itself; or in auxiliary heads.
        config, world: of the run.
    """
    if config.gradient_checkpointing:
        parts = model.parts if isinstance(model, Supervised) else model.stages
        for part in cast(Iterable[nn.Module], parts):
            part.forward = partial(_recomputed, part, part.forward)
    if config.compile:
        model.compile()
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def _recomputed(part: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A part whose activations are computed again in the backward pass, in place of kept."""
    if not torch.is_grad_enabled():
        return forward(x)
    # The first part's input, the image, needs no gradient, which the recomputation bears.
    return checkpoint(
        forward,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _FrozenStatistics(part)),
    )  # pyright: ignore[reportReturnType]


class _FrozenStatistics:
    """Running statistics that stay as they are, since the first computation has moved them."""

    def __init__(self, part: nn.Module):
        self.norms = [m for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count
