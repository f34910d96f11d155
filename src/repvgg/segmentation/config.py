"""What a segmentation run is, and named recipes (paper, Sect. 4.3, and our own).

No heavy import stands here, so that the command line can show every field and its default at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

from repvgg.errors import InputError
from repvgg.training.config import UNBOUNDED, RunConfig, Schedule, require_bounds


@dataclass(frozen=True)
class SegmentConfig(RunConfig):
    """A segmentation run; the defaults are those of Sect. 4.3 and of the official PSPNet.

    Attributes:
        model: name of a PSPNet, see `list_models("pspnet*")`; fields of its backbone may follow.
        width: channels of the head before its last layer.
        backbone: weights of the backbone to begin with: a file of a classification network, or
            `hub` for timm's published ones; random ones if empty.
        data: `cityscapes:DIR`, `camvid:DIR`, or a folder that holds a classes.json; its parts
            train and val are used.
        head_rate: how many times the rate of the backbone the heads learn at.
        auxiliary_weight: of the loss of the auxiliary head.
        class_balance: 0 for a loss in which every pixel counts alike; else each counts by this
            power of the median frequency of the classes over that of its own.
        crop_size: side in pixels of the square parts that are trained on.
        scale_min: lowest factor by which height and width are changed before.
        scale_max: the highest.
        rotate: up to so many degrees half of the images are turned by.
        blur: whether half of them are blurred.
    """

    epochs: int = 40
    batch_size: int = 16
    learning_rate: float = 0.01
    base_batch_size: int = 16
    schedule: Schedule = "poly"
    sync_bn: bool = True
    model: str = "pspnet_repvgg_b1g2_fast"
    width: int = 512
    backbone: str = ""
    data: str = ""
    head_rate: float = 10.0
    auxiliary_weight: float = 0.4
    class_balance: float = 0.0
    crop_size: int = 713
    scale_min: float = 0.5
    scale_max: float = 2.0
    rotate: float = 10.0
    blur: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bounds(self, BOUNDS)
        if self.scale_min > self.scale_max:
            raise InputError(
                f"scale_min: at most scale_max needed, found {self.scale_min} and {self.scale_max}"
            )


BOUNDS = (
    ("width", 2, 65536),
    ("head_rate", 0, UNBOUNDED),
    ("auxiliary_weight", 0, UNBOUNDED),
    ("class_balance", 0, 10),
    ("crop_size", 9, 16384),
    ("scale_min", 0.05, 16),
    ("scale_max", 0.05, 16),
    ("rotate", 0, 180),
)


def cityscapes() -> SegmentConfig:
    """Cityscapes: the paper's setting, 40 epochs, global batch 16."""
    return SegmentConfig()


def camvid() -> SegmentConfig:
    """CamVid: a small network, in less than an hour on two CPU cores."""
    return SegmentConfig(
        model="pspnet_repvgg_small",
        width=64,
        epochs=44,
        batch_size=6,
        base_batch_size=6,
        optimizer="muon",
        muon_rate=0.03,
        learning_rate=0.03,
        weight_decay=5e-4,
        head_rate=4.0,
        class_balance=0.5,
        crop_size=256,
        scale_min=0.75,
        scale_max=1.75,
        rotate=0.0,
        blur=False,
    )


SEGMENT_RECIPES: dict[str, Callable[[], SegmentConfig]] = {
    "cityscapes": cityscapes,
    "camvid": camvid,
}
