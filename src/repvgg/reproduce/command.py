"""The commands that measure: `reproduce`, `compare` and `bench`."""

import dataclasses
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from repvgg.ablations.command import ABLATION_FOLDER
from repvgg.console import say
from repvgg.errors import InputError
from repvgg.protocol import Protocol

if TYPE_CHECKING:
    from repvgg.reproduce.report import Report
    from repvgg.speed import Contender, Record

What = Literal[
    "table1", "table4", "table5", "table6", "table7", "table8", "speedups", "figure1", "figure3",
    "page",
]  # fmt: skip


@dataclass(frozen=True)
class Reproduce:
    """Measure a table or figure of the paper on this machine, beside the paper's own figures.

    A stopped measurement keeps what it has; the same command goes on from there.
    """

    what: Positional[What]
    """Table or figure; `speedups` are the pairs of Sect. 4.1; `page` makes a page of all
    results in the output folder; `table6` and `table7` show what `repvgg ablate` left there, and
    `table6` measures the speed of RepVGG-B0 before conversion."""
    quick: bool = False
    """Batches of 8 and 5 rounds in place of the paper's 128 and 50, for a small machine; of Table 8
    single images of 257×257."""
    output: Path | None = None
    """Folder for results, tables and pictures; `reproduced` if not given, and for `table6` and
    `table7` that of `repvgg ablate`."""
    page: Path | None = None
    """File that `page` writes; results.md in the output folder if not given."""
    restart: bool = False
    """Throw away what was measured before with this protocol."""
    protocol: OmitArgPrefixes[Protocol] = field(default_factory=Protocol)

    def run(self) -> None:
        if self.what == "page":
            from repvgg.reproduce.page import write_page

            page = self.page or self._folder / "results.md"
            write_page(self._folder, page)
            say(f"written: {page}")
        elif self.what == "table1":
            self._table1()
        elif self.what == "table6":
            self._table6()
        elif self.what == "table7":
            self._ablations()
        elif self.what == "table8":
            self._table8()
        elif self.what == "figure3":
            self._figure3()
        else:
            self._tables()

    @property
    def _used(self) -> Protocol:
        return self.protocol.quick() if self.quick else self.protocol

    @property
    def _folder(self) -> Path:
        usual = ABLATION_FOLDER if self.what in ("table6", "table7") else Path("reproduced")
        return self.output or usual

    def _record(self, what: str, protocol: Protocol) -> "Record":
        from repvgg.speed import Record

        return Record(self._folder / f"{what}-{protocol.slug}.json", protocol, restart=self.restart)

    def _table1(self) -> None:
        from repvgg.reproduce import table1
        from repvgg.speed import measure

        # Sect. 2.4: batch 32, an average of 10 runs.
        usual = {"batch": 32, "warmup": 3, "rounds": 10}
        protocol = self.protocol
        if protocol.is_the_papers_length:
            protocol = dataclasses.replace(protocol, **usual)
        shape = table1.SMALL_SHAPE if self.quick else table1.PAPER_SHAPE
        if self.quick:
            protocol = dataclasses.replace(protocol, batch=min(protocol.batch, 4))
        record = self._record("table1", protocol)
        contenders = table1.contenders(shape)
        is_default = self.protocol.is_the_papers_length and not self.quick
        _require_time(contenders, protocol, is_default=is_default)
        measure(contenders, record)
        report = table1.report(record.speeds(), shape, f"Table 1 ({protocol.title})")
        self._publish(report, record, ("paper: TFLOPS", "TFLOPS"))

    def _table8(self) -> None:
        from repvgg.reproduce import table8
        from repvgg.speed import measure

        protocol = self._used
        if self.quick and protocol.batch == Protocol().quick().batch:
            protocol = dataclasses.replace(protocol, batch=1)
        elif protocol.batch == Protocol().batch:
            protocol = dataclasses.replace(protocol, batch=table8.BATCH)
        size = table8.SMALL_SIZE if self.quick else table8.PAPER_SIZE
        contenders = table8.contenders(size)
        record = self._record(f"table8-{size}px", protocol)
        _require_time(contenders, protocol, is_default=self._used.is_the_papers_length)
        measure(contenders, record)
        report = table8.report(record.speeds(), f"Table 8 ({protocol.title})")
        self._publish(report, record, ("paper: images/s", "images/s"))

    def _table6(self) -> None:
        from repvgg.ablations.run import RESULTS
        from repvgg.reproduce import table6
        from repvgg.speed import measure

        if (self._folder / RESULTS).exists():
            self._ablations()
        else:
            say(f"accuracies: `repvgg ablate --output {self._folder}` measures them")
        record = self._record("table6", self._used)
        contenders = table6.contenders()
        _require_time(contenders, self._used, is_default=self._used.is_the_papers_length)
        measure(contenders, record)
        report = table6.report(record.speeds(), f"Table 6 ({self._used.title})")
        self._publish(report, record, ("paper: images/s", "images/s"))

    def _tables(self) -> None:
        from repvgg.reproduce import figures, tables
        from repvgg.reproduce.printed import PAIRS, TABLE4, TABLE5

        in_pairs = {name for pair in PAIRS for name in pair}
        printed = {
            "table4": TABLE4,
            "table5": TABLE5,
            "speedups": tuple(row for row in TABLE4 if row.name in in_pairs),
        }.get(self.what, TABLE4 + TABLE5)
        record = self._measured([row.name for row in printed])
        speeds, title = record.speeds(), record.protocol.title
        if self.what == "figure1":
            path = self._folder / f"figure1-{record.protocol.slug}.png"
            figures.draw_figure1(path, speeds, f"{record.facts['machine']}, {title}")
            say(f"drawn: {path} and .svg")
            return
        if self.what != "speedups":
            number = self.what.removeprefix("table")
            report = tables.report(printed, speeds, f"Table {number} ({title})")
            self._publish(report, record, ("paper: images/s", "images/s"))
        if self.what != "table5":
            tables.speedups(TABLE4, speeds, title).show()

    def _measured(self, names: list[str]) -> "Record":
        """One record for both tables and the figure, since many a network stands in several."""
        from repvgg.reproduce import tables
        from repvgg.speed import measure

        protocol = self._used
        record = self._record("speeds", protocol)
        contenders = tables.contenders(list(dict.fromkeys(names)))
        if any(len(record.seconds.get(name, ())) < protocol.rounds for name in names):
            _require_time(contenders, protocol, is_default=protocol.is_the_papers_length)
        measure(contenders, record)
        return record

    def _figure3(self) -> None:
        from repvgg.reproduce import figures
        from repvgg.runtimes import torch_device

        protocol = self._used
        batch, device = 8 if self.quick else min(protocol.batch, 32), torch_device(protocol)
        report = figures.figure3(batch, device)
        report.show()
        path = self._folder / f"figure3-{device.type}-batch{batch}.png"
        report.write_csv(path.with_suffix(".csv"))
        figures.draw_figure3(path, report)
        say(f"drawn: {path} and .svg")

    def _ablations(self) -> None:
        from repvgg.ablations import run
        from repvgg.reproduce.printed import TABLE6, TABLE7

        table = TABLE6 if self.what == "table6" else TABLE7
        blocks = {row.block for row in table}
        outcomes = run.read_outcomes(self._folder / run.RESULTS)
        found = [outcome for outcome in outcomes if outcome.block in blocks]
        times = run.speeds(self._folder, found)
        run.report(found, f"Table {self.what[-1]} ({self._folder})", times, table).show()
        run.orders(outcomes, table).show()

    def _publish(self, report: "Report", record: "Record", drawn: tuple[str, str]) -> None:
        """Show a table, and write it as CSV and the columns to be drawn as a picture."""
        from repvgg.reproduce.figures import draw_bars

        report.show()
        # A record of speeds is that of both Table 4 and Table 5; each other table has its own.
        path = record.path.with_suffix(".csv")
        path = path.with_name(path.name.replace("speeds", self.what, 1))
        report.write_csv(path)
        draw_bars(path.with_suffix(".png"), report, drawn)
        say(f"written: {path}, .png and .svg; every round: {record.path}")


