"""Sources of images, transforms and loaders, on real files."""

import hashlib
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as F

from repvgg.data.images import decode_image, find_images, open_images
from repvgg.data.loader import Loader, Remembered, default_workers, derived_seed, sample_seeds
from repvgg.data.order import epoch_order
from repvgg.data.transforms import Once, Shift, evaluation_transform, normalize, training_transform
from repvgg.errors import InputError
from repvgg.preprocessing import Preprocessing
from repvgg.training.config import Augmentation

SMALL = Preprocessing.for_channels(1, 8)


def picture(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("bee", "ant"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                picture(index).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def test_a_folder_gives_its_classes_sorted_and_its_splits(folder):
    train, test = open_images(str(folder), "train"), open_images(str(folder), "test")
    assert train.class_names == test.class_names == ("ant", "bee")
    assert (len(train), len(test)) == (8, 4)
    assert list(test.labels) == [0, 0, 1, 1]
    assert np.array_equal(np.asarray(train.decode(5)), np.asarray(picture(1)))
    alone = open_images(str(folder / "val"), "test")
    assert alone.names == test.names


def test_an_empty_class_folder_is_named(folder):
    (folder / "train" / "cicada").mkdir()
    with pytest.raises(InputError, match=r"train.*cicada"):
        open_images(str(folder), "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "a folder of images is needed, found nothing"),
        (lambda path: path.touch(), "a folder of images is needed, found a file"),
        (lambda path: path.mkdir(), "a folder for each class is needed, found no folder in it"),
        (lambda path: (path / "train").mkdir(parents=True), "val or test"),
    ],
)
def test_a_source_that_is_no_image_folder_is_refused(make, message, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        open_images(str(tmp_path / "data"), "test")


def test_digits_are_split_evenly_and_without_overlap():
    train, test = open_images("digits", "train"), open_images("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert np.bincount(test.labels).min() >= 34
    seen = {train.decode(i).tobytes() for i in range(len(train))}
    assert sum(test.decode(i).tobytes() in seen for i in range(len(test))) == 0
    assert np.asarray(test.decode(0)).max() == 255


def test_cifar10_is_read_through_torchvision(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    labels = [index % 10 for index in range(20)]
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    contents = {
        "data_batch_1": pickle.dumps({"data": pixels, "labels": labels}),
        "test_batch": pickle.dumps({"data": pixels[:10], "labels": labels[:10]}),
        "batches.meta": pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}),
    }
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    # torchvision reads files of known check sums alone: ours take the place of the published ones.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    train, test = (open_images(f"cifar10:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 10)
    assert train.class_names[3] == "class 3"
    assert np.array_equal(np.asarray(test.decode(7)).transpose(2, 0, 1).reshape(-1), pixels[7])
    (folder / "test_batch").write_bytes(b"altered")
    with pytest.raises(InputError, match="CIFAR-10 is not complete"):
        open_images(f"cifar10:{tmp_path}", "test")


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture(size=(40, 30)).save(tmp_path / "turned.png", exif=exif)
    assert decode_image(tmp_path / "turned.png", 3).size == (30, 40)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK"])
def test_all_usual_modes_become_rgb_or_grey(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture().convert(mode).save(path)
    assert decode_image(path, 3).mode == "RGB"
    assert decode_image(path, 1).mode == "L"


def test_images_that_cannot_be_used_are_named(tmp_path):
    good = tmp_path / "good.png"
    picture().save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("no image")
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("cut.png", "text.jpg", "absent.png"):
        with pytest.raises(InputError, match=rf"{name}: cannot be decoded"):
            decode_image(tmp_path / name, 3)
    with pytest.raises(InputError, match=r"deep\.png: 8 bits a channel needed"):
        decode_image(tmp_path / "deep.png", 3)


def test_an_image_that_claims_a_billion_pixels_is_refused_unread(tmp_path):
    picture().save(tmp_path / "bomb.png")
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    content[29:33] = __import__("zlib").crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(InputError, match="decompression bomb"):
        decode_image(tmp_path / "bomb.png", 3)


def test_images_are_found_in_subfolders_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPG", "a.png", "b/1.jpeg", "notes.txt"):
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert found == ["a.png", "b/1.jpeg", "b/2.JPG"]
    with pytest.raises(InputError, match="found nothing"):
        find_images(tmp_path / "absent")
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        find_images(tmp_path / "c")


def test_normalizing_is_what_the_definition_says():
    preprocessing = Preprocessing(size=2, mean=(0.5, 0.25, 0), std=(0.5, 0.25, 2))
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    values = normalize(images, preprocessing)[0, :, 0, 0]
    torch.testing.assert_close(values, torch.tensor([-1.0, 3.0, 0.1]))
    assert normalize(images, preprocessing).is_contiguous(memory_format=torch.channels_last)


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre():
    preprocessing = Preprocessing(size=14, crop_pct=0.875)
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (32, 1)))
    result = evaluation_transform(preprocessing)(image)
    assert result.shape == (1, 14, 14)
    assert result.dtype == torch.uint8
    # 32 → 16 pixels high, 64 → 32 wide; the centre 14 columns begin at column 9 of 32.
    torch.testing.assert_close(
        result[0, 0].float(), 2 * torch.arange(9.0, 23) + 0.5, atol=1, rtol=0
    )


def changed(transform, image, times):
    """(times, C, H, W): what a transform makes of an image with so many seeds."""
    seeds = sample_seeds(0, 1, np.arange(times))
    return transform.change([transform.prepare(image)] * times, seeds)


@pytest.mark.parametrize(
    "augmentation", ["crop-flip", "shift-flip", "shift-alternate-flip", "shift", "none"]
)
def test_augmentation_keeps_size_and_flips_only_if_it_says_so(augmentation):
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    transform = training_transform(Preprocessing.for_channels(1, 32), augmentation)
    results = list(changed(transform, ramp, 40)[:, 0].float())
    assert all(result.shape == (32, 32) for result in results)
    flipped = sum(bool(result[16, 20] < result[16, 12]) for result in results)
    # Alternate flips are the loader's.
    flips = augmentation in ("crop-flip", "shift-flip")
    assert (8 <= flipped <= 32) if flips else flipped == 0
    different = len({tuple(result.flatten().tolist()) for result in results})
    # A reflected ramp is the same in all rows, which leaves the 9 shifts of its columns.
    assert different == 1 if augmentation == "none" else different > 5


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("augmentation", ["shift-flip", "shift-alternate-flip", "shift"])
def test_the_smallest_images_can_be_shifted(size, augmentation):
    transform = training_transform(Preprocessing.for_channels(1, size), augmentation)
    assert changed(transform, Image.new("L", (size, size), 7), 3).shape == (3, 1, size, size)


@pytest.mark.parametrize(
    ("channels", "reflect", "flip", "reach"),
    [(3, True, False, 1), (3, False, True, 2), (1, False, False, 2), (3, True, False, 0)],
)
def test_shifts_are_all_crops_of_torchvisions_padded_image_about_equally_often(
    channels, reflect, flip, reach
):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze())
    mode = "reflect" if reflect else "constant"
    padded = F.pad(F.pil_to_tensor(image), [reach] * 4, padding_mode=mode)
    places = [(down, right) for down in range(2 * reach + 1) for right in range(2 * reach + 1)]
    crops = [F.crop(padded, down, right, 16, 16) for down, right in places]
    expected = crops + [crop.flip(-1) for crop in crops] * flip
    preprocessing = Preprocessing.for_channels(channels, 16)
    shift = Shift(preprocessing, reach / 16, reflect=reflect, flip=flip)
    shifted = changed(shift, image, 40 * len(expected))
    counts = Counter(part.contiguous().numpy().tobytes() for part in shifted)
    assert counts.keys() == {crop.numpy().tobytes() for crop in expected}
    assert min(counts.values()) > 15
    assert max(counts.values()) < 70


