"""The whitened stem, by the statistics of what it shows."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from repvgg import Spec, create_model
from repvgg.data.images import Images, open_images
from repvgg.data.transforms import evaluation_transform, normalize
from repvgg.errors import InputError
from repvgg.preprocessing import Preprocessing
from repvgg.training.config import TrainConfig
from repvgg.training.whitening import patch_covariance, whiten_stem


def photographs(channels=3):
    """Smooth random images, 16×16, whose neighbouring pixels are alike as a photograph's are."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (40, 5, 5, channels), dtype=np.uint8)

    def decode(index):
        image = Image.fromarray(coarse[index].squeeze())
        return image.resize((16, 16), Image.Resampling.BICUBIC)

    return Images([str(i) for i in range(40)], [0] * 40, ("a",), channels, decode)


def normalized(images, preprocessing):
    transform = evaluation_transform(preprocessing)
    batch = torch.stack([transform(images.decode(index)) for index in range(len(images))])
    return normalize(batch, preprocessing).double()


def test_the_covariance_is_numpys():
    preprocessing = Preprocessing.for_channels(3, 16)
    x = normalized(photographs(), preprocessing).numpy()
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    patches = patches.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    found = patch_covariance(photographs(), preprocessing, stride=2)
    np.testing.assert_allclose(found, np.cov(patches.T, bias=True), atol=1e-12)


@pytest.mark.parametrize(("channels", "width"), [(3, 54), (3, 20), (3, 60), (1, 18)])
def test_the_stem_shows_uncorrelated_directions_of_unit_variance_in_both_signs(channels, width):
    images = photographs(channels)
    preprocessing = Preprocessing.for_channels(channels, 16)
    spec = Spec((1, 1), strides=(2, 1), widths=(width, 8))
    torch.manual_seed(0)
    network = create_model(spec, num_classes=2, in_chans=channels, preprocessing=preprocessing)
    kernel = network.get_parameter("stages.0.0.branches.conv3x3.conv.weight")
    drawn = kernel.detach().clone()
    whiten_stem(network, images)
    count = min(width // 2, 9 * channels)
    shown = F.conv2d(normalized(images, preprocessing), kernel.double(), stride=2)
    shown = shown.transpose(0, 1).flatten(1)
    identity = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(shown[:count], correction=0), identity, atol=1e-4, rtol=0)
    torch.testing.assert_close(shown[count : 2 * count], -shown[:count])
    assert torch.equal(kernel[2 * count :], drawn[2 * count :])
    assert not kernel.requires_grad
    assert not network.get_parameter("stages.0.0.branches.conv1x1.bn.weight").any()


def test_images_of_one_colour_give_a_finite_stem():
    images = dataclasses.replace(
        photographs(), decode=lambda index: Image.new("RGB", (16, 16), (9, 9, 9))
    )
    network = create_model("repvgg_cifar:depths=1-1-1-1,widths=16-4-4-4", num_classes=2)
    whiten_stem(network, images)
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_broken_images_are_passed_over_unless_all_are():
    def decode(index):
        if index % 2:
            raise InputError("broken")
        return photographs().decode(index)

    def fail(index):
        raise InputError("broken")

    preprocessing = Preprocessing.for_channels(3, 16)
    half = dataclasses.replace(photographs(), decode=decode)
    assert patch_covariance(half, preprocessing, 2).diagonal().min() > 0
    with pytest.raises(InputError, match="images that can be decoded are needed"):
        patch_covariance(dataclasses.replace(half, decode=fail), preprocessing, 2)


def test_it_is_for_blocks_with_a_normalized_3x3_branch_and_without_pretrained_weights():
    for block in ("plain", "norm_after_addition"):
        network = create_model("repvgg_digits", num_classes=10, in_chans=1, block=block)
        with pytest.raises(InputError, match=f"whiten_stem: .* found block '{block}'"):
            whiten_stem(network, open_images("digits", "train"))
    with pytest.raises(InputError, match="whiten_stem: for a network without pretrained"):
        TrainConfig(whiten_stem=True, pretrained="hub")
