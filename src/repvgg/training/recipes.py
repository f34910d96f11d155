"""Named recipes: functions that each return a complete config (paper, Sect. 4.1, and our own)."""

from collections.abc import Callable

from repvgg.training.config import TrainConfig


def imagenet_120() -> TrainConfig:
    """ImageNet, light and middle weights: the paper's simple setting, 120 epochs."""
    return TrainConfig()


def imagenet_200() -> TrainConfig:
    """ImageNet, heavy weights: the paper's 200 epochs with AutoAugment, mixup, label smoothing."""
    return TrainConfig(
        model="repvgg_b2g4",
        epochs=200,
        warmup_epochs=5,
        augmentation="autoaugment-crop-flip",
        label_smoothing=0.1,
        mixup=0.2,
    )


def cifar10() -> TrainConfig:
    """32×32 images: a small RepVGG, in an hour on two CPU cores."""
    return TrainConfig(
        model="repvgg_cifar",
        whiten_stem=True,
        branch_scale=0.1,
        epochs=20,
        batch_size=256,
        base_batch_size=256,
        optimizer="muon",
        muon_rate=0.05,
        learning_rate=0.4,
        bias_rate=8,
        warmup_epochs=0.5,
        schedule="linear",
        nesterov=True,
        weight_decay=1e-3,
        label_smoothing=0.1,
        augmentation="shift-alternate-flip",
        max_shift=1 / 16,
    )


def digits() -> TrainConfig:
    """The embedded 8×8 digits, in seconds."""
    return TrainConfig(
        model="repvgg_digits",
        data="digits",
        epochs=30,
        batch_size=64,
        base_batch_size=64,
        weight_decay=5e-4,
        augmentation="shift",
    )


def finetune() -> TrainConfig:
    """A folder of one's own images: from published weights, short, at a low rate."""
    return TrainConfig(
        pretrained="hub",
        epochs=20,
        batch_size=64,
        base_batch_size=64,
        learning_rate=0.01,
        warmup_epochs=1,
        label_smoothing=0.1,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "imagenet-120": imagenet_120,
    "imagenet-200": imagenet_200,
    "cifar10": cifar10,
    "digits": digits,
    "finetune": finetune,
}
