"""What the commands show: lines, tables, and bars with the time that is left."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")

_out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
_error = Console(highlight=False, soft_wrap=True, stderr=True)
_speaker = ""


def speak_as(name: str) -> None:
    """Begin each line with a name, and show no bars: other processes speak beside this one."""
    global _speaker
    _speaker = f"{name}: "


def say(text: object) -> None:
    """One line on the standard output, never wrapped."""
    _out.print(Text(_speaker + str(text)))


def warn(text: object) -> None:
    """One line on the standard error."""
    _error.print(Text(_speaker + str(text)))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table, as wide as it needs to be where the output is no terminal."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        right = bool(rows) and all(_is_figure(str(row[index])) for row in rows)
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _out.print(table)


def _is_figure(text: str) -> bool:
    return not text or text.lstrip("-+≤").replace(",", "")[:1].isdigit()


@contextlib.contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A bar on the standard error, if that is a terminal; call what it gives after each step.

    The call's argument, a few words, stands behind the bar.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_error,
        transient=True,
        disable=bool(_speaker) or not _error.is_terminal,
    ) as bars:
        task = bars.add_task(description, total=total, completed=done, note="")
        yield lambda note="": bars.update(task, advance=1, note=note)


def with_bar(description: str, items: Iterator[Item], total: int) -> Iterator[Item]:
    """The items, with a bar that shows how many are done."""
    with progress_bar(description, total) as step:
        for item in items:
            yield item
            step("")
