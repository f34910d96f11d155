"""The networks that the paper compares RepVGG with (Sect. 4.1, Tables 4 and 5), from timm."""

from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from repvgg.errors import InputError
from repvgg.model import create_model
from repvgg.spec import DEFAULT_IMAGE_SIZE, IMAGE_SIZES


@dataclass(frozen=True)
class Baseline:
    """How a network of the paper is built.

    Attributes:
        timm_name: of the network in timm.
        image_size: height and width in pixels at which the paper runs it.
        stride_first: whether a bottleneck's stride is that of its first 1×1 convolution, as in the
            original ResNet, where timm's have it in the 3×3 (see `move_strides_first`).
    """

    timm_name: str
    image_size: int = 224
    stride_first: bool = False


BASELINES = {
    "VGG-16": Baseline("vgg16_bn"),
    "ResNet-18": Baseline("resnet18"),
    "ResNet-34": Baseline("resnet34"),
    "ResNet-50": Baseline("resnet50", stride_first=True),
    "ResNet-101": Baseline("resnet101", stride_first=True),
    "ResNet-152": Baseline("resnet152", stride_first=True),
    "ResNeXt-50": Baseline("resnext50_32x4d"),
    "ResNeXt-101": Baseline("resnext101_32x4d"),
    "EfficientNet-B0": Baseline("efficientnet_b0"),
    "EfficientNet-B3": Baseline("efficientnet_b3", 300),
    "RegNetX-3.2GF": Baseline("regnetx_032"),
    "RegNetX-12GF": Baseline("regnetx_120"),
}


def create_named(name: str, num_classes: int = 1000) -> nn.Module:
    """A network by its name in the paper, ours or timm's, as it is trained, in eval mode.

    Args:
        name: as the paper prints it ("RepVGG-A0", "ResNet-50"), one of ours ("repvgg_a0"), or one
            of timm's ("resnet50").
        num_classes: outputs.

    Raises:
        InputError: no such network.
    """
    if name in BASELINES:
        baseline = BASELINES[name]
        network = _from_timm(baseline.timm_name, num_classes)
        return move_strides_first(network) if baseline.stride_first else network
    if _is_ours(name):
        return create_model(_our_name(name), num_classes=num_classes).eval()
    return _from_timm(name, num_classes)


def image_size_of(name: str) -> int:
    """Height and width in pixels at which the paper runs a network, or for which it is meant."""
    if name in BASELINES:
        return BASELINES[name].image_size
    if _is_ours(name):
        return IMAGE_SIZES.get(_our_name(name).partition(":")[0], DEFAULT_IMAGE_SIZE)
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config.input_size[-1] if config else DEFAULT_IMAGE_SIZE


def _is_ours(name: str) -> bool:
    return name.lower().startswith("repvgg")


def _our_name(name: str) -> str:
    """RepVGG-A0 as repvgg_a0; what follows a colon stays."""
    stem, colon, fields = name.partition(":")
    return f"{stem.lower().replace('-', '_')}{colon}{fields}"


def move_strides_first(network: nn.Module) -> nn.Module:
    """Give the first 1×1 convolution of each of timm's bottlenecks the stride of its 3×3.

    So it is in the original ResNet, and in the paper: 3.9, 7.6 and 11.3 B multiply-adds for 50,
    101 and 152 layers.

    Returns:
        The network, changed in place.
    """
    from timm.models.resnet import Bottleneck

    for block in network.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return network


def _from_timm(name: str, num_classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = get_close_matches(name, (*BASELINES, *timm.list_models()), n=5)
        hint = f"near it: {', '.join(near)}" if near else "`timm.list_models()` lists timm's"
        raise InputError(
            f"{name}: a network of the paper ({', '.join(BASELINES)}), of `repvgg.list_models()` "
            f"or of timm is needed, found none of this name; {hint}"
        )
    return timm.create_model(name, num_classes=num_classes).eval()
