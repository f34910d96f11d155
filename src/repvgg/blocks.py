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
}

# Of these a stage is made as a whole: they are no blocks of one layer, and never become plain.
STAGES: dict[str, Callable[[Sequence[Layer]], list[nn.Module]]] = {
    "residual_reorg": residual_stage,
}


def build_stage(block: str, layers: Sequence[Layer]) -> nn.Sequential:
    """A stage of a network, of a block in `BLOCKS` or `STAGES`."""
    if block in STAGES:
        return nn.Sequential(*STAGES[block](layers))
    return nn.Sequential(*map(BLOCKS[block], layers))