@pytest.mark.parametrize("augmentation", get_args(Augmentation))
def test_transforms_travel_to_worker_processes_that_share_nothing(augmentation):
    preprocessing = Preprocessing.for_channels(3, 16)
    for transform in (
        training_transform(preprocessing, augmentation),
        Once(evaluation_transform(preprocessing)),
    ):
        copied = pickle.loads(pickle.dumps(transform))
        assert torch.equal(*(changed(each, picture(), 3) for each in (transform, copied)))


def test_the_padding_of_alternate_flips_is_the_image_itself():
    ramp = Image.fromarray(np.tile(np.arange(100, 228, 4, dtype=np.uint8), (32, 1)))
    preprocessing = Preprocessing.for_channels(1, 32)
    least = {}
    for augmentation in ("shift-flip", "shift-alternate-flip"):
        transform = training_transform(preprocessing, augmentation)
        least[augmentation] = int(changed(transform, ramp, 20).min())
    assert least == {"shift-flip": 0, "shift-alternate-flip": 100}


def test_alternate_flips_show_each_image_from_one_side_and_then_from_the_other():
    images = open_images("digits", "train")
    whole = Once(evaluation_transform(Preprocessing.for_channels(1, 8)))
    loader = Loader(images, whole, len(images), seed=3, alternate_flip=True, workers=0)
    plain = torch.stack([whole.prepare(images.decode(index)) for index in range(len(images))])
    sides = []
    for epoch in range(1, 5):
        (batch,) = loader.epoch(epoch)
        shown = torch.empty_like(plain)
        shown[epoch_order(images, 3, epoch)] = batch.images
        flipped = (shown == plain.flip(-1)).flatten(1).all(1)
        symmetric = (plain == plain.flip(-1)).flatten(1).all(1)
        assert ((shown == plain).flatten(1).all(1) | flipped).all()
        sides.append(flipped[~symmetric])
    assert torch.equal(sides[0], sides[2])
    assert torch.equal(sides[1], sides[3])
    assert torch.equal(sides[0], ~sides[1])
    assert 0.4 < sides[0].float().mean() < 0.6


