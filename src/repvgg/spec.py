"""Architectural specification (paper, Sect. 3.4, Tables 2 and 3).

A `Spec` says everything about a network but its weights, its input channels and its classes. It
unrolls into `Layer`s, one for each 3×3 convolution, and any block factory turns those into
modules: the training-time network, the plain one, an ablation or a pruned one.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from repvgg.errors import InputError

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES = get_args(PaddingMode)

# No real network comes near these; they bound what a hostile file can ask for.
MAX_LAYERS = 1000
MAX_WIDTH = 65536
MAX_STRIDE = 16


@dataclass(frozen=True)
class Layer:
    """One 3×3 convolution + ReLU of the plain network: its geometry, without its weights.

    The padding is equal to the dilation, so stride 1 keeps the size and stride s maps n to ⌈n/s⌉.

    Raises:
        InputError: a number below 1, channels that the groups do not divide, or an unknown
            padding mode.
    """

    in_channels: int
    out_channels: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    padding_mode: PaddingMode = "zeros"

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "stride", "groups", "dilation"):
            _check_int(field, getattr(self, field), 1, MAX_WIDTH)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise InputError(
                f"groups={self.groups} must divide in_channels={self.in_channels} "
                f"and out_channels={self.out_channels}"
            )
        if self.padding_mode not in PADDING_MODES:
            raise InputError(f"padding_mode={self.padding_mode!r}: one of {PADDING_MODES} needed")

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output have the same shape, so that an identity branch can exist."""
        return self.in_channels == self.out_channels and self.stride == 1


