"""Networks that keep their shortcuts: Residual Reorg (Table 7), the double check of Sect. 4.2."""

import copy
import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from repvgg.ablations.blocks import only_3x3
from repvgg.branches import ConvBN, MultiBranchBlock, repvgg_block
from repvgg.errors import InputError
from repvgg.spec import Layer


class ResidualBlock(nn.Module):
    """Two 3×3 layers with batch norm and a shortcut, as in ResNet-18 and -34.

    The shortcut is the input, or 1×1-BN where the first layer changes the shape.
    """

    def __init__(self, first: Layer, second: Layer):
        super().__init__()
        self.first = only_3x3(first)
        self.second = only_3x3(second)
        self.second.activation = nn.Identity()
        self.shortcut = nn.Identity()
        if not first.keeps_shape:
            dense = dataclasses.replace(first, groups=1, dilation=1)
            self.shortcut = ConvBN(dense, (1, 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


def residual_stage(layers: Sequence[Layer]) -> list[nn.Module]:
    """A stage of residual blocks of two layers each; a stage of one layer is that layer.

    Raises:
        InputError: an odd number of layers above 1.
    """
    if len(layers) == 1:
        return [only_3x3(layers[0])]
    if len(layers) % 2:
        raise InputError(f"depths: residual blocks have two layers, found a stage of {len(layers)}")
    return [ResidualBlock(*pair) for pair in zip(layers[::2], layers[1::2], strict=True)]


def replace_conv3x3(model: nn.Module) -> nn.Module:
    """A copy of a model in which a RepVGG block stands for every 3×3 convolution (Sect. 4.2).

    A block has the branches of Sect. 3.2 and no activation of its own; what follows the
    convolution in the model, batch norm and ReLU, still does. New parameters are untrained.
    `repvgg.reparameterize` makes each block one convolution again, and folds the batch norm too.

    Args:
        model: any; convolutions of other sizes than 3×3, of strides that differ in height and
            width, and of another padding than `dilation` stay as they are.

    Raises:
        InputError: no 3×3 convolution that a block can stand for.
    """
    model = copy.deepcopy(model)
    found = [(name, m) for name, m in model.named_modules() if _is_replaceable(m)]
    if not found:
        raise InputError(f"{type(model).__name__}: a 3×3 convolution is needed, found none")
    for name, conv in found:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _block_for(conv))
    return model


def _is_replaceable(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.padding == module.dilation
        and len(set(module.stride)) == len(set(module.dilation)) == 1
    )


def _block_for(conv: nn.Module) -> MultiBranchBlock:
    assert isinstance(conv, nn.Conv2d)
    layer = Layer(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        stride=conv.stride[0],
        groups=conv.groups,
        dilation=conv.dilation[0],
        padding_mode=conv.padding_mode,
    )
    block = repvgg_block(layer)
    block.activation = nn.Identity()
    return block.to(conv.weight.device, conv.weight.dtype)
