"""The task of Sect. 4.3: a class for every pixel. The loop is that of classification."""

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.data.loader import Loader, derived_seed
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

    hits, score = "pixel_accuracy", "miou"

    def __init__(self, config: SegmentConfig, world: World):
        self.config, self.world = config, world
        scenes, test_scenes = open_scenes(config.data, "train"), open_scenes(config.data, "val")
        self.images = len(scenes)
        self.network = on_device(build_network(config, scenes), config, world)
        self.faster = (self.network.pyramid, self.network.head, self.network.auxiliary)
        self.factor = config.head_rate
        self.loader = Loader(
            scenes,
            training_transform(
                self.network.preprocessing,
                scale=(config.scale_min, config.scale_max),
                rotate=config.rotate,
                blur=config.blur,
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
        loss = cross_entropy(logits, labels)
        loss = loss + config.auxiliary_weight * cross_entropy(auxiliary, labels)
        right = (logits.argmax(1) == labels).sum() / (labels != VOID).sum().clamp(min=1)
        return loss, (right * len(images)).to(loss.dtype)

    def test(self, network: PSPNet) -> dict[str, float]:
        """Mean loss, mIoU and pixel accuracy on the scenes to test on, each seen as a whole."""
        result = evaluate(network, self.test_loader, world=self.world)
        return {"loss": result.loss, "miou": result.miou, "pixel_accuracy": result.pixel_accuracy}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that have a class; 0 if none has.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W) int64, with `VOID`.
    """
    total = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum")
    return total / (labels != VOID).sum().clamp(min=1)


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
