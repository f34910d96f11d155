"""Files are written aside and renamed, so that no reader ever sees half of one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from repvgg.errors import InputError

UMASK = os.umask(0)
os.umask(UMASK)


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path, known to be a file.

    Raises:
        InputError: nothing is there, or a folder is.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike `Path.is_file`, false for a name that is too long
        found = "a folder" if os.path.isdir(path) else "nothing"
        raise InputError(f"{path}: a file is needed, found {found}")
    return path


@contextlib.contextmanager
def reading(origin: str | os.PathLike[str], needed: str) -> Iterator[None]:
    """Make what a reader of a file stumbles over one line that says what the file should be.

    Args:
        origin: path or URL.
        needed: what should be there, as "… is needed" or "… are needed".

    Raises:
        InputError: the file cannot be read, or holds something else; those of the reader as is.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{origin}: {needed} ({error.strerror or error})") from error
    except KeyError as error:
        raise InputError(f"{origin}: {needed}, found no {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # Not the error's repr: that of a wrong encoding has all of the file in it.
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{origin}: {needed}, found {found}") from error


@contextlib.contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    The temporary name ends in the suffix of `path`, since many writers look at it. On any
    exception the temporary file is removed and `path` is as it was.

    Raises:
        InputError: the folder of `path` cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a file name is needed, found a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot make this folder: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent}: cannot write in this folder")
    aside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield aside
        os.chmod(aside, 0o666 & ~UMASK)  # some writers make their files private
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
