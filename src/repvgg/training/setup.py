"""What a config turns into before the first step: device, network, loaders."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from repvgg.checkpoint import load_weights
from repvgg.data.images import Images, open_images
from repvgg.data.loader import Loader, derived_seed
from repvgg.data.shards import is_packed
from repvgg.data.transforms import training_transform
from repvgg.errors import InputError
from repvgg.lean import use_implementation
from repvgg.model import RepVGG, create_model
from repvgg.preprocessing import Preprocessing
from repvgg.spec import AUXILIARY_WEIGHTS
from repvgg.training.auxiliary import Supervised
from repvgg.training.config import TrainConfig
from repvgg.training.distributed import World, synchronized
from repvgg.training.evaluation import evaluation_loader
from repvgg.training.whitening import whiten_stem


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


def open_both_splits(data: str) -> tuple[Images, Images]:
    """The images to train on and those to test on.

    Raises:
        InputError: a source that cannot be used, other classes in one split than in the other, or
            one class alone.
    """
    if not data:
        raise InputError("data: a folder of images is needed, found none given")
    folder = Path(data)
    if folder.is_dir() and not is_packed(folder) and not (folder / "train").is_dir():
        # Else the same images would train and test it.
        raise InputError(
            f"{data}: train/ and val/ are needed in it, each with a folder a class; found no train/"
        )
    train, test = open_images(data, "train"), open_images(data, "test")
    if train.class_names != test.class_names:
        different = sorted(set(train.class_names) ^ set(test.class_names))
        raise InputError(
            f"{data}: the same classes to train and to test on are needed, found "
            f"{', '.join(different[:5])} in one alone"
        )
    if len(train.class_names) < 2:
        raise InputError(
            f"{data}: 2 classes or more are needed, found {', '.join(train.class_names)} alone"
        )
    return train, test


def build_network(config: TrainConfig, images: Images) -> RepVGG:
    """The network of a config for these images, before the first step.

    Its weights depend on the seed alone, and with `whiten_stem` on the images, or are those of
    `pretrained`.

    Raises:
        InputError: an unknown network, or weights that are not its.
    """
    torch.manual_seed(derived_seed(config.seed))
    preprocessing = None
    if config.image_size is not None:
        preprocessing = Preprocessing.for_channels(images.channels, config.image_size)
    network = create_model(
        config.model,
        block=config.block or None,
        pretrained=config.pretrained == "hub",
        num_classes=len(images.class_names),
        in_chans=images.channels,
        preprocessing=preprocessing,
    )
    if config.pretrained not in ("", "hub"):
        load_weights(network, config.pretrained)
    network.set_class_names(images.class_names)
    if config.whiten_stem:
        whiten_stem(network, images)
    return network


def auxiliary_weight(config: TrainConfig) -> float:
    """What the loss of each auxiliary head counts; 0 where there is none."""
    if config.auxiliary_weight is not None:
        return config.auxiliary_weight
    return AUXILIARY_WEIGHTS.get(config.model.partition(":")[0], 0.0)


def with_heads(network: RepVGG, config: TrainConfig) -> RepVGG | Supervised:
    """What is trained: the network, in its auxiliary heads if the config has any."""
    return Supervised(network) if auxiliary_weight(config) else network


def training_loader(config: TrainConfig, network: RepVGG, images: Images, world: World) -> Loader:
    """This process's part of the batches of a config."""
    return Loader(
        images,
        training_transform(network.preprocessing, config.augmentation),
        config.batch_size,
        seed=config.seed,
        mixup=config.mixup,
        alternate_flip=config.augmentation == "shift-alternate-flip",
        workers=config.workers,
        pin_memory=world.device.type == "cuda",
        rank=world.rank,
        size=world.size,
    )


def test_loader(config: TrainConfig, network: RepVGG, images: Images, world: World) -> Loader:
    """This process's part of the images to test on."""
    batch_size = -(-config.batch_size // world.size)
    return evaluation_loader(network, images, batch_size, config.workers, world)


def on_device(model: nn.Module, config: TrainConfig, world: World) -> None:
    """Move a model to where it trains, in the layout and with the batch norms of the config.

    Raises:
        InputError: a batch that the processes cannot share evenly.
    """
    if config.batch_size % (world.size * config.accumulate):
        raise InputError(
            f"batch_size: a multiple of {world.size} processes × accumulate {config.accumulate} "
            f"needed, found {config.batch_size}"
        )
    model.to(world.device, torch.float64 if config.precision == "fp64" else torch.float32)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    use_implementation(model, config.implementation)
    if config.sync_bn and world.size > 1:
        synchronized(model, world.device)


def for_steps(model: RepVGG | Supervised, config: TrainConfig, world: World) -> nn.Module:
    """What the steps of the optimizer run: the model, wrapped as the config and world need."""
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
