"""Networks from specs (paper, Sect. 3.4): stages of blocks, then pooling and a linear head.

One builder makes them all, of the blocks in blocks.py: "repvgg" gives the training-time network,
"plain" the network that it is equal to. They speak timm's interface.

Axes: N images, C channels, H and W.
"""

import inspect
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from repvgg.blocks import BLOCKS, STAGES, build_stage, plain_name
from repvgg.errors import InputError
from repvgg.preprocessing import Preprocessing
from repvgg.spec import (
    DEFAULT_IMAGE_SIZE,
    IMAGE_SIZES,
    NAMED_BLOCKS,
    VARIANTS,
    Spec,
    parse_spec,
)

HUB_FILE = "model.safetensors"

# The variants whose ImageNet weights timm publishes, and where.
PRETRAINED_HUB_IDS = {
    name: f"timm/{name}.rvgg_in1k"
    for name in VARIANTS
    if name not in ("repvgg_b1g2", "repvgg_b2g2", "repvgg_b3g2")
}


class FeatureInfo(list[dict[str, Any]]):
    """A dict for each stage, with timm's keys `num_chs`, `reduction` and `module`."""

    def channels(self) -> list[int]:
        """Channels of each feature map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """Stride of each feature map relative to the image."""
        return [info["reduction"] for info in self]


class RepVGG(nn.Module, ModelHubMixin, library_name="repvgg", tags=["image-classification"]):
    """A classification network: stages of blocks, global average pooling, a linear layer.

    Args:
        spec: the architecture.
        num_classes: outputs of the linear layer; 0 for no linear layer.
        in_chans: channels of the images.
        drop_rate: dropout before the linear layer, as a probability.
        global_pool: "avg", or "" for none, so that the head sees (N, C, H, W).
        block: a name in `BLOCKS` or `STAGES`; "repvgg" trains, "plain" is what it becomes, the
            others are those of Tables 6 and 7 and of later papers.
        preprocessing: what the images went through; ImageNet's at 224 if none is given.
        class_names: one for each class, if known.

    Raises:
        InputError: naming the argument.
    """

    def __init__(
        self,
        spec: Spec,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        block: str = "repvgg",
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        self.classifier: nn.Linear | nn.Identity
        if block not in (known := [*BLOCKS, *STAGES]):
            raise InputError(f"block={block!r}: one of {known} needed")
        if not isinstance(drop_rate, int | float) or not 0 <= drop_rate <= 1:
            raise InputError(f"drop_rate={drop_rate!r}: a number from 0 to 1 needed")
        if preprocessing is None:
            preprocessing = Preprocessing.for_channels(in_chans, DEFAULT_IMAGE_SIZE)
        if preprocessing.channels != in_chans:
            raise InputError(
                f"preprocessing is for {preprocessing.channels} channels, in_chans={in_chans}"
            )
        self.spec = spec
        self.block = block
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.preprocessing = preprocessing
        self.class_names: tuple[str, ...] | None = None
        self.stages = nn.Sequential(
            *(build_stage(block, layers) for layers in spec.layers(in_chans))
        )
        self.num_features = spec.layer_widths()[-1][-1]
        self.dropout = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        if class_names is not None:
            self.set_class_names(class_names)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) → logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) → the last feature map (N, num_features, H/s, W/s)."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map → logits (N, num_classes), or what the linear layer would see."""
        x = self.dropout(self.pool(x))
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """The linear layer, or an identity if there are no classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, untrained linear layer in place; class names are forgotten.

        Raises:
            InputError: a negative number of classes, or another pooling than "avg" and "".
        """
        if type(num_classes) is not int or not 0 <= num_classes <= 10_000_000:
            raise InputError(f"num_classes={num_classes!r}: a whole number, 0 or more, needed")
        if global_pool not in (None, "avg", ""):
            raise InputError(f"global_pool={global_pool!r}: 'avg' or '' needed")
        if num_classes and not (self.global_pool if global_pool is None else global_pool):
            raise InputError(f"num_classes={num_classes} needs global_pool='avg', found ''")
        if global_pool is not None:
            self.global_pool = global_pool
            self.pool = (
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
                if global_pool
                else nn.Identity()
            )
        self.num_classes = num_classes
        self.class_names = None
        like = next(self.stages.parameters())
        self.classifier = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def set_class_names(self, names: Sequence[str]) -> None:
        """Name the classes, in the order of the logits.

        Raises:
            InputError: not one name for each class.
        """
        if not isinstance(names, list | tuple) or len(names) != self.num_classes:
            found = len(names) if isinstance(names, list | tuple) else repr(names)[:40]
            raise InputError(
                f"class_names: a list of {self.num_classes} needed, one for each class; "
                f"found {found}"
            )
        self.class_names = tuple(map(str, names))

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs to build this network again, ready for JSON."""
        return {
            "spec": self.spec.to_dict(),
            "num_classes": self.num_classes,
            "in_chans": self.in_chans,
            "drop_rate": self.drop_rate,
            "global_pool": self.global_pool,
            "block": self.block,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.class_names,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RepVGG":
        """The network that `config` described, untrained, from data that is not trusted.

        Raises:
            InputError: a field that is missing, unknown or holds something else than it should.
        """
        fields = {**config}
        needed = inspect.signature(cls).parameters.keys()
        if fields.keys() != needed:
            raise InputError(f"model: fields {sorted(needed)} needed, found {sorted(fields)}")
        fields["spec"] = Spec.from_dict(fields["spec"])
        fields["preprocessing"] = Preprocessing.from_dict(fields["preprocessing"])
        return cls(**fields)

    def became_plain(self) -> None:
        """Called on a converted network: its name for itself."""
        self.block = plain_name(self.block)

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and stride of the output of each stage."""
        infos, reduction = FeatureInfo(), 1
        widths = self.spec.layer_widths()
        for index, stride in enumerate(self.spec.strides):
            reduction *= stride
            infos.append(
                {
                    "num_chs": widths[index][-1],
                    "reduction": reduction,
                    "module": f"stages.{index}",
                    "index": index,
                }
            )
        return infos

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of input and head, so that timm's own tools work on this."""
        pre = self.preprocessing
        stem = self.stages.get_submodule("0.0").named_modules()
        convs = tuple(f"stages.0.0.{name}" for name, m in stem if isinstance(m, nn.Conv2d))
        return {
            "input_size": (self.in_chans, pre.size, pre.size),
            "num_classes": self.num_classes,
            "crop_pct": pre.crop_pct,
            "interpolation": pre.interpolation,
            "mean": pre.mean,
            "std": pre.std,
            "first_conv": convs,
            "classifier": "classifier",
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        from repvgg.checkpoint import save

        save(self, save_directory / HUB_FILE)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **unused: Any,
    ) -> "RepVGG":
        """What `from_pretrained` of the hub's mixin calls: a local folder or a hub repository."""
        from repvgg.checkpoint import load

        if os.path.isdir(model_id):
            return load(Path(model_id) / HUB_FILE)
        return load(
            hf_hub_download(
                model_id,
                HUB_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        )


class FeatureExtractor(nn.Module):
    """The stages of a network alone; gives the feature maps that detectors and decoders take.

    Args:
        network: whose stages to take; they are shared, not copied.
        out_indices: stages whose output is wanted, counted from 0; all if not given.

    Raises:
        InputError: a stage that does not exist.
    """

    def __init__(self, network: RepVGG, out_indices: Sequence[int] | None = None):
        super().__init__()
        count = len(network.stages)
        wanted = list(range(count)) if out_indices is None else list(out_indices)
        if not wanted or any(not -count <= index < count for index in wanted):
            raise InputError(f"out_indices={out_indices}: stages 0 to {count - 1} exist")
        self.out_indices = tuple(sorted({index % count for index in wanted}))
        self.stages = network.stages[: self.out_indices[-1] + 1]
        self.feature_info = FeatureInfo(network.feature_info[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, C, H, W) → a feature map for each wanted stage, the largest first."""
        return stage_outputs(self.stages, x, self.out_indices)


def stage_outputs(stages: Iterable[nn.Module], x: Tensor, wanted: Container[int]) -> list[Tensor]:
    """What stages that follow one another give, for those of the wanted indices."""
    features = []
    for index, stage in enumerate(stages):
        x = stage(x)
        if index in wanted:
            features.append(x)
    return features


@overload
def create_model(
    model: str | Spec, *, features_only: Literal[False] = False, **options: Any
) -> RepVGG: ...
@overload
def create_model(
    model: str | Spec, *, features_only: Literal[True], **options: Any
) -> FeatureExtractor: ...
def create_model(
    model: str | Spec,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **options: Any,
) -> RepVGG | FeatureExtractor:
    """A network by name or spec; its block is the training-time one unless `block` says otherwise.

    A name that begins with `pspnet_` makes a `PSPNet`, and takes its arguments.

    Args:
        model: a name of `list_models()`, a name with changed fields (see `spec.parse_spec`), or a
            spec.
        pretrained: fetch timm's published ImageNet weights, or take them from the hub's cache.
            With another number of classes the linear layer stays untrained.
        num_classes: see `RepVGG`; 1000 if not given, 19 of a PSPNet.
        in_chans: see `RepVGG`.
        features_only: give the feature maps of the stages `out_indices` in place of logits.
        out_indices: see `FeatureExtractor`.
        options: further keyword arguments of `RepVGG`.

    Raises:
        InputError: an unknown name or argument; no published weights for this network.
    """
    if out_indices is not None and not features_only:
        raise InputError("out_indices is only for features_only=True")
    if isinstance(model, str) and model.startswith("pspnet_"):
        from repvgg.segmentation.pspnet import create_pspnet  # which imports this module

        return create_pspnet(  # pyright: ignore[reportReturnType] - named so by its caller
            model,
            pretrained=pretrained,
            num_classes=19 if num_classes is None else num_classes,
            in_chans=in_chans,
            features_only=features_only,
            out_indices=out_indices,
            **options,
        )
    known = {"drop_rate", "global_pool", "block", "preprocessing", "class_names"}
    if unknown := sorted(set(options) - known):
        raise InputError(f"create_model: unknown arguments {unknown}; {sorted(known)} exist")
    if not isinstance(model, str | Spec):
        raise InputError(f"model={model!r}: a name or a Spec needed")
    spec = parse_spec(model) if isinstance(model, str) else model
    if isinstance(model, str) and options.get("preprocessing") is None:
        size = IMAGE_SIZES.get(model.partition(":")[0], DEFAULT_IMAGE_SIZE)
        options["preprocessing"] = Preprocessing.for_channels(in_chans, size)
    options["block"] = block_of(model, options.get("block"))
    classes = 1000 if num_classes is None else num_classes
    network = RepVGG(spec, classes, in_chans, **options)
    if pretrained:
        _load_pretrained(network, model)
    return FeatureExtractor(network, out_indices) if features_only else network


def block_of(model: str | Spec, block: str | None) -> str:
    """The block that is asked for; where none or "plain" is, the named network's own."""
    name = model.partition(":")[0] if isinstance(model, str) else ""
    trained = NAMED_BLOCKS.get(name, "repvgg")
    if block is None:
        return trained
    return plain_name(trained) if block == "plain" else block


def _load_pretrained(network: RepVGG, model: str | Spec) -> None:
    from repvgg.checkpoint import load_weights

    load_weights(network, published_weights(model))
    if network.num_classes == len(imagenet := imagenet_class_names()):
        network.set_class_names(imagenet)


def published_weights(model: str | Spec) -> str:
    """Path of timm's published ImageNet weights, fetched into the hub's cache if need be.

    Raises:
        InputError: there are none for this network, or they cannot be fetched.
    """
    if not isinstance(model, str) or model not in PRETRAINED_HUB_IDS:
        raise InputError(
            f"pretrained: no published weights for {model!r}; "
            f"there are for {', '.join(PRETRAINED_HUB_IDS)}"
        )
    hub_id = PRETRAINED_HUB_IDS[model]
    try:
        return hf_hub_download(hub_id, HUB_FILE)
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"pretrained: {hub_id} is neither in the hub's cache nor can it be fetched "
            f"({str(error).splitlines()[0]})"
        ) from error


def imagenet_class_names() -> list[str]:
    """The 1,000 classes of ImageNet-1k, in the order of the published weights' logits."""
    from torchvision.models import ResNet18_Weights

    return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