def batches(workers, epoch, seed=3):
    images = open_images("digits", "train")
    loader = Loader(images, training_transform(SMALL, "shift"), 200, seed=seed, workers=workers)
    return list(loader.epoch(epoch))


def test_batches_depend_on_seed_and_epoch_and_not_on_the_workers():
    here, there = batches(0, epoch=1), batches(2, epoch=1)
    assert len(here) == len(there) == 7  # the last 37 of 1,437 are left out
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert not torch.equal(here[0].images, batches(0, epoch=2)[0].images)
    assert not torch.equal(here[0].images, batches(0, epoch=1, seed=4)[0].images)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches(0, epoch=1)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_of_samples_do_not_depend_on_the_batch_and_are_even():
    seeds = sample_seeds(3, 2, np.arange(20000))
    assert sample_seeds(3, 2, np.array([7, 19999])).tolist() == [seeds[7], seeds[19999]]
    assert len(set(seeds.tolist())) == 20000
    assert not set(seeds.tolist()) & set(sample_seeds(3, 1, np.arange(20000)).tolist())
    bits = (seeds[:, None] >> np.arange(63)) & 1
    assert seeds.min() >= 0
    assert abs(bits.mean(0) - 0.5).max() < 0.02  # five standard errors


def test_a_derived_seed_depends_on_every_number():
    seeds = {derived_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_without_seed_every_image_comes_once_in_its_order():
    images = open_images("digits", "test")
    loader = Loader(images, Once(evaluation_transform(SMALL)), 100)
    labels = torch.cat([batch.labels for batch in loader.epoch()])
    assert labels.tolist() == images.labels


def test_a_broken_image_is_reported_beside_the_good_ones(folder):
    (folder / "train" / "ant" / "1.png").write_bytes(b"broken")
    images = open_images(str(folder), "train")
    loader = Loader(images, Once(evaluation_transform(Preprocessing.for_channels(3, 16))), 8)
    (batch,) = loader.epoch()
    assert len(batch.labels) == len(batch.images) == 7
    assert len(batch.broken) == 1
    assert "ant/1.png: cannot be decoded" in batch.broken[0]


def test_without_workers_images_are_decoded_once(folder):
    images = open_images(str(folder), "train")
    whole = Once(evaluation_transform(Preprocessing.for_channels(3, 16)))
    loader = Loader(images, whole, 8, workers=0)
    (first,) = loader.epoch()
    for name in images.names:
        Path(name).unlink()
    (second,) = loader.epoch()
    assert torch.equal(first.images, second.images)


def test_only_so_many_images_are_remembered():
    calls = []

    def decode(index):
        calls.append(index)
        return Image.new("RGB", (16, 16), (index, 0, 0))

    remembered = Remembered(decode, room=2 * (4 * 16 * 16 + 1024))
    for _ in range(2):
        assert [remembered(index).getpixel((0, 0)) for index in range(3)] == [
            (0, 0, 0),
            (1, 0, 0),
            (2, 0, 0),
        ]
    assert calls == [0, 1, 2, 2]


def test_workers_are_chosen_by_the_cores_that_are_granted(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers(4999, beside_network=False) == 0
    assert default_workers(5000, beside_network=False) == 15
    assert default_workers(5000, beside_network=True) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers(5000, beside_network=False) == 1
    assert default_workers(5000, beside_network=True) == 0
