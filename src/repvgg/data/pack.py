"""`repvgg pack`: an image folder as tar shards and their index."""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from tyro.conf import Positional, arg

from repvgg.console import progress_bar, say, warn
from repvgg.errors import InputError
from repvgg.files import written_aside

if TYPE_CHECKING:
    from repvgg.data.images import Images
    from repvgg.data.shard_index import Shard

# One image in so many may be broken, as in training.
BROKEN_ALLOWED_IN = 1000


@dataclass(frozen=True)
class Pack:
    """Write a folder of images as tar shards in webdataset's format, with an index beside them.

    Each image is decoded once to see that it can be. One that cannot be is named and left out;
    more than 1 in 1,000 of them end the command.
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Folder with train/ and val/, each with a folder a class, or of class folders itself."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT_DIR")]
    """New or empty folder for the shards."""
    shard_megabytes: int = 256
    """Most that a shard may hold, in 10⁶ bytes, unless a single image has more."""
    seed: int = 0
    """Of the order in which the images are dealt to the shards."""
    workers: int | None = None
    """Processes that decode the images; chosen by the machine if not given."""

    def run(self) -> None:
        """Pack every split, and then write the index."""
        from repvgg.data.shard_index import INDEX_NAME, Index
        from repvgg.data.shards import CLASSES_NAME

        for name, low in (("shard_megabytes", 1), ("seed", 0), ("workers", 0)):
            if (value := getattr(self, name)) is not None and value < low:
                flag = name.replace("_", "-")
                raise InputError(f"{flag}: {low} or more needed, found {value}")
        sources = _sources(self.folder)
        _require_empty(self.output)
        class_names = next(iter(sources.values())).class_names
        splits = {name: self._pack(name, images) for name, images in sources.items()}
        _write(self.output / CLASSES_NAME, "".join(f"{name}\n" for name in class_names))
        # Last, so that a folder with an index is whole.
        _write(self.output / INDEX_NAME, Index(class_names, splits).to_json())
        for name, shards in splits.items():
            images, size = sum(map(len, shards)), sum(shard.bytes for shard in shards)
            say(f"{self.output}: {name}: {images} images, {len(shards)} shards, {size:,} bytes")
        say(f"next: repvgg train --data {self.output} …, or --data shards:URL once it is uploaded")

    def _pack(self, split: str, images: "Images") -> tuple["Shard", ...]:
        """Write all shards of a split."""
        shards, most = [], self.shard_megabytes * 10**6
        with progress_bar(f"packing {split}", len(images)) as show:
            samples = _Checked(images, self.seed).read(self.workers, show)
            first = next(samples, None)
            while first is not None:
                path = self.output / f"{split}-{len(shards):06d}.tar"
                try:
                    with written_aside(path) as aside:
                        shard, first = _write_shard(aside, path.name, first, samples, most)
                except OSError as error:
                    raise InputError(f"{path}: cannot be written: {error.strerror}") from error
                shards.append(shard)
        return tuple(shards)


@dataclass(frozen=True)
class Sample:
    """An image file and its label.

    Attributes:
        key: its name in the archive, unique in the split.
        extension: of the image, with its dot.
        content: the bytes of the image file.
        label: class index.
    """

    key: str
    extension: str
    content: bytes
    label: int

    @property
    def archived_bytes(self) -> int:
        """What it adds to an archive: two headers, image and label in whole blocks."""
        return 3 * tarfile.BLOCKSIZE + -(-len(self.content) // 512) * 512


class _Checked:
    """The images of a split in shuffled order, each read once and decoded to see that it can be."""

    def __init__(self, images: "Images", seed: int):
        import numpy as np

        self.images = images
        self.order = np.random.default_rng(seed).permutation(len(images)).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> Sample | InputError:
        from repvgg.data.images import decode_image
        from repvgg.data.shard_index import LARGEST_IMAGE

        index: int = self.order[number]
        path = Path(self.images.names[index])
        try:
            if (size := path.stat().st_size) > LARGEST_IMAGE:
                return InputError(f"{path}: at most {LARGEST_IMAGE:,} bytes needed, found {size:,}")
            content = path.read_bytes()
            decode_image(path, 3, io.BytesIO(content))
        except OSError as error:
            return InputError(f"{path}: cannot be read: {error.strerror}")
        except InputError as error:
            return error
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:60]
        extension = path.suffix.lower().replace(".jpeg", ".jpg")
        return Sample(f"{number:08d}-{stem}", extension, content, self.images.labels[index])

    def read(self, workers: int | None, show: Any) -> Iterator[Sample]:
        """The good ones; the others are named, and too many of them are an error."""
        from torch.utils.data import DataLoader

        from repvgg.data.loader import WORTH_WORKERS, granted_cores

        if workers is None:
            workers = 0 if len(self) < WORTH_WORKERS else granted_cores()
        dataset, unchanged, broken = cast(Any, self), cast(Any, _same), 0
        for item in DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=unchanged):
            show("")
            if not isinstance(item, InputError):
                yield item
                continue
            broken += 1
            if broken > len(self) // BROKEN_ALLOWED_IN:
                raise InputError(
                    f"{item}; {broken} of {len(self)} images are broken, more than 1 in "
                    f"{BROKEN_ALLOWED_IN}"
                )
            warn(f"left out: {item}")


def _same(item: Sample | InputError) -> Sample | InputError:
    return item


def _sources(root: Path) -> dict[str, "Images"]:
    """Name of a split → its images."""
    from repvgg.data.images import folder_images, split_folders

    sources = {name: folder_images(path) for name, path in split_folders(root).items()}
    first, *others = sources.values()
    for other in others:
        if strangers := sorted(set(first.class_names) ^ set(other.class_names)):
            raise InputError(
                f"{root}: the same classes in {' and '.join(sources)} are needed, found "
                f"{', '.join(strangers[:5])} in one alone"
            )
    return sources


def _require_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: a new or empty folder is needed")


def _write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _write_shard(
    path: Path, name: str, first: Sample, rest: Iterator[Sample], most: int
) -> tuple["Shard", Sample | None]:
    """Write samples until the next would make the archive larger than `most` bytes.

    Returns:
        The shard, and the first sample that has no place in it.
    """
    import numpy as np

    from repvgg.data.shard_index import Shard

    columns, sample, room = [], first, most - tarfile.RECORDSIZE  # it ends in zeros
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        while sample is not None and (not columns or sample.archived_bytes <= room):
            room -= sample.archived_bytes
            offset = tar.offset + tarfile.BLOCKSIZE
            columns.append((offset, len(sample.content), sample.label))
            _add(tar, sample.key + sample.extension, sample.content)
            _add(tar, sample.key + ".cls", str(sample.label).encode())
            sample = next(rest, None)
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    offsets, sizes, labels = np.array(columns, np.int64).T
    return Shard(name, path.stat().st_size, checksum, offsets, sizes, labels), sample


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
