"""Images with a class for every pixel: CamVid, Cityscapes, and folders of one's own."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from repvgg.data.images import decode_image, find_images
from repvgg.errors import InputError
from repvgg.files import reading

Split = Literal["train", "val", "test"]

# A pixel without a class, in every label map that leaves this module, whatever its file has.
VOID = 255
MAX_CLASSES = 250
# Marks the values of a file that mean nothing.
UNKNOWN = 254
CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class Scene:
    """An image and its label map, of one size.

    Attributes:
        image: RGB.
        labels: mode L, the class of each pixel, or `VOID`.
    """

    image: Image.Image
    labels: Image.Image

    @property
    def width(self) -> int:
        """In pixels."""
        return self.image.width

    @property
    def height(self) -> int:
        """In pixels."""
        return self.image.height


@dataclass(frozen=True)
class Scenes:
    """Images with label maps, decoded when they are asked for.

    Attributes:
        names: what to call each scene in a message: the path of its image.
        class_names: in the order of the labels.
        decode: index → scene; it travels to worker processes.
        groups, fetch: none, see `Images`.
    """

    names: Sequence[str]
    class_names: tuple[str, ...]
    decode: Callable[[int], Scene]
    groups: tuple[range, ...] = ()
    fetch: None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Classes:
    """Classes of a data set.

    Attributes:
        names: in the order of their labels, from 0.
        colors: to draw them in, RGB.
        ignore: value of pixels without a class in the files.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] = ()
    ignore: int = VOID

    def table(self) -> np.ndarray:
        """(256,) uint8: value in a file → label, `VOID` or `UNKNOWN`."""
        table = np.full(256, UNKNOWN, np.uint8)
        table[: len(self.names)] = np.arange(len(self.names))
        table[self.ignore] = VOID
        return table


CAMVID = Classes(
    (
        *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
        *("pedestrian", "bicyclist"),
    ),
    (
        *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222)),
        *((128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0)),
        (0, 128, 192),
    ),
    ignore=11,
)


def open_scenes(source: str, split: Split) -> Scenes:
    """Scenes by the name of their source.

    Args:
        source: `camvid:DIR`, a folder with train/, val/ and test/ in it, in each images/ and
            labels/ with files of the same stem, whose classes are CamVid's eleven;
            `cityscapes:DIR`, the folder of Cityscapes' leftImg8bit/ and gtFine/, with its 19
            classes to train on; or a folder laid out as CamVid's that holds a `classes.json`:
            `{"names": ["road", …], "ignore": 255, "colors": [[128, 64, 128], …]}`, the last two
            if wanted. Labels are images of one channel, with the number of the class.
        split: which part.

    Raises:
        InputError: no such folder, an image without its label map or the reverse, a
            `classes.json` that cannot be used.
    """
    kind, colon, folder = source.partition(":")
    if kind == "camvid" and colon:
        return _from_folder(Path(folder), split, CAMVID)
    if kind == "cityscapes" and colon:
        return _from_cityscapes(folder, split)
    if not source:
        raise InputError("data: camvid:DIR, cityscapes:DIR or a folder needed, found none given")
    return _from_folder(Path(source), split, read_classes(Path(source) / CLASSES_FILE))


def read_classes(path: Path) -> Classes:
    """What a `classes.json` says.

    Raises:
        InputError: it is not there, or not what it should be.
    """
    needed = '{"names": […], "ignore": 255} is needed, which says what the labels mean'
    with reading(path, needed):
        fields = json.loads(path.read_text(encoding="utf-8"))
        classes = Classes(
            tuple(map(str, fields["names"])),
            tuple((int(r), int(g), int(b)) for r, g, b in fields.get("colors", ())),
            int(fields.get("ignore", VOID)),
        )
    count = len(classes.names)
    if not 2 <= count <= MAX_CLASSES or not count <= classes.ignore <= 255:
        raise InputError(
            f"{path}: 2 to {MAX_CLASSES} names and an ignore above their numbers, at most 255, "
            f"needed, found {count} names and {classes.ignore}"
        )
    if len(classes.colors) not in (0, count):
        raise InputError(f"{path}: a color for each of {count} names needed, or none")
    return classes


