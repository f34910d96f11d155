"""The blocks of Tables 6 and 7, and of later papers, as lists of branches.

Each is a function from a layer to a block, so that `create_model(…, block=NAME)` makes a network of
it; all but "relu_in_branches" fold into the same plain network.
"""

from collections import OrderedDict

from torch import nn
from torchvision.ops import SqueezeExcitation

from repvgg.ablations.branches import (
    Dirac,
    Identity,
    NormedSum,
    PointwiseThen,
    Rectified,
    Trivial,
)
from repvgg.branches import Branch, Conv, ConvBN, IdentityBN, MultiBranchBlock
from repvgg.plain import plain_conv
from repvgg.spec import Layer

MOBILEONE_BRANCHES = 4


def standard(layer: Layer, *, pointwise: bool = True, identity: bool = True) -> dict[str, Branch]:
    """The branches of Sect. 3.2, or some of them."""
    branches: dict[str, Branch] = {"conv3x3": ConvBN(layer, (3, 3))}
    if pointwise:
        branches["conv1x1"] = ConvBN(layer, (1, 1))
    if identity and layer.keeps_shape:
        branches["identity"] = IdentityBN(layer)
    return branches


# Table 6


def only_3x3(layer: Layer) -> MultiBranchBlock:
    """Without both branches: an ordinary plain network with batch norm."""
    return MultiBranchBlock(layer, standard(layer, pointwise=False, identity=False))


def without_1x1(layer: Layer) -> MultiBranchBlock:
    """3×3 and identity."""
    return MultiBranchBlock(layer, standard(layer, pointwise=False))


def without_identity(layer: Layer) -> MultiBranchBlock:
    """3×3 and 1×1."""
    return MultiBranchBlock(layer, standard(layer, identity=False))


# Table 7


def identity_without_norm(layer: Layer) -> MultiBranchBlock:
    """ "Identity w/o BN": the identity branch is the input itself."""
    branches = standard(layer, identity=False)
    if layer.keeps_shape:
        branches["identity"] = Identity(layer)
    return MultiBranchBlock(layer, branches)


def norm_after_addition(layer: Layer) -> MultiBranchBlock:
    """ "Post-addition BN": three branches without batch norm, one after their sum."""
    return _norm_after(layer, Conv(layer))


def relu_in_branches(layer: Layer) -> MultiBranchBlock:
    """ "+ReLU in branch": after the batch norm of each; it cannot be folded."""
    branches = standard(layer)
    return MultiBranchBlock(layer, {name: Rectified(branches[name]) for name in branches})


def diracnet(layer: Layer) -> MultiBranchBlock:
    """DiracNet's layer, then batch norm."""
    return MultiBranchBlock(layer, {"dirac": Dirac(layer)})


def trivial(layer: Layer) -> MultiBranchBlock:
    """ "Trivial Re-param": I + W, then batch norm."""
    return MultiBranchBlock(layer, {"trivial": Trivial(layer)})


def asymmetric(layer: Layer) -> MultiBranchBlock:
    """Asymmetric Conv Block (ACNet, Ding et al., ICCV 2019): 3×3, 1×3 and 3×1, each with BN."""
    sizes = {"conv3x3": (3, 3), "conv1x3": (1, 3), "conv3x1": (3, 1)}
    return MultiBranchBlock(layer, {name: ConvBN(layer, size) for name, size in sizes.items()})


# Of other papers, since people deploy them


def diverse_branch(layer: Layer) -> MultiBranchBlock:
    """Diverse Branch Block (Ding et al., CVPR 2021): 3×3, 1×1, 1×1-3×3 and 1×1-average."""
    branches: dict[str, Branch] = {
        **standard(layer, identity=False),
        "conv1x1_3x3": PointwiseThen(layer),
        "conv1x1_average": PointwiseThen(layer, pooled=True),
    }
    return MultiBranchBlock(layer, branches)


def mobileone(layer: Layer) -> MultiBranchBlock:
    """MobileOne (Vasu et al., CVPR 2023): four 3×3-BN beside 1×1-BN and identity-BN."""
    branches = standard(layer)
    more: dict[str, Branch] = {
        f"conv3x3_{number}": ConvBN(layer) for number in range(2, MOBILEONE_BRANCHES + 1)
    }
    return MultiBranchBlock(layer, {**branches, **more})


def quantization_aware(layer: Layer) -> MultiBranchBlock:
    """QARepVGG (Chu et al., AAAI 2024): BN on the 3×3 branch alone, and after the addition."""
    return _norm_after(layer, ConvBN(layer))


def _norm_after(layer: Layer, conv3x3: Branch) -> MultiBranchBlock:
    """A 3×3 branch, and 1×1 and identity without batch norm; one after their sum."""
    branches: dict[str, Branch] = {"conv3x3": conv3x3, "conv1x1": Conv(layer, (1, 1))}
    if layer.keeps_shape:
        branches["identity"] = Identity(layer)
    return MultiBranchBlock(layer, {"sum": NormedSum(layer, branches)})


def squeeze_excite(layer: Layer) -> MultiBranchBlock:
    """Of timm's RepVGG-D2se: squeeze-and-excitation of 1/16 after the addition, then SiLU."""
    return MultiBranchBlock(layer, standard(layer), _squeeze_then_silu(layer))


def squeeze_excite_plain(layer: Layer) -> nn.Sequential:
    """What `squeeze_excite` becomes."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](conv=plain_conv(layer), activation=_squeeze_then_silu(layer))
    )


def post_squeeze_excite(layer: Layer) -> MultiBranchBlock:
    """Of the authors' RepVGGplus: squeeze-and-excitation of 1/4 after the ReLU."""
    return MultiBranchBlock(layer, standard(layer), _relu_then_squeeze(layer))


def post_squeeze_excite_plain(layer: Layer) -> nn.Sequential:
    """What `post_squeeze_excite` becomes."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](conv=plain_conv(layer), activation=_relu_then_squeeze(layer))
    )


def _squeeze_then_silu(layer: Layer) -> nn.Sequential:
    width = layer.out_channels
    return nn.Sequential(SqueezeExcitation(width, max(1, width // 16)), nn.SiLU(inplace=True))


def _relu_then_squeeze(layer: Layer) -> nn.Sequential:
    width = layer.out_channels
    return nn.Sequential(nn.ReLU(inplace=True), SqueezeExcitation(width, max(1, width // 4)))
