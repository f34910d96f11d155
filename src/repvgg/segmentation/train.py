"""The task of Sect. 4.3: a class for every pixel. The loop is that of classification."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.data.loader import Loader, derived_seed
from repvgg.data.transforms import Each
from repvgg.errors import InputError
from repvgg.model import create_model
from repvgg.preprocessing import Preprocessing
from repvgg.segmentation.config import SegmentConfig
from repvgg.segmentation.data import VOID, Scenes, open_scenes
from repvgg.segmentation.evaluation import evaluate, evaluation_loader
from repvgg.segmentation.pspnet import PSPNet
from repvgg.segmentation.transforms import training_transform
from repvgg.training import loop
from repvgg.training.distributed import World
from repvgg.training.run_folder import RunFolder
from repvgg.training.setup import on_device
from repvgg.training.task import at_least_fp32, in_precision, prepared


def train(config: SegmentConfig, output: Path, *, restart: bool = False) -> RunFolder:
    """Train a PSPNet, or go on where an earlier call stopped; see `repvgg.training.loop.train`."""
    return loop.train(config, output, restart=restart, task=Segmentation)


class Segmentation:
    """A `Task`: cross-entropy of both heads over the pixels that have a class, mIoU.

    Raises:
        InputError: data or config that cannot be used.
    """

    network: Any
    trained: Any
    faster: Sequence[nn.Module]
    hits: str = "pixel_accuracy"
    score: str = "miou"

    def __init__(self, config: SegmentConfig, world: World):
        self.config, self.world = config, world
        scenes, test_scenes = open_scenes(config.data, "train"), open_scenes(config.data, "val")
        self.images = len(scenes)
        self.weights = class_weights(scenes, config.class_balance) if config.class_balance else None
        self.network = self.trained = on_device(build_network(config, scenes), config, world)
        self.faster = (self.network.pyramid, self.network.head, self.network.auxiliary)
        self.factor = config.head_rate
        self.loader = Loader(
            scenes,
            Each(
                training_transform(
                    self.network.preprocessing,
                    scale=(config.scale_min, config.scale_max),
                    rotate=config.rotate,
                    blur=config.blur,
                )
            ),
            config.batch_size,
            seed=config.seed,
            workers=config.workers,
            pin_memory=world.device.type == "cuda",
            rank=world.rank,
            size=world.size,
        )
        self.test_loader = evaluation_loader(test_scenes, config.workers, world)

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, mix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean loss of a pixel, and the share of right ones of the main head, in images."""
        config, labels = self.config, labels.long()
        x = prepared(images, self.network, self.network.preprocessing, config)
        logits, auxiliary = map(at_least_fp32, in_precision(model, x, config))
        loss = cross_entropy(logits, labels, self.weights)
        loss = loss + config.auxiliary_weight * cross_entropy(auxiliary, labels, self.weights)
        right = (logits.argmax(1) == labels).sum() / (labels != VOID).sum().clamp(min=1)
        return loss, (right * len(images)).to(loss.dtype)

    def test(self, network: PSPNet) -> dict[str, float]:
        """Mean loss, mIoU and pixel accuracy on the scenes to test on, each seen as a whole."""
        result = evaluate(network, self.test_loader, world=self.world)
        return {"loss": result.loss, "miou": result.miou, "pixel_accuracy": result.pixel_accuracy}


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the pixels that have a class; 0 if none has.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W) int64, with `VOID`.
        weights: (K,), how much a pixel of each class counts; all alike if not given.
    """
    weights = logits.new_ones(logits.shape[1]) if weights is None else weights.to(logits)
    total = F.cross_entropy(logits, labels, weights, ignore_index=VOID, reduction="sum")
    known = labels[labels != VOID]
    return total / weights[known].sum() if len(known) else total


def class_weights(scenes: Scenes, power: float) -> Tensor:
    """(K,) fp32: a power of the median frequency of the classes over that of each.

    With the power 1 it is the median frequency balancing of Eigen and Fergus, "Predicting Depth,
    Surface Normals and Semantic Labels with a Common Multi-scale Convolutional Architecture"
    (ICCV 2015), but for a frequency over all pixels.

    Raises:
        InputError: a scene that cannot be decoded, a class that never occurs.
    """
    counts = np.zeros(256, np.int64)
    for index in range(len(scenes)):
        counts += np.bincount(np.asarray(scenes.decode(index).labels).ravel(), minlength=256)
    counts = counts[: len(scenes.class_names)]
    if not counts.all():
        missing = scenes.class_names[int(counts.argmin())]
        raise InputError(f"class_balance: a pixel of each class needed, found none of {missing}")
    return torch.from_numpy((np.median(counts) / counts) ** power).float()


def build_network(config: SegmentConfig, scenes: Scenes) -> PSPNet:
    """The network of a config for these scenes, before the first step.

    Its weights depend on the seed alone, but for those of the `backbone`.

    Raises:
        InputError: an unknown network, or weights that are not its.
    """
    if not config.model.startswith("pspnet_"):
        raise InputError(f"model: one of list_models('pspnet*') needed, found {config.model}")
    torch.manual_seed(derived_seed(config.seed))
    network = create_model(
        config.model,
        pretrained=config.backbone == "hub",
        num_classes=len(scenes.class_names),
        width=config.width,
        preprocessing=Preprocessing.for_channels(3, config.crop_size),
        class_names=scenes.class_names,
    )
    network = cast(PSPNet, network)
    if config.backbone not in ("", "hub"):
        network.load_backbone(config.backbone)
    return network
