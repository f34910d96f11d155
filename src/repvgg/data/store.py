"""Where shards lie: in a local folder, or behind a URL, from which they are fetched whole.

A fetched shard goes into the cache folder under the checksum of its content, so what lies there
is whole and right whoever put it there, and serves any data set that holds the same shard.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repvgg.console import warn
from repvgg.data.shard_index import LARGEST_INDEX, Shard
from repvgg.errors import InputError
from repvgg.files import written_aside

CACHE_VARIABLE = "REPVGG_CACHE"
CHUNK = 1 << 20
# Seconds before a fetch that failed is tried again.
WAITS = (1.0, 5.0, 25.0)


class ShardError(OSError):
    """A whole shard cannot be had, or is not what its index says.

    No `InputError`, since that means one broken image where images are decoded, which a run may
    leave out: a server that does not answer must stop the run, or it would not be the same run.
    """


def cache_folder() -> Path:
    """The folder of fetched shards: `$REPVGG_CACHE`, or ~/.cache/repvgg."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "repvgg")


@dataclass(frozen=True)
class LocalStore:
    """Shards in a folder of this machine."""

    folder: Path

    def path(self, shard: Shard) -> Path:
        """Where the shard is; a name that is an absolute path stands for itself."""
        return self.folder / shard.name


@dataclass(frozen=True)
class RemoteStore:
    """Shards behind a URL that fsspec can open, fetched into a cache when first needed.

    Attributes:
        url: of the folder that holds them.
        cache: folder for what is fetched; nothing is ever removed from it.
    """

    url: str
    cache: Path

    def path(self, shard: Shard) -> Path:
        """Where the shard is, once it is here; safe with many processes at once.

        Raises:
            ShardError: it cannot be fetched or kept, or is not what the index says.
        """
        path = self.cache / f"{shard.sha256}.tar"
        if not _has_size(path, shard.bytes):
            with _locked(path.with_suffix(".lock")):
                if not _has_size(path, shard.bytes):
                    self._fetch(shard, path)
        return path

    def _fetch(self, shard: Shard, path: Path) -> None:
        for orphan in self.cache.glob(f".{path.stem}.*"):  # of a process that was killed
            orphan.unlink(missing_ok=True)
        url = f"{self.url}/{shard.name}"
        for wait in (*WAITS, None):
            try:
                with written_aside(path) as aside:
                    _copy(url, shard, aside)
                return
            except Exception as error:  # each protocol has its own
                if wait is None or isinstance(error, (FileNotFoundError, InputError)):
                    raise ShardError(f"{url}: cannot be fetched ({_reason(error)})") from error
                warn(f"{url}: {_reason(error)}; trying again in {wait:g} s")
                time.sleep(wait)


def _copy(url: str, shard: Shard, target: Path) -> None:
    digest, count = hashlib.sha256(), 0
    with _opened(url) as source, open(target, "wb") as file:
        while count <= shard.bytes and (chunk := source.read(CHUNK)):
            count += len(chunk)
            digest.update(chunk)
            file.write(chunk)
    if count != shard.bytes:
        found = "more" if count > shard.bytes else f"{count:,}"
        raise ShardError(f"{shard.bytes:,} bytes needed, found {found}")
    if digest.hexdigest() != shard.sha256:
        raise ShardError(f"sha256 {shard.sha256} needed, found {digest.hexdigest()}")


def fetch_index(url: str) -> bytes:
    """The content of a small file behind a URL.

    Raises:
        InputError: it cannot be read, is too large, or its protocol needs another package.
    """
    try:
        with _opened(url) as file:
            content = file.read(LARGEST_INDEX + 1)
    except Exception as error:  # each protocol has its own
        raise InputError(f"{url}: cannot be fetched ({_reason(error)})") from error
    if len(content) > LARGEST_INDEX:
        raise InputError(f"{url}: at most {LARGEST_INDEX:,} bytes are needed for an index")
    return content


def _opened(url: str) -> Any:
    import fsspec

    # One request for the whole file: it is read once, and some servers give no part of one.
    options: dict[str, Any] = {"block_size": 0} if url.startswith(("http:", "https:")) else {}
    return fsspec.open(url, "rb", **options)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock; it ends with the process that holds it."""
    import fcntl  # not on every system, where folders can be read nevertheless

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "wb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ShardError(f"{path.parent}: cannot write in this folder ({error})") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # A worker that was forked meanwhile has the file open too, so closing it is not enough.
            fcntl.flock(file, fcntl.LOCK_UN)
