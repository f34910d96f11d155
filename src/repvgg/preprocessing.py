"""What is done to an image before a network sees it: a fact about the network, saved with it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repvgg.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_CHANNELS = 65536  # more than any image has; it bounds what a hostile file can ask for
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to ⌊size / crop_pct⌋, crop the centre, scale to [0, 1], normalize.

    Attributes:
        size: side in pixels of the square that the network sees.
        crop_pct: share of the resized shorter side that the crop keeps.
        interpolation: how the image is resized.
        mean, std: for each channel, on the scale 0 to 1; one channel means greyscale.

    Raises:
        InputError: naming the field.
    """

    size: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= 16384:
            raise InputError(f"preprocessing: size from 1 to 16384 needed, found {self.size!r}")
        if not _is_number(self.crop_pct) or not 0.1 <= self.crop_pct <= 1:
            raise InputError(f"preprocessing: crop_pct in [0.1, 1] needed, found {self.crop_pct!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"preprocessing: interpolation one of {INTERPOLATIONS} needed, "
                f"found {self.interpolation!r}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple) or not all(map(_is_number, values)):
                raise InputError(f"preprocessing: {name} must be numbers, found {values!r}")
        if not len(self.mean) == len(self.std) or not self.mean or min(self.std) <= 0:
            raise InputError(
                "preprocessing: mean and std need one value a channel, std above 0; "
                f"found mean={self.mean}, std={self.std}"
            )

    @property
    def channels(self) -> int:
        """Channels of the image."""
        return len(self.mean)

    @property
    def resize_size(self) -> int:
        """The shorter side in pixels before the crop."""
        return int(self.size / self.crop_pct)

    @classmethod
    def for_channels(cls, channels: int, size: int) -> "Preprocessing":
        """ImageNet's statistics for colour, their mean for any other number of channels.

        Images below 64 pixels are taken whole: a crop of them would lose too much.

        Raises:
            InputError: not a usable number of channels.
        """
        if not isinstance(channels, int) or not 1 <= channels <= MAX_CHANNELS:
            raise InputError(
                f"in_chans={channels!r}: a whole number from 1 to {MAX_CHANNELS} needed"
            )
        crop_pct = 0.875 if size >= 64 else 1.0
        if channels == len(IMAGENET_MEAN):
            return cls(size=size, crop_pct=crop_pct)
        return cls(
            size=size,
            crop_pct=crop_pct,
            mean=(sum(IMAGENET_MEAN) / 3,) * channels,
            std=(sum(IMAGENET_STD) / 3,) * channels,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """What `to_dict` described, from data that is not trusted.

        Raises:
            InputError: a field that is unknown or holds something else than it should.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping) or not set(fields) <= known:
            raise InputError(f"preprocessing: fields {sorted(known)} needed")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return cls(**values)


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= 1e6  # and so not NaN
