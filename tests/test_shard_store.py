"""Shards from elsewhere, through the cache."""

import fcntl
import functools
import http.server
import multiprocessing
import os
import signal
import threading
import time
from typing import ClassVar

import pytest
import torch

from repvgg.data import store
from repvgg.data.ahead import fetched_ahead
from repvgg.data.images import open_images
from repvgg.data.loader import Loader
from repvgg.data.order import WINDOW
from repvgg.data.shards import open_shards
from repvgg.data.store import ShardError
from repvgg.data.transforms import training_transform
from repvgg.errors import InputError
from repvgg.preprocessing import Preprocessing
from shard_files import contents, copied, decode_all, hash_of, reader


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(store, "WAITS", (0.0,))
    return tmp_path / "cache"


@pytest.fixture
def memory(packed):
    """The URL of the packed set in fsspec's memory."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in packed.iterdir():
        system.pipe(f"/set/{path.name}", path.read_bytes())
    yield "memory://set"
    system.rm("/set", recursive=True)


@pytest.mark.parametrize("place", ["{}", "{}/", "{}/index.json"])
def test_shards_behind_a_url_are_fetched_once_and_when_needed(packed, memory, cache, place):
    images = open_images(f"shards:{place.format(memory)}", "train")
    assert not cache.exists()
    images.decode(0)
    assert len(list(cache.glob("*.tar"))) == 1
    assert contents(images) == contents(open_images(str(packed), "train"))
    fetched = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.tar")}
    assert len(fetched) == len(list(packed.glob("train-*.tar")))
    assert contents(open_images(f"shards:{memory}", "train")) == contents(images)
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*.tar")} == fetched
    assert images.groups[0].start == 0
    assert images.groups[-1].stop == len(images)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which gives no part of a file."""

    requests: ClassVar[list[str]] = []

    def log_message(self, format, *args):
        if self.command == "GET":
            self.requests.append(self.path)


def test_a_plain_web_server_is_enough(packed, cache):
    pytest.importorskip("aiohttp")
    handler = functools.partial(Quiet, directory=str(packed))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        images = open_images(f"shards:http://127.0.0.1:{server.server_port}", "test")
        assert contents(images) == contents(open_images(str(packed), "test"))
        with pytest.raises(InputError, match=r"none/index\.json: cannot be fetched \(FileNotFound"):
            open_images(f"shards:http://127.0.0.1:{server.server_port}/none", "test")
        server.shutdown()
        thread.join()
    assert set(Quiet.requests) == {"/index.json", "/val-000000.tar", "/none/index.json"}


class Together(Quiet):
    """A server that answers no request for a shard before so many others are waiting too."""

    waiting: ClassVar[threading.Barrier]

    def do_GET(self):
        if self.path.endswith(".tar"):
            self.waiting.wait(60)
        super().do_GET()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_asks_for_the_next_shards_before_it_has_the_last(packed, cache, workers):
    pytest.importorskip("aiohttp")
    shards = len(list(packed.glob("train-*.tar")))
    assert 2 <= shards <= WINDOW
    Together.waiting = threading.Barrier(shards)  # all of them, one after the other, would fail
    handler = functools.partial(Together, directory=str(packed))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        images = open_images(f"shards:http://127.0.0.1:{server.server_port}", "train")
        transform = training_transform(Preprocessing.for_channels(3, 8), "crop-flip")
        batches = list(Loader(images, transform, 2, seed=0, workers=workers).epoch(1))
        server.shutdown()
        thread.join()
    local = Loader(open_images(str(packed), "train"), transform, len(images), seed=0, workers=0)
    seen = torch.cat([batch.images.flatten(1) for batch in batches])
    expected = next(local.epoch(1)).images.flatten(1)
    assert sorted(seen.tolist()) == sorted(expected.tolist())


def test_an_interrupted_pass_fetches_no_further(packed, cache):
    asked, may_go_on = [], threading.Event()

    def fetch(group):
        asked.append(group)
        may_go_on.wait(60)

    with fetched_ahead(fetch, range(1000)):
        while len(asked) < WINDOW:
            time.sleep(0.001)
    may_go_on.set()
    for thread in threading.enumerate():
        if thread.name == "fetch ahead":
            thread.join(60)
    assert sorted(asked) == list(range(WINDOW))


