"""Sources of labelled images: folders, tar shards, CIFAR-10, the digits of scikit-learn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

from repvgg.errors import InputError

Split = Literal["train", "test"]

# Names under which people keep the images that a network is not trained on.
TEST_FOLDERS = ("val", "test", "validation", "valid")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Images:
    """Labelled images, decoded when they are asked for.

    Attributes:
        names: what to call each image in a message: its path, or its number.
        labels: class index of each image.
        class_names: in the order of the labels.
        channels: 1 or 3.
        decode: index → 8-bit image of mode L or RGB; it travels to worker processes.
        groups: ranges of indices, of images that must be fetched together before one of them is
            decoded; empty where all are at hand. See `epoch_order`.
        fetch: brings the group of this number here; None where all are at hand.
    """

    names: Sequence[str]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    channels: int
    decode: Callable[[int], Image.Image]
    groups: tuple[range, ...] = ()
    fetch: Callable[[int], object] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def open_images(source: str, split: Split) -> Images:
    """Images by the name of their source.

    Args:
        source: a folder with `train/` and `val/` (or `test/`) in it, each with a folder a class,
            or a folder of class folders itself, which serves as either split; a folder that
            `repvgg pack` made; `shards:WHERE` for tar shards, see `open_shards`; `digits` for the
            8×8 digits of scikit-learn; `cifar10:DIR` for CIFAR-10, downloaded into DIR if need be.
        split: which part.

    Raises:
        InputError: no such folder, or one without images in every class folder.
    """
    from repvgg.data.shards import is_packed, open_shards

    if source == "digits":
        return _digits(split)
    kind, colon, folder = source.partition(":")
    if kind == "cifar10" and colon:
        return _cifar10(folder, split)
    if kind == "shards" and colon:
        return open_shards(folder, split)
    if is_packed(Path(source)):
        return open_shards(source, split)
    return folder_images(_split_folder(Path(source), split))


def _split_folder(root: Path, split: Split) -> Path:
    _require_folder(root)
    has_train = (root / "train").is_dir()
    if not has_train and (split == "train" or not _test_folder(root)):
        return root
    if split == "train":
        return root / "train"
    folder = _test_folder(root)
    if folder is None:
        raise InputError(f"{root}: a folder {' or '.join(TEST_FOLDERS)} beside train is needed")
    return folder


def split_folders(root: Path) -> dict[str, Path]:
    """The parts of a folder of images that are there: `train` and `val`, or else `images` alone.

    Raises:
        InputError: no such folder.
    """
    _require_folder(root)
    parts = {"train": root / "train", "val": _test_folder(root)}
    found = {name: path for name, path in parts.items() if path and path.is_dir()}
    return found or {"images": root}


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise InputError(f"{root}: a folder of images is needed, found {found}")


def _test_folder(root: Path) -> Path | None:
    return next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)


def folder_images(root: Path) -> Images:
    """Images in one folder a class; the classes are the sorted names of the folders.

    Raises:
        InputError: no class folders, or one that is empty.
    """
    from torchvision.datasets import ImageFolder

    if not any(path.is_dir() for path in root.iterdir()):
        raise InputError(f"{root}: a folder for each class is needed, found no folder in it")
    try:
        folder = ImageFolder(root, is_valid_file=_is_image)
    except FileNotFoundError as error:
        raise InputError(f"{root}: {str(error).splitlines()[0]}") from error
    paths = [path for path, _ in folder.samples]
    return Images(
        names=paths,
        labels=folder.targets,
        class_names=tuple(folder.classes),
        channels=3,
        decode=partial(_decode_path, paths),
    )


def _cifar10(folder: str, split: Split) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        cifar = CIFAR10(folder, train=split == "train", download=not _has_cifar10(folder))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{folder}: CIFAR-10 is not complete there and cannot be downloaded ({error})"
        ) from error
    return Images(
        names=[f"CIFAR-10 {split} image {index}" for index in range(len(cifar))],
        labels=cifar.targets,
        class_names=tuple(cifar.classes),
        channels=3,
        decode=partial(_decode_array, cifar.data),
    )


def _has_cifar10(folder: str) -> bool:
    return (Path(folder) / "cifar-10-batches-py").is_dir()


def _digits(split: Split) -> Images:
    """1,437 images to train on and 360 to test on, 8×8, 17 grey levels, equal shares of classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    parts: Any = train_test_split(
        np.round(digits.images * (255 / 16)).astype(np.uint8),
        digits.target,
        test_size=360,
        stratify=digits.target,
        random_state=0,
    )
    pixels, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return Images(
        names=[f"digits {split} image {index}" for index in range(len(labels))],
        labels=labels.tolist(),
        class_names=tuple("0123456789"),
        channels=1,
        decode=partial(_decode_array, pixels),
    )


def _decode_path(paths: list[str], index: int) -> Image.Image:
    return decode_image(paths[index], 3)


def _decode_array(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def find_images(path: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; of a file, itself.

    Raises:
        InputError: nothing there, or a folder without images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: an image or a folder of images is needed, found nothing")
    found = sorted(file for file in path.rglob("*") if _is_image(str(file)) and file.is_file())
    if not found:
        raise InputError(f"{path}: holds no image ({', '.join(EXTENSIONS)})")
    return found


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def decode_image(path: str | Path, channels: int, content: BinaryIO | None = None) -> Image.Image:
    """An image file as 8-bit RGB or grey, turned as its EXIF orientation says.

    Args:
        path: of the file.
        channels: 3 or 1.
        content: the file, if it is open; the path then only names it in messages.

    Raises:
        InputError: the file cannot be read or decoded, has more pixels than any honest image
            (Pillow's bound), more than 8 bits a channel, or `channels` is not 1 or 3.
    """
    if channels not in (1, 3):
        raise InputError(f"images have 1 or 3 channels, the network needs {channels}")
    try:
        with Image.open(content or path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path}: 8 bits a channel needed, found mode {image.mode}")
            return ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    except InputError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise InputError(f"{path}: cannot be decoded as an image ({error})") from error