@dataclass(frozen=True)
class Spec:
    """Depths, widths, groups, strides and dilations of a network, stage by stage.

    Attributes:
        depths: layers of each stage.
        a: width multiplier of all stages but the last; [64, 128, 256] a, and min(64, 64 a) for
            the first stage (Sect. 3.4).
        b: width multiplier of the last stage, 512 b.
        groups: groups of the 3rd, 5th, 7th … layer of the whole network, counted from 1.
        strides: stride of the first layer of each stage.
        widths: explicit widths in place of a and b: a number for a whole stage, or one for each
            of its layers. Needed if there are not five stages.
        dilations: of the 3×3 kernels, for each stage a number or one for each of its layers; all 1
            if not given. With the strides they make the dilated backbones of Sect. 4.3.

    Raises:
        InputError: naming the field.
    """

    depths: tuple[int, ...] = (1, 2, 4, 14, 1)
    a: float = 1.0
    b: float = 2.5
    groups: int = 1
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)
    widths: tuple[int | tuple[int, ...], ...] | None = None
    dilations: tuple[int | tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for field in ("depths", "strides", "widths", "dilations"):
            value = _as_tuple(getattr(self, field))
            is_optional = field in ("widths", "dilations")
            if not isinstance(value, tuple) and not (is_optional and value is None):
                raise InputError(f"{field}: a tuple needed, found {_short(value)}")
            object.__setattr__(self, field, value)
        for depth in self.depths:
            _check_int("depths", depth, 1, MAX_LAYERS)
        if not 1 <= sum(self.depths) <= MAX_LAYERS:
            raise InputError(f"depths={self.depths}: 1 to {MAX_LAYERS} layers needed in all")
        if len(self.strides) != len(self.depths):
            raise InputError(
                f"strides={self.strides}: one for each of the {len(self.depths)} stages needed"
            )
        for stride in self.strides:
            _check_int("strides", stride, 1, MAX_STRIDE)
        _check_int("groups", self.groups, 1, MAX_WIDTH)
        self.layers()  # checks the widths, and the groups against them

    def layer_widths(self) -> tuple[tuple[int, ...], ...]:
        """Output channels of every layer, stage by stage.

        Raises:
            InputError: `widths` and `depths` disagree, or `a` or `b` is not a usable multiplier.
        """
        return self._of_layers(
            "widths", self._scaled_widths() if self.widths is None else self.widths
        )

    def layer_dilations(self) -> tuple[tuple[int, ...], ...]:
        """Dilation of every layer, stage by stage.

        Raises:
            InputError: `dilations` and `depths` disagree.
        """
        usual = (1,) * len(self.depths)
        return self._of_layers("dilations", usual if self.dilations is None else self.dilations)

    def _of_layers(
        self, field: str, values: tuple[int | tuple[int, ...], ...]
    ) -> tuple[tuple[int, ...], ...]:
        """A number for every layer, from one for each stage or for each of its layers."""
        if len(values) != len(self.depths):
            raise InputError(
                f"{field}={values}: one for each of the {len(self.depths)} stages needed"
            )
        result = []
        for stage, (of_stage, depth) in enumerate(zip(values, self.depths, strict=True), start=1):
            of_layers = of_stage if isinstance(of_stage, tuple) else (of_stage,) * depth
            if len(of_layers) != depth:
                raise InputError(
                    f"{field} of stage {stage}: {len(of_layers)} found, {depth} needed"
                )
            for value in of_layers:
                _check_int(f"{field} of stage {stage}", value, 1, MAX_WIDTH)
            result.append(of_layers)
        return tuple(result)

    def _scaled_widths(self) -> tuple[int, ...]:
        if len(self.depths) != 5:
            raise InputError(
                f"depths={self.depths}: the multipliers a and b are for five stages; "
                "give `widths` for another number"
            )
        for name, value in (("a", self.a), ("b", self.b)):
            if not isinstance(value, int | float) or not 1 / 512 < value <= 128:
                raise InputError(f"{name}={value!r}: a number above 1/512, at most 128, needed")
        a, b = self.a, self.b
        widths = (min(64, 64 * a), 64 * a, 128 * a, 256 * a, 512 * b)
        return tuple(max(1, round(width)) for width in widths)

    def layers(self, in_chans: int = 3) -> tuple[tuple[Layer, ...], ...]:
        """Every 3×3 layer of the network, stage by stage, for images of `in_chans` channels.

        Raises:
            InputError: the groups do not divide a width.
        """
        stages = []
        channels, index = in_chans, 0
        for widths, dilations, first_stride in zip(
            self.layer_widths(), self.layer_dilations(), self.strides, strict=True
        ):
            stage = []
            for position, (width, dilation) in enumerate(zip(widths, dilations, strict=True)):
                index += 1
                groups = self.groups if index >= 3 and index % 2 == 1 else 1
                stride = first_stride if position == 0 else 1
                try:
                    stage.append(Layer(channels, width, stride, groups, dilation))
                except InputError as error:
                    raise InputError(f"layer {index} of the network: {error}") from None
                channels = width
            stages.append(tuple(stage))
        return tuple(stages)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Spec":
        """The spec that `to_dict` described, from data that is not trusted.

        Raises:
            InputError: a field that is unknown or holds something else than it should.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping) or not set(fields) <= known:
            raise InputError(f"spec: fields {sorted(known)} needed, found {_short(fields)}")
        return cls(**fields)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name}: a whole number from {low} to {high} needed, found {value!r}")


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


A_DEPTHS = (1, 2, 4, 14, 1)
B_DEPTHS = (1, 4, 6, 16, 1)

# Table 3, and the g2 and g4 variants of Table 4 and 5.
VARIANTS: dict[str, Spec] = {
    "repvgg_a0": Spec(A_DEPTHS, a=0.75, b=2.5),
    "repvgg_a1": Spec(A_DEPTHS, a=1, b=2.5),
    "repvgg_a2": Spec(A_DEPTHS, a=1.5, b=2.75),
    "repvgg_b0": Spec(B_DEPTHS, a=1, b=2.5),
    "repvgg_b1": Spec(B_DEPTHS, a=2, b=4),
    "repvgg_b1g2": Spec(B_DEPTHS, a=2, b=4, groups=2),
    "repvgg_b1g4": Spec(B_DEPTHS, a=2, b=4, groups=4),
    "repvgg_b2": Spec(B_DEPTHS, a=2.5, b=5),
    "repvgg_b2g2": Spec(B_DEPTHS, a=2.5, b=5, groups=2),
    "repvgg_b2g4": Spec(B_DEPTHS, a=2.5, b=5, groups=4),
    "repvgg_b3": Spec(B_DEPTHS, a=3, b=5),
    "repvgg_b3g2": Spec(B_DEPTHS, a=3, b=5, groups=2),
    "repvgg_b3g4": Spec(B_DEPTHS, a=3, b=5, groups=4),
}

# Deeper ones that were published later, with squeeze-and-excitation.
D2_SPEC = Spec((1, 8, 14, 24, 1), a=2.5, b=5)
LATER_VARIANTS: dict[str, Spec] = {"repvgg_d2se": D2_SPEC, "repvggplus_l2pse": D2_SPEC}

# The training-time block of a named network, if it is not that of Sect. 3.2.
NAMED_BLOCKS = {"repvgg_d2se": "squeeze_excite", "repvggplus_l2pse": "post_squeeze_excite"}

# What the loss of each auxiliary head counts in training (training/auxiliary.py), if it has any.
AUXILIARY_WEIGHTS = {"repvggplus_l2pse": 0.1}

# For small images, which the five stride-2 stages of the paper would reduce to nothing; and a
# backbone for a small machine, of five stages.
SMALL_IMAGE_VARIANTS: dict[str, Spec] = {
    "repvgg_digits": Spec((1, 2, 4, 1), strides=(1, 2, 2, 1), widths=(16, 32, 64, 128)),
    "repvgg_cifar": Spec((1, 2, 2, 2), strides=(2, 1, 2, 2), widths=(48, 96, 224, 288)),
    "repvgg_small": Spec((1, 2, 3, 4, 1), widths=(24, 48, 96, 128, 192)),
}

# Side in pixels of the square images that a named network is meant for, if it is not 224.
IMAGE_SIZES = {"repvgg_digits": 8, "repvgg_cifar": 32}
DEFAULT_IMAGE_SIZE = 224


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes, by shell pattern: `list_models("repvgg_b*g4")`."""
    from repvgg.segmentation.dilated import PSPNETS  # which imports this module

    names = [*VARIANTS, *LATER_VARIANTS, *SMALL_IMAGE_VARIANTS, *PSPNETS]
    return fnmatch.filter(names, pattern)


def parse_spec(text: str) -> Spec:
    """A spec from a name and, optionally, other values for some of its fields.

    Args:
        text: `repvgg_a0`, or `repvgg_a0:a=0.5,strides=1-1-2-2-2,groups=2`. In a tuple the numbers
            are separated by hyphens.

    Raises:
        InputError: an unknown name or field, or a value that cannot be read.
    """
    name, _, overrides = text.partition(":")
    spec = {**VARIANTS, **LATER_VARIANTS, **SMALL_IMAGE_VARIANTS}.get(name)
    if spec is None:
        known = ", ".join(list_models("repvgg*"))
        raise InputError(f"model {name!r} is unknown; one of {known} needed")
    fields: dict[str, Any] = {}
    for part in filter(None, overrides.split(",")):
        field, _, value = part.partition("=")
        if field not in (known := [f.name for f in dataclasses.fields(Spec)]):
            raise InputError(f"model {text!r}: no field {field!r}; one of {known} needed")
        try:
            if field in ("a", "b"):
                fields[field] = float(value)
            elif field == "groups":
                fields[field] = int(value)
            else:
                fields[field] = tuple(int(number) for number in value.split("-"))
        except ValueError:
            raise InputError(f"model {text!r}: cannot read {value!r} as {field}") from None
    return dataclasses.replace(spec, **fields)
