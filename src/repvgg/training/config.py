"""What a training run is: a complete, typed config, and the named recipes that give one.

No heavy import stands here, so that the command line can show every field and its default at once.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from repvgg.errors import InputError

Augmentation = Literal["crop-flip", "shift-flip", "shift", "none"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are those of the paper (Sect. 4.1, 120 epochs).

    Attributes:
        model: name of a network, with changed fields if need be: `repvgg_a0:a=0.5`.
        data: folder with train/ and val/, each with a folder a class; `cifar10:DIR`; `digits`.
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: at the start; it falls to 0 along half a cosine.
        momentum: of stochastic gradient descent.
        weight_decay: on the kernels of convolutions and linear layers only.
        augmentation: random changes of the training images.
        precision: of the convolutions; weights, batch norms and loss are fp32 in either case.
        image_size: side in pixels of the square that the network sees; the model's own if None.
        seed: of the initial weights, the order of the images and their augmentation.
        workers: processes that decode images; chosen by the machine if None.
        device: where to train; `auto` takes a GPU where there is one.
    """

    model: str = "repvgg_a0"
    data: str = ""
    epochs: int = 120
    batch_size: int = 256
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augmentation: Augmentation = "crop-flip"
    precision: Precision = "fp32"
    image_size: int | None = None
    seed: int = 0
    workers: int | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 2), ("seed", 0)):
            if getattr(self, name) < low:
                raise InputError(f"{name}: {low} or more needed, found {getattr(self, name)}")
        for name in ("learning_rate", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: 0 or more needed, found {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers: 0 or more needed, found {self.workers}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


# Fields that say where a run computes, not what; it may go on with others.
PLACE_FIELDS = ("data", "workers", "device")


def changed_fields(config: TrainConfig, earlier: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which a config says another run than an earlier one: name → (earlier, now)."""
    now = config.to_dict()
    return {
        name: (earlier.get(name), now.get(name))
        for name in sorted(now.keys() | earlier.keys())
        if name not in PLACE_FIELDS and earlier.get(name) != now.get(name)
    }


def imagenet_120() -> TrainConfig:
    """The paper's setting for lightweight and middleweight models (Sect. 4.1)."""
    return TrainConfig()


def cifar10() -> TrainConfig:
    """A RepVGG for 32×32 images, in minutes."""
    return TrainConfig(
        model="repvgg_cifar",
        epochs=10,
        batch_size=128,
        weight_decay=5e-4,
        augmentation="shift-flip",
    )


def digits() -> TrainConfig:
    """A RepVGG for the embedded 8×8 digits, in seconds."""
    return TrainConfig(
        model="repvgg_digits",
        data="digits",
        epochs=30,
        batch_size=64,
        weight_decay=5e-4,
        augmentation="shift",
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "imagenet-120": imagenet_120,
    "cifar10": cifar10,
    "digits": digits,
}
