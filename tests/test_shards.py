"""Tar shards hold the same samples as their folder, for us and for webdataset."""

import gc
import hashlib
import io
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg.data import shard_index, shards
from repvgg.data.images import Images, open_images
from repvgg.data.loader import Loader
from repvgg.data.pack import Pack
from repvgg.data.transforms import training_transform
from repvgg.errors import InputError
from repvgg.preprocessing import Preprocessing
from shard_files import contents, jpeg, reader


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("place", ["{}", "shards:{}", "shards:{}/index.json", "shards:{}/*.tar"])
def test_shards_hold_what_the_folder_holds(image_folder, packed, split, place):
    images, there = (open_images(str(s), split) for s in (image_folder, place.format(packed)))
    assert there.class_names == images.class_names == ("ant", "bée")
    assert contents(there) == contents(images)
    assert there.channels == 3
    assert there.groups == ()
    index = 3
    pixels = np.asarray(there.decode(index))
    bytes_there = reader(there).read(index)[1]
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(bytes_there))))


def test_shards_are_of_the_size_asked_for_and_mixed(packed):
    paths = sorted(packed.glob("train-*.tar"))
    assert [path.name for path in paths] == [f"train-{i:06d}.tar" for i in range(len(paths))]
    sizes = [path.stat().st_size for path in paths]
    assert len(paths) > 3
    assert max(sizes) <= 10**6
    assert min(sizes[:-1]) > 10**6 - 100_000
    for path in paths[:-1]:
        assert set(shard_index.scan_shard(path).labels.tolist()) == {0, 1}
    assert len(list(packed.glob("val-*.tar"))) == 1


def test_the_index_is_what_a_scan_of_the_archives_finds(packed):
    index = shard_index.parse_index((packed / "index.json").read_bytes(), "index.json")
    for shard in (shard for part in index.splits.values() for shard in part):
        scanned = shard_index.scan_shard(packed / shard.name)
        assert shard.bytes == scanned.bytes
        assert shard.sha256 == hashlib.sha256((packed / shard.name).read_bytes()).hexdigest()
        for column in ("offsets", "sizes", "labels"):
            assert np.array_equal(getattr(shard, column), getattr(scanned, column))


def test_packing_depends_on_the_seed_alone(image_folder, packed, tmp_path):
    for name, seed, workers in (("same", 0, 2), ("other", 1, 0)):
        Pack(image_folder, tmp_path / name, shard_megabytes=1, seed=seed, workers=workers).run()
    files = {path.name: path.read_bytes() for path in packed.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()} == files
    assert (tmp_path / "other" / "val-000000.tar").read_bytes() != files["val-000000.tar"]


def read_by_webdataset(packed, *decoders):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(packed.glob("train-*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the last file open
        dataset = webdataset.WebDataset(urls, shardshuffle=False)
        samples = list(dataset.decode(*decoders) if decoders else dataset)
        del dataset
        gc.collect()
    return samples


def test_webdataset_reads_what_was_packed(image_folder, packed):
    samples = read_by_webdataset(packed)
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    found = sorted((sample["jpg"], int(sample["cls"])) for sample in samples)
    assert found == contents(open_images(str(image_folder), "train"))
    for decoded in read_by_webdataset(packed, "pil"):
        assert decoded["jpg"].size == (400, 300)
        assert decoded["cls"] in (0, 1)


def test_what_webdataset_wrote_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for index in range(5):
            key = "/".join(["long" * 20] * index + [f"{index:04d}"])
            writer.write({"__key__": key, "jpg": jpeg(index), "cls": index, "json": {"a": 1}})
    images = open_images(f"shards:{tmp_path / 'a.tar'}", "train")
    assert images.labels == [0, 1, 2, 3, 4]
    assert images.class_names == ("0", "1", "2", "3", "4")
    assert [content for content, _ in contents(images)] == sorted(map(jpeg, range(5)))


def test_a_folder_of_class_folders_serves_as_either_split(image_folder, tmp_path):
    Pack(image_folder / "val", tmp_path / "packed").run()
    for split in ("train", "test"):
        images = open_images(str(tmp_path / "packed"), split)
        assert contents(images) == contents(open_images(str(image_folder), "test"))
    with pytest.raises(IndexError):
        images.names[10]
    assert images.names[-1:] == [f"{reader(images).shards[0].name}: image 9"]


def test_a_split_that_was_not_packed_is_missed(image_folder, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val").symlink_to(image_folder / "val")
    Pack(tmp_path / "images", tmp_path / "packed").run()
    assert len(open_images(str(tmp_path / "packed"), "test")) == 10
    with pytest.raises(InputError, match=r"index\.json: split train needed, found val"):
        open_images(str(tmp_path / "packed"), "train")


def by_content(images: Images) -> Images:
    """The same images in an order that does not depend on where they are."""
    order = sorted(range(len(images)), key=lambda index: images.decode(index).tobytes())
    return Images(
        names=[images.names[i] for i in order],
        labels=[images.labels[i] for i in order],
        class_names=images.class_names,
        channels=3,
        decode=lambda index: images.decode(order[index]),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_of_the_folder_whatever_the_workers(image_folder, packed, workers):
    transform = training_transform(Preprocessing.for_channels(3, 32), "crop-flip")

    def batches(source, workers):
        images = by_content(open_images(str(source), "train"))
        return list(Loader(images, transform, 16, seed=5, workers=workers).epoch(2))

    for one, other in zip(batches(image_folder, 0), batches(packed, workers), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert not other.broken


def open_files_in(folder):
    """Of this process; others than these may be closed at any time, with what other tests left."""
    numbers = os.listdir("/proc/self/fd")
    found = [os.path.realpath(f"/proc/self/fd/{number}") for number in numbers]
    return [path for path in found if path.startswith(f"{folder.resolve()}/")]


def test_few_files_stay_open_and_a_copy_travels_without_them(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    own = shutil.copytree(packed, tmp_path / "own")
    images = open_images(str(own), "train")
    files = reader(images)._files
    first = [images.decode(index).tobytes() for index in range(len(images))]
    assert len(files) == 2
    assert len(open_files_in(own)) == 2
    copy = pickle.loads(pickle.dumps(images))
    assert not reader(copy)._files
    assert [copy.decode(index).tobytes() for index in range(len(copy))] == first
