"""What every block becomes: one 3×3 convolution with bias + ReLU, of torch's own modules only."""

from collections import OrderedDict

from torch import nn

from repvgg.spec import Layer


def plain_conv(layer: Layer) -> nn.Conv2d:
    """The 3×3 convolution of a layer, with bias: (N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        3,
        stride=layer.stride,
        padding=layer.dilation,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )


def plain_block(layer: Layer) -> nn.Sequential:
    """`plain_conv`, then ReLU."""
    return nn.Sequential(OrderedDict(conv=plain_conv(layer), relu=nn.ReLU(inplace=True)))