def palette(class_names: Sequence[str] | None, count: int) -> tuple[tuple[int, int, int], ...]:
    """A color for each class: those of CamVid or Cityscapes, or as distinct ones as can be."""
    for classes in (CAMVID, cityscapes_classes()):
        if class_names is not None and tuple(class_names) == classes.names:
            return classes.colors
    from matplotlib import colormaps

    hues = colormaps["gist_rainbow"](np.linspace(0, 1, count))[:, :3] if count > 20 else None
    rows = colormaps["tab20"].colors[:count] if hues is None else hues  # pyright: ignore
    return tuple((int(255 * r), int(255 * g), int(255 * b)) for r, g, b in rows)


# --- Folders -------------------------------------------------------------------------------------


def _from_folder(root: Path, split: Split, classes: Classes) -> Scenes:
    images, labels = root / split / "images", root / split / "labels"
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"{folder}: a folder is needed, found none")
    image_of = _by_stem(find_images(images))
    label_of = _by_stem(find_images(labels))
    if stems := sorted(image_of.keys() - label_of.keys()):
        raise InputError(
            f"{image_of[stems[0]]}: has no label map in {labels}; {len(stems)} of "
            f"{len(image_of)} images have none"
        )
    if stems := sorted(label_of.keys() - image_of.keys()):
        raise InputError(
            f"{label_of[stems[0]]}: has no image in {images}; {len(stems)} of "
            f"{len(label_of)} label maps have none"
        )
    return _scenes([(image_of[stem], label_of[stem]) for stem in sorted(image_of)],
                   classes.names, classes.table())  # fmt: skip


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise InputError(f"{path}: one file of a stem needed, found {found[path.stem]} too")
        found[path.stem] = path
    return found


# --- Cityscapes ----------------------------------------------------------------------------------


def cityscapes_classes() -> Classes:
    """The 19 classes that are trained and tested on, as torchvision knows them."""
    from torchvision.datasets import Cityscapes

    trained = sorted(
        (c for c in Cityscapes.classes if c.train_id not in (-1, 255)), key=lambda c: c.train_id
    )
    return Classes(tuple(c.name for c in trained), tuple(c.color for c in trained))


def _from_cityscapes(folder: str, split: Split) -> Scenes:
    from torchvision.datasets import Cityscapes

    try:
        dataset = Cityscapes(folder, split=split, mode="fine", target_type="semantic")
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"{folder}: leftImg8bit/{split} and gtFine/{split} of Cityscapes needed ({error})"
        ) from error
    if not dataset.images:
        raise InputError(f"{folder}: holds no image in leftImg8bit/{split}")
    table = np.full(256, UNKNOWN, np.uint8)
    for c in Cityscapes.classes:
        table[c.id] = VOID if c.train_id in (-1, 255) else c.train_id  # an id of -1 is 255 here
    pairs = [
        (Path(image), Path(targets[0]))
        for image, targets in zip(dataset.images, dataset.targets, strict=True)
    ]
    for image, labels in pairs:
        if not labels.is_file():
            raise InputError(f"{image}: has no label map {labels}")
    return _scenes(pairs, cityscapes_classes().names, table)


# --- Decoding ------------------------------------------------------------------------------------


def _scenes(
    pairs: Sequence[tuple[Path, Path]], class_names: tuple[str, ...], table: np.ndarray
) -> Scenes:
    decode = partial(
        _decode, [(str(image), str(labels)) for image, labels in pairs], len(class_names), table
    )
    return Scenes([str(image) for image, _ in pairs], class_names, decode)


def _decode(pairs: list[tuple[str, str]], count: int, table: np.ndarray, index: int) -> Scene:
    image_path, label_path = pairs[index]
    image, values = decode_image(image_path, 3), decode_label_values(label_path)
    if values.shape != (image.height, image.width):
        raise InputError(
            f"{label_path}: {image.width}×{image.height} pixels needed, as {image_path} has, "
            f"found {values.shape[1]}×{values.shape[0]}"
        )
    labels = table[values]
    if (labels == UNKNOWN).any():
        ignored = np.flatnonzero(table == VOID).tolist()
        raise InputError(
            f"{label_path}: labels of {count} classes or {ignored[0]} for no class needed, found "
            f"{int(values[labels == UNKNOWN][0])}"
        )
    return Scene(image, Image.fromarray(labels))


def decode_label_values(path: str | Path) -> np.ndarray:
    """(H, W) uint8, what a label file holds, a palette's colors not looked at.

    Raises:
        InputError: it cannot be decoded, or has several channels or more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1"):
                raise InputError(f"{path}: one channel of 8 bits needed, found mode {image.mode}")
            values: Any = np.asarray(image)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise InputError(f"{path}: cannot be decoded as an image ({error})") from error
    return values.astype(np.uint8)
