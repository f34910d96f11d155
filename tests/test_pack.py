"""`repvgg pack`: what it writes, says and refuses."""

import os

import pytest

from repvgg.data.images import open_images
from repvgg.data.pack import Pack
from repvgg.errors import InputError
from shard_files import PICTURE


def test_pack_says_what_it_wrote_and_how_to_go_on(image_folder, tmp_path, capsys):
    Pack(image_folder, tmp_path / "new" / "packed").run()
    out = capsys.readouterr().out
    assert "packed: train: 60 images, 1 shards, " in out
    assert "packed: val: 10 images, 1 shards, " in out
    assert "next: repvgg train --data" in out
    assert sorted(path.name for path in (tmp_path / "new" / "packed").iterdir()) == [
        "classes.txt",
        "index.json",
        "train-000000.tar",
        "val-000000.tar",
    ]


def some_images(root, count, broken):
    for index in range(count):
        path = root / "ab"[index % 2] / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE[:200] if index in broken else PICTURE)
    return root


def test_one_broken_image_in_a_thousand_is_named_and_left_out(tmp_path, capsys):
    Pack(some_images(tmp_path / "in", 1000, {501}), tmp_path / "out").run()
    assert "left out: " in (error := capsys.readouterr().err)
    assert "0501.jpg: cannot be decoded" in error
    images = open_images(str(tmp_path / "out"), "train")
    assert len(images) == 999
    assert sum(images.labels) == 499


def test_more_broken_images_than_that_end_the_command(tmp_path):
    source = some_images(tmp_path / "in", 900, {501})
    with pytest.raises(InputError, match=r"0501\.jpg: cannot be decoded .*; 1 of 900 images are"):
        Pack(source, tmp_path / "out").run()
    assert list((tmp_path / "out").glob("*")) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shard_megabytes": 0}, "shard-megabytes: 1 or more needed, found 0"),
        ({"seed": -1}, "seed: 0 or more needed, found -1"),
        ({"workers": -1}, "workers: 0 or more needed, found -1"),
    ],
)
def test_numbers_out_of_range_are_refused(image_folder, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        Pack(image_folder, tmp_path / "out", **fields).run()


def test_a_folder_that_holds_something_is_not_written_into(image_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for output in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(InputError, match=f"{output}: a new or empty folder is needed"):
            Pack(image_folder, output).run()


def test_a_file_that_no_reader_would_take_is_not_packed(tmp_path):
    source = some_images(tmp_path / "in", 2, ())
    os.truncate(source / "a" / "0000.jpg", 1 << 30)
    with pytest.raises(
        InputError, match=r"0000\.jpg: at most 134,217,728 bytes needed, found 1,073"
    ):
        Pack(source, tmp_path / "out").run()


def test_splits_of_other_classes_are_refused(tmp_path):
    some_images(tmp_path / "in" / "train", 4, ())
    some_images(tmp_path / "in" / "val", 1, ())
    with pytest.raises(InputError, match="the same classes in train and val are needed, found b"):
        Pack(tmp_path / "in", tmp_path / "out").run()


def test_what_is_no_image_folder_cannot_be_packed(tmp_path):
    with pytest.raises(InputError, match="a folder of images is needed, found nothing"):
        Pack(tmp_path / "in", tmp_path / "out").run()
