"""For the tests of shards: small images, packed folders, archives of any kind."""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repvgg.data import store
from repvgg.data.images import Images
from repvgg.data.shards import ShardReader


def jpeg(seed=0, size=(300, 200)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


PICTURE = jpeg(0, (8, 8))
LABEL = ("a.cls", b"1")


def reader(images: Images) -> ShardReader:
    """What reads a source of shards."""
    decode: Any = images.decode
    return decode.__self__


def contents(images: Images) -> list[tuple[bytes, int]]:
    """(bytes of the file, label) of each image, sorted."""
    if isinstance(images.names, list):
        read = [Path(path).read_bytes() for path in images.names]
    else:
        read = [reader(images).read(index)[1] for index in range(len(images))]
    return sorted(zip(read, images.labels, strict=True))


def copied(packed: Path, target: Path) -> Path:
    """A copy of a packed folder, to be changed."""
    target.mkdir()
    for path in packed.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def write_tar(path: Path, *members: tuple[str, Any], end: bool = True) -> Path:
    """An archive of (name, content or changed fields) members, with or without its end mark."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            fields = content if isinstance(content, dict) else {"size": len(content)}
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
        size = tar.offset
    if not end:
        os.truncate(path, size)
    return path


def decode_all(images: Images, barrier: Any, queue: Any) -> None:
    """In another process: wait for the others, decode, and report what was fetched."""
    fetched, copy = [], store._copy

    def slow(url, shard, target):
        fetched.append(shard.name)
        copy(url, shard, target)

    store._copy = slow
    barrier.wait()
    queue.put((fetched, [hash_of(images.decode(index)) for index in range(len(images))]))


def hash_of(image: Image.Image) -> str:
    """Of the pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()
