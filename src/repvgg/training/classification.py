"""The task of Sect. 4.1: an image, one class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.branches import MultiBranchBlock
from repvgg.checkpoint import load_weights
from repvgg.data.images import Images, open_images
from repvgg.data.loader import Loader, derived_seed
from repvgg.data.shards import is_packed
from repvgg.data.transforms import training_transform
from repvgg.errors import InputError
from repvgg.model import RepVGG, create_model
from repvgg.preprocessing import Preprocessing
from repvgg.spec import AUXILIARY_WEIGHTS
from repvgg.training.auxiliary import Supervised
from repvgg.training.config import TrainConfig
from repvgg.training.distributed import World
from repvgg.training.evaluation import evaluate, evaluation_loader
from repvgg.training.setup import on_device
from repvgg.training.task import at_least_fp32, in_precision, prepared
from repvgg.training.whitening import whiten_stem


class Classification:
    """A `Task`: cross-entropy, top-1.

    Raises:
        InputError: data or config that cannot be used.
    """

    network: Any
    trained: Any
    faster: Sequence[nn.Module] = ()
    factor: float = 1.0
    hits: str = "top1"
    score: str = "top1"

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        train_images, test_images = open_both_splits(config.data)
        self.images = len(train_images)
        self.network = build_network(config, train_images)
        self.auxiliary_weight = auxiliary_weight(config)
        self.trained = Supervised(self.network) if self.auxiliary_weight else self.network
        on_device(self.trained, config, world)
        self.loader = training_loader(config, self.network, train_images, world)
        batch_size = -(-config.batch_size // world.size)
        self.test_loader = evaluation_loader(
            self.network, test_images, batch_size, config.workers, world
        )

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, mix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean loss of a part, and how many first classes are right (of the greater share)."""
        config = self.config
        x = prepared(images, self.network, self.network.preprocessing, config)
        if config.mixup:
            x = torch.lerp(x.roll(1, 0), x, mix.to(x.dtype)[:, None, None, None])
        outputs = at_least_fp32(in_precision(model, x, config))
        logits, *auxiliary = outputs if isinstance(self.trained, Supervised) else (outputs,)
        mix = mix.to(logits.dtype)
        loss = self._cross_entropy(logits, labels, mix)
        for of_head in auxiliary:
            loss = loss + self.auxiliary_weight * self._cross_entropy(of_head, labels, mix)
        if config.mixup:
            labels = torch.where(mix >= 0.5, labels, labels.roll(1, 0))
        return loss, (logits.argmax(1) == labels).sum().to(loss.dtype)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, mix: Tensor) -> Tensor:
        """Mean over the images, of both labels of each where they are mixed."""
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if self.config.mixup:
            other = labels.roll(1, 0)
            of_other = F.cross_entropy(logits, other, reduction="none", label_smoothing=smoothing)
            loss = torch.lerp(of_other, loss, mix)
        return loss.mean()

    def test(self, network: RepVGG) -> dict[str, float]:
        """Mean loss and top-1 on the images to test on."""
        result = evaluate(network, self.test_loader, world=self.world)
        return {"loss": result.loss, "top1": result.top1}


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
    if not isinstance(network, RepVGG):
        raise InputError(f"model: {config.model} classifies no images; see `repvgg segment train`")
    if config.pretrained not in ("", "hub"):
        load_weights(network, config.pretrained)
    network.set_class_names(images.class_names)
    if config.branch_scale != 1:
        scale_side_branches(network, config.branch_scale)
    if config.whiten_stem:
        whiten_stem(network, images)
    return network


def scale_side_branches(network: nn.Module, scale: float) -> None:
    """Let the batch norms of every branch but the first of each block begin with this scale.

    Raises:
        InputError: there is no such batch norm.
    """
    norms = [
        module
        for block in network.modules()
        if isinstance(block, MultiBranchBlock)
        for branch in list(block.branches.values())[1:]
        for module in branch.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    if not norms:
        raise InputError("branch_scale: blocks with several branches, each normalized, are needed")
    for norm in norms:
        nn.init.constant_(norm.weight, scale)


def auxiliary_weight(config: TrainConfig) -> float:
    """What the loss of each auxiliary head counts; 0 where there is none."""
    if config.auxiliary_weight is not None:
        return config.auxiliary_weight
    return AUXILIARY_WEIGHTS.get(config.model.partition(":")[0], 0.0)


def training_loader(config: TrainConfig, network: RepVGG, images: Images, world: World) -> Loader:
    """This process's part of the batches of a config."""
    return Loader(
        images,
        training_transform(network.preprocessing, config.augmentation, config.max_shift),
        config.batch_size,
        seed=config.seed,
        mixup=config.mixup,
        alternate_flip=config.augmentation == "shift-alternate-flip",
        workers=config.workers,
        pin_memory=world.device.type == "cuda",
        rank=world.rank,
        size=world.size,
    )
