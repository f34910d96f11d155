"""For several test files: Eq. 1–4 of the paper as NumPy loops, random models, images, shards."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported. Its threads otherwise spin while they wait for one another, which on a
# machine that does something else too made these tests 17 times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from torch import nn

from repvgg.data.pack import Pack
from shard_files import jpeg


@pytest.fixture(scope="session")
def naive_conv() -> Callable[..., np.ndarray]:
    return _naive_conv


def _naive_conv(image, kernel, bias=None, *, stride=1, groups=1, dilation=1, padding=(0, 0)):
    """(N, C, H, W) * (O, I, h, w) → (N, O, H', W'), zero-padded, with one loop for each axis."""
    image, kernel = np.asarray(image, dtype=np.float64), np.asarray(kernel, dtype=np.float64)
    image = np.pad(image, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    count, _, height, width = image.shape
    outputs, per_group, rows, columns = kernel.shape
    high = (height - dilation * (rows - 1) - 1) // stride + 1
    wide = (width - dilation * (columns - 1) - 1) // stride + 1
    result = np.zeros((count, outputs, high, wide))
    for n, o, y, x in np.ndindex(result.shape):
        first = o // (outputs // groups) * per_group
        for i, row, column in np.ndindex(per_group, rows, columns):
            pixel = image[n, first + i, y * stride + row * dilation, x * stride + column * dilation]
            result[n, o, y, x] += pixel * kernel[o, i, row, column]
        result[n, o, y, x] += 0 if bias is None else float(bias[o])
    return result


@pytest.fixture(scope="session")
def naive_norm() -> Callable[..., np.ndarray]:
    """Eq. 2, with σ² = var + eps."""

    def bn(features, mean, var, gamma, beta, eps):
        result = np.zeros_like(features)
        for c in range(features.shape[1]):
            sigma = np.sqrt(float(var[c]) + eps)
            result[:, c] = (features[:, c] - float(mean[c])) * float(gamma[c]) / sigma + float(
                beta[c]
            )
        return result

    return bn


@pytest.fixture(scope="session")
def randomized() -> Callable[..., Any]:
    """A function that gives every batch norm of a model statistics, scale and shift at random."""

    def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        norms: list[Any] = [m for m in model.modules() if hasattr(m, "running_mean")]
        for norm in norms:
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            if norm.weight is not None:
                norm.weight.data.uniform_(0.5, 1.5, generator=generator)
                norm.bias.data.normal_(0, 0.3, generator=generator)
        return model

    return randomize


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Largest |difference| over the largest |expected|."""

    def error(expected: torch.Tensor, actual: torch.Tensor) -> float:
        assert expected.shape == actual.shape
        difference = (expected.double() - actual.double()).abs().max().item()
        return difference / expected.abs().max().item() if difference else 0.0

    return error


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEG files to train on and 10 to test on, each of 75 kB, in two classes."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 30), ("val", 5)):
        for label, name in enumerate(("ant", "bée")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                ending = ("jpg", "JPEG", "jpeg")[index % 3]
                path = root / split / name / f"{name}.{index} {label}.{ending}"
                path.write_bytes(jpeg(1000 * label + index, (400, 300)))
    return root


@pytest.fixture(scope="session")
def packed(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as shards of at most 1 MB."""
    output = tmp_path_factory.mktemp("shards")
    Pack(image_folder, output, shard_megabytes=1).run()
    return output


# Where real images may be: extracted, or as archives beside the checkout.
ROOT = Path(__file__).parent.parent
DATA_FOLDERS = (ROOT / ".data", ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def imagenet_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one photograph for each class of ImageNet, in a folder a class."""
    return _real_data("imagenet_sample", tmp_path_factory)


@pytest.fixture(scope="session")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CamVid: train/, val/ and test/, in each images/ and labels/."""
    return _real_data("camvid", tmp_path_factory)


def _real_data(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for folder in DATA_FOLDERS:
        if (extracted := folder / name).is_dir():
            return extracted
        if (archive := folder / f"{name}.tar").is_file():
            target = tmp_path_factory.mktemp("data")
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
            return target / name
    pytest.skip(f"no {name} in {' or '.join(map(str, DATA_FOLDERS))}")