def test_the_cache_can_be_given(packed, tmp_path, monkeypatch):
    open_shards(f"file://{packed}", "test", tmp_path / "here").decode(0)
    assert len(list((tmp_path / "here").glob("*.tar"))) == 1
    monkeypatch.delenv(store.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "repvgg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-100], r"[\d,]+ bytes needed, found [\d,]+"),
        (lambda content: content + b"more", r"bytes needed, found more"),
        (lambda content: content[:-1] + b"1", r"sha256 .* needed, found"),
        (lambda content: None, r"FileNotFoundError"),
    ],
)
def test_a_fetched_shard_that_is_not_the_indexed_one_is_refused(
    packed, cache, tmp_path, change, message
):
    there = copied(packed, tmp_path / "there")
    path = there / "val-000000.tar"
    content = path.read_bytes()
    changed = change(content)
    path.unlink() if changed is None else path.write_bytes(changed)
    images = open_images(f"shards:file://{there}", "test")
    with pytest.raises(ShardError, match=rf"val-000000\.tar: cannot be fetched \(.*{message}"):
        images.decode(0)
    assert not list(cache.glob("*.tar"))
    path.write_bytes(content)
    images.decode(0)
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".tar"]


def test_a_fetch_that_fails_once_is_tried_again(packed, cache, monkeypatch, capsys):
    opened, failures = store._opened, [OSError("connection lost")]

    def failing(url):
        if url.endswith(".tar") and failures:
            raise failures.pop()
        return opened(url)

    monkeypatch.setattr(store, "_opened", failing)
    open_images(f"shards:file://{packed}", "test").decode(0)
    assert (
        "val-000000.tar: OSError: connection lost; trying again in 0 s" in capsys.readouterr().err
    )


def test_the_rest_of_a_killed_fetch_is_cleared_away(packed, cache):
    images = open_images(f"shards:file://{packed}", "test")
    (checksum,) = (shard.sha256 for shard in reader(images).shards)
    cache.mkdir()
    (cache / f".{checksum}.1.tmp.tar").write_bytes(b"half")
    (cache / f"{checksum}.tar").write_bytes(b"half")
    images.decode(0)
    assert {path.name for path in cache.iterdir()} == {f"{checksum}.tar", f"{checksum}.lock"}


@pytest.mark.parametrize("url", ["nonsense://a", "file:///none/here", "memory://none"])
def test_a_url_that_cannot_be_read_is_named(url):
    with pytest.raises(InputError, match=rf"{url}/index\.json: cannot be fetched"):
        open_images(f"shards:{url}", "train")


def test_a_cache_that_cannot_be_written_stops_the_run(packed, tmp_path):
    (tmp_path / "file").touch()
    images = open_shards(f"file://{packed}", "test", tmp_path / "file" / "below")
    with pytest.raises(ShardError, match="file/below: cannot write in this folder"):
        images.decode(0)


def test_a_lost_shard_is_no_broken_image_but_an_error_of_the_loader(packed, cache, tmp_path):
    there = copied(packed, tmp_path / "there")
    (there / "val-000000.tar").unlink()
    images = open_images(f"shards:file://{there}", "test")
    transform = training_transform(Preprocessing.for_channels(3, 8), "crop-flip")
    for workers in (0, 1):
        with pytest.raises(ShardError, match="cannot be fetched"):
            next(Loader(images, transform, 2, workers=workers).epoch())


def test_a_process_that_was_forked_meanwhile_does_not_keep_a_lock(tmp_path):
    path = tmp_path / "shard.lock"
    with store._locked(path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with open(path, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_processes_at_once_fetch_each_shard_once(packed, cache):
    # Spawned, so that the source is pickled, and they share nothing but the cache.
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    images = open_images(f"shards:file://{packed}", "train")
    processes = [
        context.Process(target=decode_all, args=(images, barrier, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    local = open_images(str(packed), "train")
    expected = [hash_of(local.decode(index)) for index in range(len(local))]
    assert [hashes for _, hashes in results] == [expected, expected]
    fetched = [name for names, _ in results for name in names]
    assert sorted(fetched) == sorted(path.name for path in packed.glob("train-*.tar"))
    assert len(list(cache.glob("*.tar"))) == len(fetched)
