"""A table of the paper's figures beside ours: on the screen, as CSV, and as Markdown."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repvgg.console import say, show_table
from repvgg.files import written_aside

Cell = str | float | int | None


@dataclass(frozen=True)
class Report:
    """A table and what is to be said about it.

    Attributes:
        title: one line.
        columns: names; those of the paper's own figures begin with "paper:".
        rows: of cells; None where there is no figure.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = field(default=())

    def show(self) -> None:
        """On the screen; without rows the notes alone."""
        if self.rows:
            show_table(self.title, self.columns, [list(map(text_of, row)) for row in self.rows])
        for note in self.notes:
            say(note)

    def write_csv(self, path: Path) -> None:
        """All rows, with every digit."""
        with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self.rows)

    def markdown(self) -> str:
        """A section of a page."""
        right = [_is_numeric(row[index] for row in self.rows) for index in range(len(self.columns))]
        lines = [
            f"## {self.title}",
            "",
            _line(self.columns),
            _line(["---:" if is_right else "---" for is_right in right]),
            *(_line(list(map(text_of, row))) for row in self.rows),
            "",
            *(f"{note}\n" for note in self.notes),
        ]
        return "\n".join(lines)


def text_of(cell: Cell) -> str:
    """In six digits, as many as the paper prints at most; nothing where there is no figure."""
    return "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def _is_numeric(cells: Any) -> bool:
    return all(cell is None or isinstance(cell, int | float) for cell in cells)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
