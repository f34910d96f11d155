"""Archives and indexes that are damaged, hostile or not those of one another."""

import contextlib
import json
import os
import pickle
import tarfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg.data import shard_index
from repvgg.data.images import open_images
from repvgg.data.loader import Loader
from repvgg.data.store import ShardError
from repvgg.data.transforms import training_transform
from repvgg.errors import InputError
from repvgg.preprocessing import Preprocessing
from shard_files import LABEL, PICTURE, copied, reader, write_tar

HUGE: dict[str, Any] = {"size": 1 << 62}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", PICTURE)], r"a: a label a\.cls is needed"),
        ([("a.jpg", PICTURE), ("b.cls", b"1")], r"a: a label a\.cls is needed"),
        ([("a.jpg", PICTURE), ("a.cls", b"cat")], r"a\.cls: a class index is needed, found 'cat'"),
        ([("a.jpg", PICTURE), ("a.cls", b"-1")], r"a\.cls: a class index is needed"),
        ([("a.jpg", PICTURE), ("a.cls", b"1.5")], r"a\.cls: a class index is needed"),
        ([("a.jpg", PICTURE), ("a.cls", b"")], r"a\.cls: a class index is needed"),
        ([("a.jpg", PICTURE), ("a.cls", b"9" * 4000)], r"a\.cls: a class index is needed"),
        ([("a.jpg", PICTURE), ("a.cls", b"99999999")], r"a\.cls: a class index is needed"),
        ([("a.jpg", PICTURE), ("a.png", PICTURE), LABEL], r"a\.png: a second image in one sample"),
        ([("/a.jpg", PICTURE), ("/a.cls", b"1")], "a name that stays in its folder is needed"),
        ([("../a.jpg", PICTURE), ("../a.cls", b"1")], "a name that stays in its folder is needed"),
        ([("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), LABEL], "a link"),
        ([("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}), LABEL], "a link"),
        ([("a.jpg", {"type": tarfile.CHRTYPE}), LABEL], "a link or a device"),
        ([("a.jpg", HUGE)], "no whole tar archive"),
        ([LABEL, ("a.jpg", {"size": 10_000_000})], "no whole tar archive"),
        ([("a.jpg", {"size": -512}), LABEL], "a size of 0 or more is needed"),
        ([("a.jpg", {"type": tarfile.GNUTYPE_LONGNAME, **HUGE})], "no whole tar archive"),
        ([("a.jpg", {"type": tarfile.XHDTYPE, **HUGE})], "no whole tar archive"),
        ([("a.jpg", {"type": tarfile.GNUTYPE_SPARSE, "size": 10}), LABEL], "a link or a device|no"),
        ([("readme.txt", b"text")], "holds no labelled image"),
    ],
)
def test_a_hostile_archive_is_refused_by_name(members, message, tmp_path):
    path = write_tar(tmp_path / "bad.tar", *members)
    with pytest.raises(InputError, match=rf"bad\.tar: .*({message})|bad\.tar: {message}"):
        open_images(f"shards:{path}", "train")


@pytest.mark.parametrize("kind", ["longname", "image"])
def test_a_sparse_file_of_a_terabyte_fills_no_memory(kind, tmp_path):
    fields: dict[str, Any] = {"size": 1 << 40}
    if kind == "longname":
        fields["type"] = tarfile.GNUTYPE_LONGNAME
    path = write_tar(tmp_path / "bad.tar", ("a.jpg", fields), end=False)
    os.truncate(path, 1 << 41)
    with pytest.raises(InputError, match=r"bad\.tar: "):
        open_images(f"shards:{path}", "train")


def test_an_image_larger_than_any_honest_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "LARGEST_IMAGE", 100)
    path = write_tar(tmp_path / "a.tar", ("a.jpg", PICTURE), LABEL)
    with pytest.raises(InputError, match=r"a\.tar: an image of at most 100 bytes needed"):
        open_images(f"shards:{path}", "train")


def test_folders_and_other_members_are_passed_over(tmp_path):
    members = [("x", {"type": tarfile.DIRTYPE}), ("x/a.json", b"{}"), ("x/a.jpg", PICTURE)]
    path = write_tar(tmp_path / "a.tar", *members, ("x/a.cls", b" 1\n"), ("b.txt", b"text"))
    images = open_images(f"shards:{path}", "train")
    assert images.labels == [1]
    assert images.decode(0).size == (8, 8)


@pytest.mark.parametrize("cut", [100, 512, 5000, 40_000])
def test_an_archive_that_was_cut_off_is_refused(packed, tmp_path, cut):
    content = (packed / "val-000000.tar").read_bytes()
    end = len(content.rstrip(b"\0"))
    path = tmp_path / "cut.tar"
    path.write_bytes(content[: max(0, end - cut)])
    with pytest.raises(InputError, match=r"cut\.tar: "):
        open_images(f"shards:{path}", "test")


def test_an_archive_cut_between_two_members_or_with_a_damaged_header_is_refused(tmp_path):
    members = [("a.jpg", PICTURE), LABEL, ("b.jpg", PICTURE), ("b.cls", b"0")]
    path = write_tar(tmp_path / "bad.tar", *members, end=False)
    with pytest.raises(InputError, match=r"bad\.tar: damaged or cut off at byte \d"):
        open_images(f"shards:{path}", "test")
    path = write_tar(path, *members)
    content = bytearray(path.read_bytes())
    content[content.index(b"b.jpg")] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.tar: damaged or cut off at byte \d"):
        open_images(f"shards:{path}", "test")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_change_of_an_archive_breaks_more_than_itself(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    write_tar(path, ("a.jpg", PICTURE), LABEL, ("long" * 40 + ".jpg", PICTURE))
    content = bytearray(path.read_bytes())
    changes = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(changes, min_size=1, max_size=4)):
        content[place] = value
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with pytest.raises(InputError, match=r"a\.tar: "):  # its last image has no label anyway
        open_images(f"shards:{path}", "train")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_change_behind_an_open_index_breaks_more_than_itself(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    write_tar(path, ("a.jpg", PICTURE), LABEL)
    images = open_images(f"shards:{path}", "train")
    content = bytearray(path.read_bytes())
    changes = st.tuples(st.integers(0, 512 + len(PICTURE)), st.integers(0, 255))
    for place, value in data.draw(st.lists(changes, min_size=1, max_size=4)):
        content[place] = value
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] + bytes(10))
    with contextlib.suppress(InputError, ShardError):
        assert images.decode(0).mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b" + bytes(1000), bytes(10240)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar: "):
        open_images(f"shards:{path}", "train")


def test_a_pattern_without_files_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none-\*\.tar: a file is needed, found nothing"):
        open_images(f"shards:{tmp_path}/none-*.tar", "train")


def test_classes_fewer_than_the_labels_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", ("a.jpg", PICTURE), LABEL)
    (tmp_path / "classes.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"a\.tar: labels from 0 to 0 needed, found 1–1"):
        open_images(f"shards:{tmp_path}/*.tar", "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index, shard: index.update(format="other"), "version 1 of repvgg-shards needed"),
        (lambda index, shard: index.update(version=2), "version 1 of repvgg-shards needed"),
        (
            lambda index, shard: index.pop("classes"),
            "of shards is needed, found no 'classes'",
        ),
        (lambda index, shard: index.update(classes=[]), "names of the classes"),
        (lambda index, shard: index.update(classes=["one"]), "labels from 0 to 0 needed"),
        (lambda index, shard: index["splits"].update(val=[]), "split val has no shards"),
        (lambda index, shard: index.update(splits=[1]), "an index of shards is needed, found Attr"),
        (lambda index, shard: shard.update(name="../a.tar"), r"ends in \.tar is needed"),
        (lambda index, shard: shard.update(name="/etc/a.tar"), r"ends in \.tar is needed"),
        (lambda index, shard: shard.update(name="http://x/a.tar"), r"ends in \.tar is needed"),
        (lambda index, shard: shard.update(sha256="../a"), "64 hexadecimal digits"),
        (lambda index, shard: shard.update(bytes=-1), "a number of bytes is needed"),
        (lambda index, shard: shard.update(bytes=10**30), "a number of bytes is needed"),
        (lambda index, shard: shard.update(bytes=1000), "lies beyond its end"),
        (lambda index, shard: shard["offsets"].pop(), "of equal number needed"),
        (lambda index, shard: shard["offsets"].__setitem__(0, 0), "before the first header"),
        (lambda index, shard: shard["offsets"].__setitem__(0, 2**63 - 1), "beyond its end"),
        (lambda index, shard: shard["offsets"].__setitem__(0, 2**70), "whole numbers needed"),
        (lambda index, shard: shard["sizes"].__setitem__(0, -1), "before the first header"),
        (lambda index, shard: shard["sizes"].__setitem__(0, 2**40), "at most .* needed"),
        (lambda index, shard: shard["sizes"].__setitem__(0, 1.5), "whole numbers needed"),
        (lambda index, shard: shard["labels"].__setitem__(0, "1"), "whole numbers needed"),
        (
            lambda index, shard: shard["labels"].__setitem__(0, [1]),
            "of shards is needed|whole numbers",
        ),
        (lambda index, shard: shard["labels"].__setitem__(0, 7), "labels from 0 to 1 needed"),
        (lambda index, shard: shard.update(offsets=[], sizes=[], labels=[]), "no labelled image"),
    ],
)
def test_an_index_that_claims_the_impossible_is_refused(packed, tmp_path, change, message):
    folder = copied(packed, tmp_path / "changed")
    index = json.loads((folder / "index.json").read_bytes())
    change(index, index["splits"]["val"][0])
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"index\.json: .*({message})|index\.json: {message}"):
        open_images(str(folder), "test")


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "null", "1" * 5000, "\x00"])
def test_what_is_no_index_is_refused(packed, tmp_path, content):
    folder = copied(packed, tmp_path / "changed")
    (folder / "index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json: an index of shards is needed, found"):
        open_images(str(folder), "test")