LONG_SECONDS = 30 * 60
WORTH_SAYING = 60
# Of so few rounds nobody needs to be warned; the estimate itself takes some seconds.
QUICK_ENOUGH = 10


def _require_time(contenders: "list[Contender]", protocol: Protocol, *, is_default: bool) -> None:
    """Refuse what takes very long here, if nobody asked for that length; else say how long."""
    from repvgg.speed import estimated_seconds

    if protocol.rounds < QUICK_ENOUGH:
        return
    seconds = estimated_seconds(contenders, protocol)
    if seconds > LONG_SECONDS and is_default:
        raise InputError(
            f"the paper's protocol, {protocol.warmup} + {protocol.rounds} batches of "
            f"{protocol.batch} of each network, takes about {seconds / 3600:.1f} hours on this "
            "machine; --quick is needed, or --batch and --rounds of your choice"
        )
    if seconds > WORTH_SAYING:
        left = timedelta(seconds=round(seconds))
        say(f"this takes about {left}; it can be stopped, and goes on")


@dataclass(frozen=True)
class Compare:
    """Time networks in turn, folded: the paper's, ours and timm's, by name."""

    networks: Positional[tuple[str, ...]]
    """Names: repvgg_a2, resnet50 (timm's), ResNet-50 (the paper's), …; each runs at the size of
    images that it is meant for."""
    output: Path = Path("compared")
    """Folder for the results."""
    restart: bool = False
    """Throw away what was measured before with this protocol."""
    protocol: OmitArgPrefixes[Protocol] = field(
        default_factory=lambda: Protocol(batch=8, warmup=2, rounds=10)
    )

    def run(self) -> None:
        from repvgg.reproduce import tables
        from repvgg.speed import Record, measure

        if len(self.networks) < 1:
            raise InputError("networks: one name or more needed, found none")
        path = self.output / f"speeds-{self.protocol.slug}.json"
        record = Record(path, self.protocol, restart=self.restart)
        measure(tables.contenders(list(self.networks)), record)
        speeds = [speed for speed in record.speeds() if speed.name in self.networks]
        report = tables.comparison(speeds, f"Compared ({self.protocol.title})")
        report.show()
        report.write_csv(path.with_suffix(".csv"))
        say(f"written: {path} and .csv")


@dataclass(frozen=True)
class Bench:
    """Time a network of yours: training-time against plain, on every runtime that is installed.

    Latency at batch 1, and throughput at the best batch.
    """

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """File of a network, training-time or plain."""
    output: Path = Path("benched")
    """Folder for the results and the chart."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Images at a time that are tried."""
    threads: int | None = None
    """Of the CPU; PyTorch's number if None."""
    rounds: int = 10
    """Batches that are timed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where PyTorch runs it."""
    compile: bool = False
    """Also by torch.compile, which takes minutes and needs a C++ compiler on CPUs."""

    def run(self) -> None:
        from repvgg.checkpoint import load
        from repvgg.reproduce.bench import bench, draw

        if not self.batches or min(self.batches) < 1:
            raise InputError(f"batches: numbers of 1 or more needed, found {self.batches}")
        protocol = Protocol(warmup=2, rounds=self.rounds, threads=self.threads, device=self.device)
        report = bench(load(self.model), protocol, self.batches, compiled=self.compile)
        report.show()
        stem = self.output / self.model.stem
        report.write_csv(stem.with_suffix(".csv"))
        draw(stem.with_suffix(".png"), report)
        say(f"written: {stem}.csv, .png and .svg")
