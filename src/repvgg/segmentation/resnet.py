"""The dilated ResNet-50/101 of the official PSPNet (paper, Sect. 4.3), of timm's parts."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from repvgg.errors import InputError
from repvgg.model import FeatureInfo, stage_outputs

DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class DilatedBottleneck(Bottleneck):
    """A bottleneck whose 3×3 layer has the dilation of its stage in the first block too.

    timm's own first block of a stage has the dilation of the stage before it.
    """

    def __init__(self, *args: Any, first_dilation: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)


class DilatedResNet(nn.Module):
    """Stem of three 3×3 layers and four stages; the last two have stride 1 and dilations 2 and 4.

    Args:
        name: a key of `DEPTHS`.
        in_chans: channels of the images.
        out_indices: of stem (0) and stages (1 to 4), those whose feature maps are given.

    Raises:
        InputError: a stage that does not exist.
    """

    def __init__(self, name: str, in_chans: int = 3, out_indices: Sequence[int] = (-2, -1)):
        super().__init__()
        network: Any = ResNet(
            DilatedBottleneck,  # pyright: ignore[reportArgumentType] - a class is what it takes
            DEPTHS[name],
            num_classes=0,
            in_chans=in_chans,
            output_stride=8,
            stem_type="deep",
            stem_width=64,
        )
        stem = OrderedDict(
            conv=network.conv1, bn=network.bn1, act=network.act1, pool=network.maxpool
        )
        stages = nn.Sequential(
            nn.Sequential(stem), network.layer1, network.layer2, network.layer3, network.layer4
        )
        if not out_indices or any(not -5 <= index < 5 for index in out_indices):
            raise InputError(f"out_indices={out_indices}: 0 (stem) to 4 exist")
        self.out_indices = tuple(sorted({index % 5 for index in out_indices}))
        self.stages = stages[: self.out_indices[-1] + 1]
        # The first entry of timm's is the stem before its pooling, which halves the map once more.
        infos = [{**network.feature_info[0], "reduction": 4}, *network.feature_info[1:]]
        self.feature_info = FeatureInfo(
            {**infos[index], "module": f"stages.{index}", "index": index}
            for index in self.out_indices
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, C, H, W) → a feature map for each wanted stage, in their order."""
        return stage_outputs(self.stages, x, self.out_indices)
