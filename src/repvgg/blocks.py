"""Every block that a network can be built of, by name."""

from collections.abc import Callable, Sequence

from torch import nn

from repvgg.ablations import blocks
from repvgg.ablations.residual import residual_stage
from repvgg.branches import repvgg_block
from repvgg.plain import plain_block
from repvgg.spec import Layer

BlockFactory = Callable[[Layer], nn.Module]

BLOCKS: dict[str, BlockFactory] = {
    "repvgg": repvgg_block,
    "plain": plain_block,
    "only_3x3": blocks.only_3x3,
    "without_1x1": blocks.without_1x1,
    "without_identity": blocks.without_identity,
    "identity_without_norm": blocks.identity_without_norm,
    "norm_after_addition": blocks.norm_after_addition,
    "relu_in_branches": blocks.relu_in_branches,
    "diracnet": blocks.diracnet,
    "trivial": blocks.trivial,
    "asymmetric": blocks.asymmetric,
    "diverse_branch": blocks.diverse_branch,
    "mobileone": blocks.mobileone,
    "quantization_aware": blocks.quantization_aware,
    "squeeze_excite": blocks.squeeze_excite,
    "squeeze_excite_plain": blocks.squeeze_excite_plain,
    "post_squeeze_excite": blocks.post_squeeze_excite,
    "post_squeeze_excite_plain": blocks.post_squeeze_excite_plain,
}


# What a trained block becomes, where that is more than a convolution and ReLU.
PLAIN_OF = {
    "squeeze_excite": "squeeze_excite_plain",
    "post_squeeze_excite": "post_squeeze_excite_plain",
}


def is_plain(block: str) -> bool:
    """Whether nothing of a block is left to fold."""
    return block == "plain" or block in PLAIN_OF.values()


def plain_name(block: str) -> str:
    """The name of what a block becomes; its own if it stays as it is."""
    return block if is_plain(block) or block in STAGES else PLAIN_OF.get(block, "plain")


def trained_name(block: str) -> str:
    """The name of the usual block that becomes this one; its own if it is not plain."""
    usual = {plain: trained for trained, plain in PLAIN_OF.items()}
    return usual.get(block, "repvgg") if is_plain(block) else block


# Of these a stage is made as a whole: they are no blocks of one layer, and never become plain.
STAGES: dict[str, Callable[[Sequence[Layer]], list[nn.Module]]] = {
    "residual_reorg": residual_stage,
}


def build_stage(block: str, layers: Sequence[Layer]) -> nn.Sequential:
    """A stage of a network, of a block in `BLOCKS` or `STAGES`."""
    if block in STAGES:
        return nn.Sequential(*STAGES[block](layers))
    return nn.Sequential(*map(BLOCKS[block], layers))
