"""PSPNet (Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017) with the backbones of Table 8.

As in the official implementation: a dilated backbone of output stride 8, pyramid pooling, a head,
in training an auxiliary head on the stage before the last, and logits brought to the size of the
image by bilinear interpolation that keeps the corner pixels in place.

Axes: N images, C channels, H and W, K classes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks import BLOCKS, STAGES, is_plain, plain_name
from repvgg.errors import InputError
from repvgg.model import FeatureExtractor, FeatureInfo, RepVGG, block_of, published_weights
from repvgg.preprocessing import Preprocessing
from repvgg.segmentation.dilated import PSPNETS, RESNETS, dilated
from repvgg.segmentation.resnet import DilatedResNet
from repvgg.spec import Spec, parse_spec

# The resolution of Table 8, and the crop that the official PSPNet is trained with on Cityscapes.
IMAGE_SIZE = 713
BINS = (1, 2, 3, 6)


class PSPNet(nn.Module):
    """A segmentation network: images (N, C, H, W) of any size → logits (N, K, H, W).

    In train mode, while it has its auxiliary head, it gives the logits of both heads.

    Args:
        backbone: a spec whose last two stages have the same resolution, see `dilated`; or one of
            `RESNETS`, whose block is its own.
        num_classes: K.
        in_chans: channels of the images.
        width: channels of the head before its last layer; the auxiliary head has half of them.
        drop_rate: dropout of whole channels before the last layer of each head.
        block: see `RepVGG`; with "plain" the heads have no batch norms and no auxiliary head.
        preprocessing: what the images went through; its size is that of the crops in training.
        class_names: one for each class, if known.

    Raises:
        InputError: naming the argument.
    """

    def __init__(
        self,
        backbone: Spec | str,
        num_classes: int = 19,
        in_chans: int = 3,
        *,
        width: int = 512,
        drop_rate: float = 0.1,
        block: str = "repvgg",
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        _require(type(num_classes) is int and 1 <= num_classes <= 255, "num_classes", num_classes)
        _require(type(width) is int and 2 <= width <= 65536, "width", width)
        number = isinstance(drop_rate, int | float) and 0 <= drop_rate < 1
        _require(number, "drop_rate", drop_rate)
        _require(block in (*BLOCKS, *STAGES), "block", block)
        if preprocessing is None:
            preprocessing = Preprocessing.for_channels(in_chans, IMAGE_SIZE)
        _require(preprocessing.channels == in_chans, "in_chans", in_chans)
        self.block, self.num_classes, self.in_chans = block, num_classes, in_chans
        self.width, self.drop_rate, self.preprocessing = width, drop_rate, preprocessing
        self.class_names: tuple[str, ...] | None = None
        self.spec = backbone
        self.backbone = _backbone(backbone, in_chans, block, preprocessing)
        before, last = self.backbone.feature_info.channels()
        plain = is_plain(block)
        self.pyramid = PyramidPooling(last, plain=plain)
        self.head = _head(self.pyramid.out_channels, width, num_classes, drop_rate, plain=plain)
        self.auxiliary: nn.Module | None = None
        if not plain:
            self.auxiliary = _head(before, width // 2, num_classes, drop_rate, plain=plain)
        if class_names is not None:
            self.set_class_names(class_names)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (N, C, H, W) → logits (N, K, H, W); of both heads in training."""
        before, last = self.backbone(x)
        logits = _resized(self.head(self.pyramid(last)), x, training=self.training)
        if self.training and self.auxiliary is not None:
            return logits, _resized(self.auxiliary(before), x, training=True)
        return logits

    @property
    def stages(self) -> nn.Module:
        """The stages of the backbone, in their order."""
        return self.backbone.stages

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and strides of the two feature maps that the heads see."""
        return self.backbone.feature_info

    def set_class_names(self, names: Sequence[str]) -> None:
        """Name the classes, in the order of the logits.

        Raises:
            InputError: not one name for each class.
        """
        if not isinstance(names, list | tuple) or len(names) != self.num_classes:
            raise InputError(f"class_names: a list of {self.num_classes} needed, found {names!r}")
        self.class_names = tuple(map(str, names))

    def load_backbone(self, path: str | Path) -> Any:
        """Fill the backbone with the weights of a classification network, see `load_weights`.

        Returns:
            What was found, as `load_weights` does.

        Raises:
            InputError: the file cannot be read or is of another network; a ResNet.
        """
        from repvgg.checkpoint import load_features

        if not isinstance(self.spec, Spec):
            raise InputError(f"backbone: weights in a file are for a RepVGG, not for {self.spec}")
        with torch.device("meta"):
            classifier = RepVGG(self.spec, 0, self.in_chans, block=self.block)
        classifier.stages = self.backbone.stages
        return load_features(classifier, path)

    def became_plain(self) -> None:
        """Called on a converted network: its name for itself, and no part for training alone."""
        self.block = plain_name(self.block)
        self.auxiliary = None

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs to build this network again, ready for JSON."""
        return {
            "backbone": self.spec.to_dict() if isinstance(self.spec, Spec) else self.spec,
            "num_classes": self.num_classes,
            "in_chans": self.in_chans,
            "width": self.width,
            "drop_rate": self.drop_rate,
            "block": self.block,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.class_names,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PSPNet":
        """The network that `config` described, untrained, from data that is not trusted.

        Raises:
            InputError: a field that is missing, unknown or holds something else than it should.
        """
        fields = {**config}
        needed = {
            *("backbone", "num_classes", "in_chans", "width", "drop_rate", "block"),
            *("preprocessing", "class_names"),
        }
        if fields.keys() != needed:
            raise InputError(f"model: fields {sorted(needed)} needed, found {sorted(fields)}")
        if not isinstance(fields["backbone"], str):
            fields["backbone"] = Spec.from_dict(fields["backbone"])
        fields["preprocessing"] = Preprocessing.from_dict(fields["preprocessing"])
        return cls(**fields)


class PyramidPooling(nn.Module):
    """Averages over grids of 1, 2, 3 and 6 cells a side, each reduced to a quarter, beside x.

    (N, C, H, W) → (N, about 2 C, H, W).
    """

    def __init__(self, in_channels: int, bins: Sequence[int] = BINS, *, plain: bool = False):
        super().__init__()
        self.bins = tuple(bins)
        reduced = max(1, in_channels // len(self.bins))
        self.out_channels = in_channels + reduced * len(self.bins)
        self.reductions = nn.ModuleList(
            _conv_norm_relu(in_channels, reduced, 1, plain=plain) for _ in self.bins
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out_channels, H, W)."""
        levels = [
            _resized(reduction(pooled(x, bins)), x, training=self.training)
            for reduction, bins in zip(self.reductions, self.bins, strict=True)
        ]
        return torch.cat([x, *levels], dim=1)


def pooled(x: Tensor, bins: int) -> Tensor:
    """Adaptive average pooling: (N, C, H, W) → (N, C, bins, bins).

    As two matrix products, which ONNX can express for sizes that are not known yet, where
    `nn.AdaptiveAvgPool2d` has no equal.
    """
    rows, columns = (_averaging(bins, extent, x) for extent in x.shape[-2:])
    return rows @ x @ columns.T


def _averaging(bins: int, extent: int, like: Tensor) -> Tensor:
    """(bins, extent): row i averages the pixels from ⌊i extent / bins⌋ to ⌈(i+1) extent / bins⌉."""
    cells = torch.arange(bins, device=like.device)
    pixels = torch.arange(extent, device=like.device)
    start = cells * extent // bins
    end = ((cells + 1) * extent + bins - 1) // bins
    inside = (pixels >= start[:, None]) & (pixels < end[:, None])
    return inside.to(like.dtype) / (end - start)[:, None].to(like.dtype)


def _resized(x: Tensor, like: Tensor, *, training: bool) -> Tensor:
    """Bilinear interpolation to the height and width of another tensor.

    In training as two matrix products: the backward pass of `F.interpolate` adds up in no fixed
    order on GPUs, and a run that goes on would not end with the same bits.
    """
    if not training:
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)
    extents = zip(like.shape[-2:], x.shape[-2:], strict=True)
    rows, columns = (interpolation(outputs, inputs, x) for outputs, inputs in extents)
    return rows @ x @ columns.T


def interpolation(outputs: int, inputs: int, like: Tensor) -> Tensor:
    """(outputs, inputs): row i weighs the inputs beside its place, with the corners in place."""
    places = torch.linspace(0, inputs - 1, outputs, dtype=torch.float64, device=like.device)
    distance = places[:, None] - torch.arange(inputs, device=like.device)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)


def _conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int, *, plain: bool
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=plain)
    norm = nn.Identity() if plain else nn.BatchNorm2d(out_channels)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU(inplace=True)))


def _head(
    in_channels: int, width: int, num_classes: int, drop_rate: float, *, plain: bool
) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            hidden=_conv_norm_relu(in_channels, width, 3, plain=plain),
            dropout=nn.Dropout2d(drop_rate),
            classifier=nn.Conv2d(width, num_classes, 1),
        )
    )


def _backbone(backbone: Spec | str, in_chans: int, block: str, preprocessing: Preprocessing) -> Any:
    """A module with `stages` and `feature_info` that gives the feature maps of the last two."""
    if isinstance(backbone, Spec):
        network = RepVGG(backbone, 0, in_chans, block=block, preprocessing=preprocessing)
        features = FeatureExtractor(network, (-2, -1))
        first, last = features.feature_info.reduction()
        if first != last:
            raise InputError(
                f"backbone: last two stages of the same resolution needed, found strides "
                f"{backbone.strides}; `dilated(spec)` has them"
            )
        return features
    if backbone not in RESNETS:
        raise InputError(f"backbone: a spec or one of {RESNETS} needed, found {backbone!r}")
    return DilatedResNet(backbone, in_chans)


def create_pspnet(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int = 19,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """A PSPNet by its name, or its backbone alone; what `create_model` calls for such a name.

    Args:
        name: of `PSPNETS`; other values for fields of the spec may follow, see `parse_spec`.
        pretrained: with the published ImageNet weights of the backbone.
        num_classes, in_chans, options: see `PSPNet`.
        features_only: give the feature maps of the stages `out_indices` in place of logits.
        out_indices: see `FeatureExtractor`.

    Raises:
        InputError: an unknown name or argument; no published weights for this backbone.
    """
    stem, colon, fields = name.partition(":")
    if stem not in PSPNETS:
        raise InputError(f"model {stem!r} is unknown; one of {', '.join(PSPNETS)} needed")
    known = {"width", "drop_rate", "block", "preprocessing", "class_names"}
    if unknown := sorted(set(options) - known):
        raise InputError(f"create_model: unknown arguments {unknown}; {sorted(known)} exist")
    named = PSPNETS[stem]
    if named.network in RESNETS:
        if fields or pretrained:
            raise InputError(f"{stem}: has no fields to change and no published weights")
        if features_only:
            return DilatedResNet(named.network, in_chans, out_indices or range(5))
        return PSPNet(named.network, num_classes, in_chans, **options)
    spec = dilated(parse_spec(f"{named.network}{colon}{fields}"), fast=named.fast)
    options["block"] = block_of(named.network, options.get("block"))
    network = PSPNet(spec, num_classes, in_chans, **options)
    if pretrained:
        network.load_backbone(published_weights(named.network))
    if not features_only:
        return network
    classifier = RepVGG(spec, 0, in_chans, block=network.block)
    classifier.stages = network.backbone.stages
    return FeatureExtractor(classifier, out_indices)


def _require(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise InputError(f"{name}={value!r}: cannot be used for a PSPNet")
