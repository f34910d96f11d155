"""Dilated backbones by name (paper, Sect. 4.3): which layers are dilated, and by how much.

As in the official PSPNet-50/101 the last two stages keep the resolution of the third, 1/8 of the
image: their strides are 1, and in place of the lost strides their 3×3 kernels are dilated by 2 and
by 4.
"""

import dataclasses
from dataclasses import dataclass

from repvgg.errors import InputError
from repvgg.spec import LATER_VARIANTS, SMALL_IMAGE_VARIANTS, VARIANTS, Spec

# Dilated layers of stage 4 in the form called "fast"; stage 5 has one layer, and it is dilated.
FAST_LAYERS = 4
RESNETS = ("resnet50", "resnet101")


@dataclass(frozen=True)
class BackboneName:
    """What a name of a PSPNet says: a network of the `VARIANTS` or `RESNETS`, and its form."""

    network: str
    fast: bool = False


def dilated(spec: Spec, *, fast: bool = False) -> Spec:
    """A spec of five stages with output stride 8, the layers of its last two stages dilated.

    Args:
        spec: as for classification; the weights of the one network are those of the other.
        fast: of stage 4 only the last four layers are dilated. The layers before them have the
            same resolution and are as dense as ever, since the paper ascribes the gain in speed
            to the dilation alone, with the FLOPs the same.

    Raises:
        InputError: another number of stages.
    """
    if len(spec.depths) != 5:
        raise InputError(f"a dilated backbone needs five stages, found depths={spec.depths}")
    fourth = spec.depths[3]
    dense = max(0, fourth - FAST_LAYERS) if fast else 0
    return dataclasses.replace(
        spec,
        strides=(*spec.strides[:3], 1, 1),
        dilations=(1, 1, 1, (1,) * dense + (2,) * (fourth - dense), 4),
    )


def _names() -> dict[str, BackboneName]:
    specs = {**VARIANTS, **LATER_VARIANTS, **SMALL_IMAGE_VARIANTS}
    names = {}
    for network in (name for name, spec in specs.items() if len(spec.depths) == 5):
        names[f"pspnet_{network}"] = BackboneName(network)
        names[f"pspnet_{network}_fast"] = BackboneName(network, fast=True)
    return names | {f"pspnet_{network}": BackboneName(network) for network in RESNETS}


PSPNETS = _names()
