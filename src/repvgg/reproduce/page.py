"""One page of all results of a folder, each table with the paper's figure and ours side by side."""

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from repvgg.errors import InputError
from repvgg.files import written_aside
from repvgg.protocol import Protocol
from repvgg.reproduce import table1, table6, table8, tables
from repvgg.reproduce.printed import TABLE4, TABLE5
from repvgg.reproduce.report import Report
from repvgg.speed import Record, Speed

HEADER = """# Results

Figures of the paper ("paper: …") are as it prints them, measured on a 1080Ti; all others were
computed or measured with this package. Made by `repvgg reproduce page --output
{folder} --page {page}` from the files there; each table says on which machine.
"""


def write_page(folder: Path, page: Path) -> None:
    """Write a page of the records and pictures in a folder.

    Raises:
        InputError: no such folder, or no record in it.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    kinds = {path: path.name.partition("-")[0] for path in files}
    records = {
        path: Record.read(path)
        for path in files
        if path.suffix == ".json" and kinds[path] in MAKERS
    }
    sections = [section for path in files for section in _sections(path, records.get(path))]
    if not sections:
        raise InputError(f"{folder}: results of `repvgg reproduce` are needed, found none")
    speeds = [record for path, record in records.items() if kinds[path] == "speeds"]
    sections += (f"{report.markdown()}\n" for report in side_by_side(speeds))
    for path in files:
        if path.name.startswith("figure") and path.suffix == ".png":
            link = Path(os.path.relpath(path, page.parent)).as_posix()
            sections.append(f"## {path.stem}\n\n![{path.stem}]({link})\n")
    with written_aside(page) as aside:
        text = "\n".join([HEADER.format(folder=folder.as_posix(), page=page.as_posix()), *sections])
        aside.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def side_by_side(records: list[Record]) -> Iterator[Report]:
    """Images a second of each network on every runtime, of records of one machine and batch."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        protocol = record.protocol
        facts = tuple(str(record.facts[name]) for name in ("machine", "avx512", "gpus", "threads"))
        groups.setdefault((*facts, protocol.batch, protocol.precision), []).append(record)
    for (machine, *_, batch, precision), group in groups.items():
        if len(group) < 2:
            continue
        speeds = [{s.name: s.images_per_second for s in record.speeds()} for record in group]
        names = dict.fromkeys(name for of_record in speeds for name in of_record)
        rows = tuple(
            (name, *(round(s[name], 2) if name in s else None for s in speeds)) for name in names
        )
        columns = ("network", *(record.protocol.place for record in group))
        title = f"Runtimes side by side, images a second ({precision}, batch {batch}, {machine})"
        notes = ("Each runtime was measured by itself, one after the other; ± as in its table.",)
        yield Report(title, columns, rows, notes)


def _sections(path: Path, record: Record | None) -> Iterator[str]:
    kind = path.name.partition("-")[0]
    if record is not None:
        where, date = _where(record), record.facts["date"]
        for report in MAKERS[kind](record.speeds(), record.protocol) if record.seconds else ():
            yield f"{report.markdown()}\nMeasured on {where}, {date} (`{path.name}`).\n"
    elif path.suffix == ".csv" and kind == "figure3":
        with open(path, newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        title = f"{FIGURE3} ({path.stem})"
        yield Report(title, tuple(columns), tuple(map(tuple, rows))).markdown()


def _where(record: Record) -> str:
    facts, protocol = record.facts, record.protocol
    on_gpu = facts["gpus"] and protocol.device != "cpu" and protocol.runtime in ("torch", "compile")
    what = facts["gpus"][0] if on_gpu else f"{facts['machine']}, {facts['threads']} threads"
    return f"{what}, torch {facts['torch']}"


def _of_speeds(speeds: list[Speed], protocol: Protocol) -> Iterator[Report]:
    measured = {speed.name for speed in speeds}
    for name, printed in (("Table 4", TABLE4), ("Table 5", TABLE5)):
        if rows := tuple(row for row in printed if row.name in measured):
            yield tables.report(rows, speeds, f"{name} ({protocol.title})")
    pairs = tables.speedups(TABLE4, speeds, protocol.title)
    if pairs.rows:
        yield pairs


def _of_table1(speeds: list[Speed], protocol: Protocol) -> Iterator[Report]:
    shape = speeds[0].channels, speeds[0].image_size
    yield table1.report(speeds, shape, f"Table 1 ({protocol.title})")


def _of_table6(speeds: list[Speed], protocol: Protocol) -> Iterator[Report]:
    yield table6.report(speeds, f"Table 6, speed before conversion ({protocol.title})")


def _of_table8(speeds: list[Speed], protocol: Protocol) -> Iterator[Report]:
    yield table8.report(speeds, f"Table 8 ({protocol.title})")


FIGURE3 = "Fig. 3: peak memory of activations"

MAKERS: dict[str, Callable[[list[Speed], Protocol], Iterator[Report]]] = {
    "speeds": _of_speeds,
    "table1": _of_table1,
    "table6": _of_table6,
    "table8": _of_table8,
}