def test_an_index_of_absurd_size_is_not_read(packed, tmp_path):
    folder = copied(packed, tmp_path / "changed")
    os.truncate(folder / "index.json", 1 << 40)
    with pytest.raises(InputError, match=r"index\.json: at most .* bytes needed"):
        open_images(str(folder), "test")


def test_an_archive_other_than_the_indexed_one_is_refused(packed, tmp_path):
    folder = copied(packed, tmp_path / "changed")
    path = folder / "val-000000.tar"
    content = path.read_bytes()
    images = open_images(str(folder), "test")
    offset = int(reader(images).shards[0].offsets[1])

    path.write_bytes(content[: offset - 500] + b"0" + content[offset - 499 :])
    with pytest.raises(ShardError, match=r"val-000000\.tar: an image of .* is not the one"):
        images.decode(1)
    images.decode(0)
    os.truncate(path, offset + 100)  # while it is open
    with pytest.raises(ShardError, match=r"val-000000\.tar: "):
        images.decode(1)
    with pytest.raises(ShardError, match=r"val-000000\.tar: .* bytes needed, found"):
        pickle.loads(pickle.dumps(images)).decode(1)
    with pytest.raises(InputError, match=r"val-000000\.tar: .* bytes needed, found"):
        open_images(str(folder), "test")
    path.unlink()
    with pytest.raises(InputError, match=r"val-000000\.tar: a file is needed, found nothing"):
        open_images(str(folder), "test")


def test_a_broken_image_in_a_good_archive_is_reported_as_such(tmp_path):
    members = [("a.jpg", PICTURE), LABEL, ("b\x1b[31m.jpg", PICTURE[:300]), ("b\x1b[31m.cls", b"0")]
    path = write_tar(tmp_path / "a.tar", *members)
    images = open_images(f"shards:{path}", "train")
    transform = training_transform(Preprocessing.for_channels(3, 8), "crop-flip")
    (batch,) = Loader(images, transform, 2).epoch()
    assert batch.labels.tolist() == [1]
    assert len(batch.broken) == 1
    assert r"a.tar: b\x1b[31m.jpg: cannot be decoded" in batch.broken[0]
