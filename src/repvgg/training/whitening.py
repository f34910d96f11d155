"""A stem that sees the directions in which the images' patches vary, each as much as any other.

As in K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), Sect. 3.1, for the 3×3
branch of a RepVGG block. Pixels beside one another are nearly equal, so that nearly all that a
random kernel shows is their mean; of these kernels each shows something else.
"""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.branches import ConvBN, MultiBranchBlock
from repvgg.data.images import Images
from repvgg.data.transforms import evaluation_transform, normalize
from repvgg.errors import InputError
from repvgg.model import RepVGG
from repvgg.preprocessing import Preprocessing

IMAGES = 1000


@torch.no_grad()
def whiten_stem(network: RepVGG, images: Images) -> None:
    """Fix the 3×3 kernel of the first layer to the principal directions of patches.

    Two output channels for each direction, of either sign, so that ReLU loses nothing; first those
    of largest variance, which is then made 1. Channels beyond two for each direction keep their
    kernel. The kernel needs no gradient any more; its batch norm and the 1×1 branch learn, the
    latter from 0 on.

    Args:
        network: of the block "repvgg", or of another with a 3×3 branch with batch norm.
        images: of which up to 1,000 are looked at, evenly spaced.

    Raises:
        InputError: the first block has no such branch.
    """
    stem = cast(torch.nn.Sequential, network.stages[0])[0]
    branches = dict(stem.branches.items()) if isinstance(stem, MultiBranchBlock) else {}
    dense, pointwise = branches.get("conv3x3"), branches.get("conv1x1")
    if not isinstance(dense, ConvBN):
        raise InputError(
            f"whiten_stem: a first block with a 3×3 branch with batch norm is needed, "
            f"found block {network.block!r}"
        )
    kernel = dense.conv.weight
    covariance = patch_covariance(images, network.preprocessing, network.spec.strides[0])
    variances, directions = torch.linalg.eigh(covariance)
    count = min(len(kernel) // 2, len(variances))
    # The floor is for images without any variance, as of one colour.
    scales = variances.flip(0)[:count].clamp_min(1e-8).rsqrt()
    whitening = (directions.flip(1)[:, :count] * scales).T.reshape(count, *kernel.shape[1:])
    kernel[: 2 * count] = torch.cat([whitening, -whitening]).to(kernel)
    kernel.requires_grad_(False)
    if isinstance(pointwise, ConvBN):
        torch.nn.init.zeros_(pointwise.bn.weight)


def patch_covariance(images: Images, preprocessing: Preprocessing, stride: int) -> Tensor:
    """(9 C, 9 C), fp64, of the 3×3 patches of normalized images, flattened as kernels are.

    Broken images are passed over.

    Raises:
        InputError: none of the images can be decoded.
    """
    transform = evaluation_transform(preprocessing)
    moments = []
    for index in np.linspace(0, len(images) - 1, min(IMAGES, len(images))).round().astype(int):
        try:
            image = transform(images.decode(int(index)))
        except InputError:
            continue
        patches = F.unfold(normalize(image[None], preprocessing).double(), 3, stride=stride)[0]
        moments.append((patches.mean(1), patches @ patches.T / patches.shape[1]))
    if not moments:
        raise InputError("whiten_stem: images that can be decoded are needed, found none")
    means, products = (torch.stack(parts).mean(0) for parts in zip(*moments, strict=True))
    return products - torch.outer(means, means)
