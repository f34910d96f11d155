"""Tar shards as a source of images: each is read by its place in the file, in any order.

So order and augmentation stay functions of (seed, epoch, sample index), as for a folder, and a
run that was stopped goes on in the middle of an epoch.
"""

import glob
import io
import itertools
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from repvgg.data.images import TEST_FOLDERS, Images, Split, decode_image
from repvgg.data.shard_index import (
    BLOCK,
    INDEX_NAME,
    LARGEST_INDEX,
    Index,
    Shard,
    number_names,
    parse_index,
    scan_shard,
    shown,
)
from repvgg.data.store import LocalStore, RemoteStore, ShardError, cache_folder, fetch_index
from repvgg.errors import InputError
from repvgg.files import existing_file

CLASSES_NAME = "classes.txt"
# Files that a process keeps open, of the 1024 that it usually may.
OPEN_FILES = 64


def is_packed(folder: Path) -> bool:
    """Whether `repvgg pack` made this folder."""
    return os.path.isfile(folder / INDEX_NAME) and any(folder.glob("*.tar"))


def open_shards(location: str, split: Split, cache: Path | None = None) -> Images:
    """Images in tar shards.

    Args:
        location: the folder that `repvgg pack` made, or its index.json; the URL of either, for
            any protocol of fsspec, from which each shard is fetched when first needed; or local
            archives without index, as paths or patterns with commas between them, whose classes
            are named by a classes.txt beside the first, a line a class, or else by their numbers.
        split: which part. Of archives without index, those whose names begin with `train`, or
            with `val` or `test`; if they do not come in both kinds, all serve as either.
        cache: folder for what is fetched; see `cache_folder`.

    Raises:
        InputError: nothing of that kind there, or a part that is truncated or contradicts itself.
    """
    if "://" in location:
        url = location if location.endswith(".json") else f"{location.rstrip('/')}/{INDEX_NAME}"
        index = parse_index(fetch_index(url), url)
        store = RemoteStore(url.rpartition("/")[0], cache or cache_folder())
        return _images(_shards_of(index, split, url), index.class_names, store)
    path = Path(location)
    if path.is_dir():
        path /= INDEX_NAME
    if path.suffix == ".json":
        index = parse_index(_content(existing_file(path), LARGEST_INDEX), str(path))
        shards, store = _shards_of(index, split, str(path)), LocalStore(path.parent)
        for shard in shards:
            _require_size(existing_file(store.path(shard)), shard)
        return _images(shards, index.class_names, store)
    return _scanned(location, split)


def _shards_of(index: Index, split: Split, origin: str) -> tuple[Shard, ...]:
    name = {"train": "train", "test": "val"}[split]
    # A folder without splits was packed as "images", which serves as either.
    shards = index.splits.get(name) or index.splits.get("images")
    if shards is None:
        raise InputError(f"{origin}: split {name} needed, found {', '.join(index.splits)}")
    return shards


def _scanned(location: str, split: Split) -> Images:
    paths = [
        Path(path)
        for pattern in location.split(",")
        for path in (sorted(glob.glob(pattern)) or [pattern])
    ]
    shards = [scan_shard(existing_file(path)) for path in _of_split(paths, split)]
    names, numbers = _class_names(paths[0].parent), number_names(shards)
    for shard in shards:
        shard.require_consistent(shard.name, len(names or numbers))
    return _images(shards, names or numbers, LocalStore(Path()))


def _of_split(paths: Sequence[Path], split: Split) -> list[Path]:
    train = [path for path in paths if path.name.startswith("train")]
    test = [path for path in paths if path.name.startswith(TEST_FOLDERS)]
    if not train or not test:
        return list(paths)
    return train if split == "train" else test


def _class_names(folder: Path) -> tuple[str, ...]:
    path = folder / CLASSES_NAME
    content = _content(path, LARGEST_INDEX) if path.is_file() else b""
    return tuple(content.decode(errors="replace").splitlines())


def _content(path: Path, largest: int) -> bytes:
    if (size := path.stat().st_size) > largest:
        raise InputError(f"{path}: at most {largest:,} bytes needed, found {size:,}")
    return path.read_bytes()


def _images(
    shards: Sequence[Shard], class_names: tuple[str, ...], store: LocalStore | RemoteStore
) -> Images:
    reader = ShardReader(shards, store)
    bounds = np.cumsum([0, *map(len, shards)]).tolist()
    groups = tuple(range(*pair) for pair in itertools.pairwise(bounds))
    is_remote = isinstance(store, RemoteStore)
    return Images(
        names=_Names(reader),
        labels=np.concatenate([shard.labels for shard in shards]).tolist(),
        class_names=class_names,
        channels=3,
        decode=reader.decode,
        groups=groups if is_remote else (),
        fetch=reader.fetch if is_remote else None,
    )


class ShardReader:
    """Reads images by their number in a row of shards; it travels to worker processes.

    Args:
        shards: whose images are counted through.
        store: says where a shard is.
    """

    def __init__(self, shards: Sequence[Shard], store: LocalStore | RemoteStore):
        self.shards, self.store = shards, store
        self._ends = np.cumsum([len(shard) for shard in shards])
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def place(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds an image, and that of the image in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number] - len(self.shards[number]))

    def decode(self, index: int) -> Image.Image:
        """An image as 8-bit RGB.

        Raises:
            InputError: it cannot be decoded.
            ShardError: its shard cannot be had or is not what the index says.
        """
        name, content = self.read(index)
        return decode_image(name, 3, io.BytesIO(content))

    def read(self, index: int) -> tuple[str, bytes]:
        """The name of an image, for messages, and the bytes of its file.

        Raises:
            ShardError: its shard cannot be had or is not what the index says.
        """
        number, within = self.place(index)
        shard = self.shards[number]
        offset, size = int(shard.offsets[within]), int(shard.sizes[within])
        # With its header, which must be that of a file of this size.
        block = os.pread(self._file(number).fileno(), BLOCK + size, offset - BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "replace")
        except tarfile.HeaderError:
            header = None
        if header is None or not header.isfile() or header.size != size:
            raise ShardError(
                f"{shard.name}: an image of {size:,} bytes needed at byte {offset:,}, found "
                "something else; the archive is not the one that was indexed"
            )
        if len(block) < BLOCK + size:
            raise ShardError(f"{shard.name}: was cut off before byte {offset + size:,}")
        return f"{shard.name}: {shown(header.name)}", block[BLOCK:]

    def fetch(self, number: int) -> Path:
        """Where the shard of this number is, once it is here.

        Raises:
            ShardError: it cannot be had or is not what the index says.
        """
        return self.store.path(self.shards[number])

    def _file(self, number: int) -> BinaryIO:
        """The open file of a shard; those that were not used for longest are closed."""
        if number not in self._files:
            self._files[number] = self._open(self.shards[number])
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]

    def _open(self, shard: Shard) -> BinaryIO:
        path = self.store.path(shard)
        try:
            _require_size(path, shard)
            return open(path, "rb", buffering=0)
        except (OSError, InputError) as error:
            raise ShardError(str(error)) from error


def _require_size(path: Path, shard: Shard) -> None:
    if (found := path.stat().st_size) != shard.bytes:
        raise InputError(f"{path}: {shard.bytes:,} bytes needed, found {found:,}")


class _Names(Sequence[str]):
    """What to call the images, made when it is asked for: millions would fill the memory."""

    def __init__(self, reader: ShardReader):
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number, within = self._reader.place(index % len(self))
        return f"{self._reader.shards[number].name}: image {within}"
