"""Auxiliary classifiers in training, as published with RepVGGplus; the paper's networks have none.

From the authors' repository (DingXiaoH/RepVGG, repvggplus.py and main.py): a head after each stage
between the first and the last, of the last of these after its first half; the cross-entropy of each
head counts a tenth of the network's own.

Axes: N images, C channels, H and W.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repvgg.errors import InputError
from repvgg.model import RepVGG


class Supervised(nn.Module):
    """A network and the heads that it trains with.

    The network is the one that is given, and knows nothing of them: what is tested, saved and
    converted is the network alone.

    Args:
        network: whose blocks are run; it is not copied.

    Raises:
        InputError: a network without a stage between the first and the last, or without classes.
    """

    def __init__(self, network: RepVGG):
        super().__init__()
        if len(network.stages) < 3 or not network.num_classes:
            raise InputError(
                "auxiliary_weight: heads need a network of 3 stages or more and of classes, found "
                f"{len(network.stages)} stages and {network.num_classes} classes"
            )
        self.network = network
        # A list, so that no module of the network is one of this a second time.
        self.parts = [nn.Sequential(*part) for part in _parts(network.stages)]
        widths = (_last_width(network, part) for part in self.parts[:-1])
        self.heads = nn.ModuleList(head(width, network.num_classes) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) → logits (1 + heads, N, num_classes), the network's own first."""
        logits = []
        for part, of_part in zip(self.parts, self.heads, strict=False):  # the last part has none
            x = part(x)
            logits.append(of_part(x))
        return torch.stack((self.network.forward_head(self.parts[-1](x)), *logits))


def head(width: int, num_classes: int) -> nn.Sequential:
    """3×3-BN of stride 2, ReLU, average, linear layer: (N, width, H, W) → (N, num_classes)."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            bn=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(1),
            classifier=nn.Linear(width, num_classes),
        )
    )


def _parts(stages: nn.Sequential) -> Sequence[list[nn.Module]]:
    """The blocks up to each head, and after the last one."""
    first, *middle, last = [list(stage) for stage in stages]  # pyright: ignore[reportArgumentType]
    half = max(1, len(middle[-1]) // 2)
    *before, split = middle
    parts = [*before, split[:half], [*split[half:], *last]]
    return [[*first, *parts[0]], *parts[1:]]


def _last_width(network: RepVGG, part: nn.Sequential) -> int:
    """Channels of what a part gives, by where its last block stands."""
    for stage, widths in zip(network.stages, network.spec.layer_widths(), strict=True):
        blocks = list(stage)  # pyright: ignore[reportArgumentType]
        if part[-1] in blocks:
            # A block may be of several layers.
            return widths[(blocks.index(part[-1]) + 1) * len(widths) // len(blocks) - 1]
    raise AssertionError("a part of another network")
