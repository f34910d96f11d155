"""What is where in tar shards: read from the index beside them, or from the archives' own headers.

Shards follow the convention of the webdataset library: a sample is the members `KEY.jpg` (or
another image extension) and `KEY.cls` (its class index in decimal digits), one after the other.
Neither an index nor an archive is trusted: nothing is extracted, what they claim is compared with
the size of the file, and memory is bounded by what is there and not by what is claimed.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from repvgg.data.images import EXTENSIONS
from repvgg.errors import InputError
from repvgg.files import reading

INDEX_NAME = "index.json"
FORMAT, VERSION = "repvgg-shards", 1
# ImageNet-1k's index has 30 MB; beyond this something is wrong.
LARGEST_INDEX = 1 << 29
# No honest image file is larger, and a reader holds one whole in memory.
LARGEST_IMAGE = 1 << 27
LARGEST_LABEL = 1 << 20
# Long names and other extensions of a tar header, of which a reader would hold any size.
LARGEST_HEADER = 1 << 20
BLOCK = tarfile.BLOCKSIZE
SHARD_NAME = re.compile(r"\w[\w.-]{0,200}\.tar", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """A tar archive of labelled images.

    Attributes:
        name: of the file, or its path.
        bytes: its size.
        sha256: of its content, in hexadecimal; None if it is not known.
        offsets: (N,) int64, where each image begins in the file, right behind its header.
        sizes: (N,) int64, bytes of each image.
        labels: (N,) int64, class index of each image.
    """

    name: str
    bytes: int
    sha256: str | None
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def require_consistent(self, origin: str, classes: int) -> None:
        """Check the claims of the three columns against one another and the size of the file.

        Raises:
            InputError: a member outside the file, an image larger than any honest one, a label
                that is no class.
        """
        where = f"{origin}: {self.name}" if origin != self.name else origin
        if not len(self.offsets) == len(self.sizes) == len(self.labels):
            raise InputError(f"{where}: offsets, sizes and labels of equal number needed")
        if not len(self):
            raise InputError(f"{where}: holds no labelled image")
        if self.offsets.min() < BLOCK or self.sizes.min() < 0:
            raise InputError(f"{where}: an image cannot begin or end before the first header")
        if (largest := int(self.sizes.max())) > LARGEST_IMAGE:
            raise InputError(
                f"{where}: an image of at most {LARGEST_IMAGE:,} bytes needed, found {largest:,}"
            )
        # Not offset + size, which could exceed 63 bits.
        if (self.offsets > self.bytes - self.sizes).any():
            raise InputError(f"{where}: has {self.bytes:,} bytes, an image lies beyond its end")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= classes:
            raise InputError(f"{where}: labels from 0 to {classes - 1} needed, found {low}–{high}")


@dataclass(frozen=True)
class Index:
    """All shards of a packed set.

    Attributes:
        class_names: in the order of the labels.
        splits: name of a split → its shards.
    """

    class_names: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]]

    def to_json(self) -> str:
        """What `parse_index` reads."""
        splits = {
            split: [
                {
                    "name": shard.name,
                    "bytes": shard.bytes,
                    "sha256": shard.sha256,
                    "offsets": shard.offsets.tolist(),
                    "sizes": shard.sizes.tolist(),
                    "labels": shard.labels.tolist(),
                }
                for shard in shards
            ]
            for split, shards in self.splits.items()
        }
        content = {"format": FORMAT, "version": VERSION, "classes": self.class_names}
        return json.dumps({**content, "splits": splits}, ensure_ascii=False, separators=(",", ":"))


def parse_index(content: bytes, origin: str) -> Index:
    """The index of a packed set.

    Args:
        content: JSON, as `Index.to_json` makes it.
        origin: its path or URL, for messages.

    Raises:
        InputError: no such index, or one that contradicts itself.
    """
    with reading(origin, "an index of shards is needed"):
        index = json.loads(content)
        if (index["format"], index["version"]) != (FORMAT, VERSION):
            raise InputError(f"{origin}: version {VERSION} of {FORMAT} needed, found another")
        names, splits = index["classes"], index["splits"].items()
        if not all(isinstance(name, str) for name in names) or not names:
            raise InputError(f"{origin}: the names of the classes are needed")
        read = {split: tuple(_shard(entry, origin) for entry in shards) for split, shards in splits}
    for split, shards in read.items():
        if not shards:
            raise InputError(f"{origin}: split {split} has no shards")
        for shard in shards:
            shard.require_consistent(origin, len(names))
    return Index(tuple(names), read)


def _shard(entry: dict[str, Any], origin: str) -> Shard:
    name, size, checksum = entry["name"], entry["bytes"], entry["sha256"]
    # A name with a slash could lead out of the folder.
    if not SHARD_NAME.fullmatch(name):
        raise InputError(f"{origin}: a file name that ends in .tar is needed, found {name!r}")
    if not SHA256.fullmatch(checksum):
        raise InputError(f"{origin}: {name}: 64 hexadecimal digits are needed as sha256")
    if type(size) is not int or not 0 <= size < 1 << 62:
        raise InputError(f"{origin}: {name}: a number of bytes is needed, found {size!r}")
    columns = (_column(entry[key], f"{origin}: {name}") for key in ("offsets", "sizes", "labels"))
    return Shard(name, size, checksum, *columns)


def _column(values: Any, where: str) -> np.ndarray:
    """A list of whole numbers as (N,) int64."""
    column = np.asarray(values) if values else np.empty(0, np.int64)
    if column.dtype != np.int64 or column.ndim != 1:
        raise InputError(f"{where}: lists of whole numbers needed, found {column.dtype}")
    return column


def scan_shard(path: Path) -> Shard:
    """What a tar archive without index holds, by its headers and labels; the images stay unread.

    Members that are neither image nor label are passed over, as are folders.

    Raises:
        InputError: no tar archive, a truncated one, links or other members that are no files,
            names that lead out of a folder, an image without label or with a label that is no
            whole number, two images in one sample.
    """
    size = path.stat().st_size
    columns: list[tuple[int, int, int]] = []
    with open(path, "rb") as file:
        try:
            for key, image, label in _samples(file, path):
                if image is None:
                    continue
                if label is None:
                    raise InputError(f"{path}: {shown(key)}: a label {shown(key)}.cls is needed")
                columns.append((image.offset_data, image.size, _label(file, label, path)))
        except InputError:
            raise
        except Exception as error:  # a damaged archive makes tarfile raise almost anything
            raise InputError(f"{path}: no whole tar archive ({error})") from error
    offsets, sizes, labels = np.array(columns, np.int64).reshape(-1, 3).T
    shard = Shard(str(path), size, None, offsets, sizes, labels)
    shard.require_consistent(str(path), int(labels.max(initial=0)) + 1)
    return shard


def _samples(
    file: BinaryIO, path: Path
) -> Iterator[tuple[str, tarfile.TarInfo | None, tarfile.TarInfo | None]]:
    """Key, image and label of each run of members with the same key."""
    key, image, label = "", None, None
    for member in _members(file, path):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")  # as webdataset: at the first dot
        member_key = f"{folder}/{stem}" if folder else stem
        if member_key != key:
            yield key, image, label
            key, image, label = member_key, None, None
        if f".{extension.lower()}" in EXTENSIONS:
            if image is not None:
                raise InputError(f"{path}: {shown(member.name)}: a second image in one sample")
            image = member
        elif extension == "cls":
            label = member
    yield key, image, label


def _members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive, in their order."""
    last = -1
    bounded: Any = _Bounded(file)
    tar: Any
    with tarfile.open(fileobj=bounded, mode="r:", errors="replace") as tar:
        for member in iter(tar.next, None):
            tar.members.clear()  # else it keeps all
            where = f"{path}: {shown(member.name)}"
            if member.offset <= last or member.size < 0:  # it would be read again without end
                raise InputError(f"{where}: a size of 0 or more is needed, found {member.size}")
            last = member.offset
            if member.isdir():
                continue
            if not member.isfile() or member.issparse():
                raise InputError(f"{where}: a file is needed, found a link or a device")
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise InputError(f"{where}: a name that stays in its folder is needed")
            yield member
        # tarfile takes a damaged header for the end.
        if os.pread(file.fileno(), BLOCK, tar.offset) != bytes(BLOCK):
            raise InputError(f"{path}: damaged or cut off at byte {tar.offset:,}")


def _label(file: BinaryIO, member: tarfile.TarInfo, path: Path) -> int:
    text = os.pread(file.fileno(), min(member.size, 20), member.offset_data).strip()
    if not text.isdigit() or member.size > 20 or int(text) > LARGEST_LABEL:
        where, found = f"{path}: {shown(member.name)}", text.decode(errors="replace")
        raise InputError(f"{where}: a class index is needed, found {found!r}")
    return int(text)


def shown(name: str) -> str:
    """The name of a member for a message, harmless to a terminal."""
    return repr(name if len(name) <= 100 else f"{name[:99]}…")[1:-1]


class _Bounded:
    """A file for tarfile, which otherwise reads extended headers of any claimed size whole."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def number_names(shards: Sequence[Shard]) -> tuple[str, ...]:
    """Names of the classes of shards that come without: their numbers."""
    return tuple(str(i) for i in range(max(int(shard.labels.max()) for shard in shards) + 1))
