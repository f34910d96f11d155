"""Files are either whole and new, or as they were."""

import json
import os

import pytest

from repvgg.errors import InputError
from repvgg.files import existing_file, reading, written_aside


def test_a_file_is_found(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    assert existing_file(str(tmp_path / "model.bin")) == tmp_path / "model.bin"


@pytest.mark.parametrize(
    ("name", "found"),
    [(".", "a folder"), ("absent", "nothing"), ("file/below", "nothing"), ("x" * 300, "nothing")],
)
def test_what_is_no_file_is_refused_by_name(tmp_path, name, found):
    (tmp_path / "file").touch()
    path = tmp_path / name
    with pytest.raises(InputError, match=f"{path}: a file is needed, found {found}$"):
        existing_file(path)


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda path: path.read_text(encoding="utf-8"), ", found UnicodeDecodeError: .{,99}"),
        (lambda path: json.loads("[" * 100_000), ", found RecursionError: .*"),
        (lambda path: {}["rows"], ", found no 'rows'"),
        (lambda path: next(path.iterdir()), r" \(Not a directory\)"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(tmp_path, read, found):
    path = tmp_path / "net.json"
    path.write_bytes(b"\xff" * 5000)
    with (
        pytest.raises(InputError, match=rf"^{path}: numbers are needed{found}$"),
        reading(path, "numbers are needed"),
    ):
        read(path)


def test_what_a_reader_says_itself_stays(tmp_path):
    with pytest.raises(InputError, match=r"^4 needed$"), reading(tmp_path, "numbers are needed"):
        raise InputError("4 needed")


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_new_file_takes_its_place_only_when_it_is_whole(tmp_path, old):
    path = tmp_path / "model.safetensors"
    if old:
        path.write_bytes(old)
    with written_aside(path) as aside:
        aside.write_bytes(b"new")
        assert (path.read_bytes() if path.exists() else None) == old
        assert aside.parent == path.parent
        assert aside.suffix == ".safetensors"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path, old, error):
    path = tmp_path / "model.safetensors"
    if old:
        path.write_bytes(old)

    def fail():
        with written_aside(path) as aside:
            aside.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([old] if old else [])


def test_folders_are_made(tmp_path):
    with written_aside(tmp_path / "a" / "b" / "c.txt") as aside:
        aside.write_text("text")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"


def test_a_writer_sees_no_other_writers_file(tmp_path):
    with written_aside(tmp_path / "a.txt") as first, written_aside(tmp_path / "b.txt") as second:
        first.write_text("a")
        second.write_text("b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.txt": "a",
        "b.txt": "b",
    }


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("folder", "folder: a file name is needed, found a folder"),
        ("file/below.txt", "file: cannot make this folder"),
        ("file/further/below.txt", "file/further: cannot make this folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, named):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match=f"{tmp_path}/{named}"), written_aside(tmp_path / name):
        raise AssertionError("must not come this far")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="cannot write"), written_aside(tmp_path / "a.txt"):
        raise AssertionError("must not come this far")
