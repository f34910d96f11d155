"""The speed of several networks, timed in turn and kept as it comes (paper, Sect. 4.1)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.console import progress_bar, say, warn
from repvgg.costs import built_without_memory, cost
from repvgg.errors import InputError
from repvgg.files import reading, written_aside
from repvgg.machine import RUNTIME_LIBRARIES, machine_facts
from repvgg.protocol import Protocol
from repvgg.runtimes import MODULES, Runner, UnsupportedError, prepare
from repvgg.timing import Times, rounds_in_turn, seconds_of


@dataclass(frozen=True)
class Contender:
    """A network to be timed: how to build it, in eval mode, and size and channels of its images."""

    name: str
    build: Callable[[], nn.Module]
    image_size: int = 224
    channels: int = 3


@dataclass(frozen=True)
class Speed:
    """What was measured of one network.

    Attributes:
        name: of the network.
        image_size: in pixels.
        channels: of its images.
        batch: images at a time.
        times: of the batches.
    """

    name: str
    image_size: int
    channels: int
    batch: int
    times: Times

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return self.batch / self.times.median

    def row(self) -> dict[str, Any]:
        """Flat, for a file of results."""
        seconds = self.times.seconds
        return {
            "model": self.name,
            "image_size": self.image_size,
            "channels": self.channels,
            "batch": self.batch,
            "images_per_second": round(self.images_per_second, 2),
            "median_ms": round(1000 * self.times.median, 3),
            "min_ms": round(1000 * min(seconds), 3),
            "max_ms": round(1000 * max(seconds), 3),
            "spread": round(self.times.spread, 4),
            "rounds": len(seconds),
        }


class Record:
    """A file of measured seconds, written after every round, so that a stopped measurement goes on.

    Args:
        path: the JSON file; what is there from the same protocol and machine is taken over.
        protocol: how the networks are run.
        restart: begin anew.

    Raises:
        InputError: the file holds something else.
    """

    def __init__(self, path: Path, protocol: Protocol, *, restart: bool = False):
        self.path, self.protocol = path, protocol
        self.facts = {**machine_facts(), "protocol": asdict(protocol)}
        if protocol.threads:
            self.facts["threads"] = protocol.threads
        self.seconds: dict[str, list[float]] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        if path.exists() and not restart:
            self._take_over()

    @classmethod
    def read(cls, path: Path) -> "Record":
        """A record to look at, of whatever protocol and machine.

        Raises:
            InputError: the file holds something else.
        """
        with reading(path, "a file of results is needed"):
            header = json.loads(path.read_text(encoding="utf-8"))
            record = cls(path, Protocol(**header["protocol"]), restart=True)
            record._take_rows(header)
        record.facts = header
        return record

    def _take_rows(self, header: dict[str, Any]) -> None:
        """Out of the header."""
        for row in header.pop("rows"):
            self.seconds[row["model"]] = list(map(float, row["seconds"]))
            self.shapes[row["model"]] = int(row["image_size"]), int(row["channels"])

    def _take_over(self) -> None:
        with reading(self.path, "a file of results is needed"):
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            self._take_rows(earlier)
        self.facts["date"] = earlier.get("date")
        used = {name.lower() for name in MODULES[self.protocol.runtime]}
        names = sorted((earlier.keys() | self.facts.keys()) - (set(RUNTIME_LIBRARIES) - used))
        if different := [name for name in names if earlier.get(name) != self.facts.get(name)]:
            raise InputError(
                f"{self.path}: was measured with another {', '.join(different)}; another output, "
                "or --restart, is needed"
            )

    def write(self) -> None:
        """All that was measured so far."""
        rows = [
            {**speed.row(), "seconds": [round(value, 6) for value in speed.times.seconds]}
            for speed in self.speeds()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(self.path) as aside:
            aside.write_text(json.dumps({**self.facts, "rows": rows}, indent=1), encoding="utf-8")

    def speeds(self) -> list[Speed]:
        """Of each network that was timed at least once."""
        return [
            Speed(name, *self.shapes[name], self.protocol.batch, Times(tuple(seconds)))
            for name, seconds in self.seconds.items()
            if seconds
        ]


def measure(contenders: Sequence[Contender], record: Record) -> list[Speed]:
    """Time networks in turn, round after round, until each has the rounds of the protocol.

    Those that the runtime cannot run are named and left out.

    Args:
        contenders: the networks.
        record: what was measured before, and where every round is written.

    Raises:
        InputError: a runtime that is not installed or can run none of them, or a device that is
            not there.
    """
    rounds = record.protocol.rounds
    todo = [c for c in contenders if len(record.seconds.get(c.name, ())) < rounds]
    if todo:
        runners = _prepared(todo, record.protocol)
        for contender in (c for c in todo if c.name in runners):
            record.seconds.setdefault(contender.name, [])
            record.shapes[contender.name] = contender.image_size, contender.channels
        _time(runners, record)
    return record.speeds()


def _time(runners: dict[str, Runner], record: Record) -> None:
    rounds = record.protocol.rounds
    done = min(len(record.seconds[name]) for name in runners)
    try:
        with progress_bar("timing", rounds, done) as show:
            while todo := {n: r for n, r in runners.items() if len(record.seconds[n]) < rounds}:
                for name, runner in todo.items():
                    record.seconds[name].append(seconds_of(runner))
                record.write()
                show("")
    except KeyboardInterrupt:
        record.write()
        say(f"stopped; what was measured is in {record.path}, and the same command goes on")
        raise


def _prepared(contenders: Sequence[Contender], protocol: Protocol) -> dict[str, Runner]:
    """Every network ready to run, its caches and clocks warm."""
    runners: dict[str, Runner] = {}
    last: UnsupportedError | None = None
    with progress_bar("preparing", len(contenders)) as show:
        for contender in contenders:
            shape = (protocol.batch, contender.channels, *[contender.image_size] * 2)
            images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            try:
                runners[contender.name] = prepare(contender.build(), images, protocol)
            except UnsupportedError as error:
                warn(f"{contender.name} is left out: {error}")
                last = error
                continue
            for _ in rounds_in_turn({contender.name: runners[contender.name]}, protocol.warmup):
                pass
            show(contender.name)
    if not runners and last:
        raise last
    return runners


def estimated_seconds(contenders: Sequence[Contender], protocol: Protocol) -> float:
    """About how long all rounds take, by the time of one image and the multiply-adds of all."""
    macs = []
    for contender in contenders:
        network = built_without_memory(contender.build)
        macs.append(cost(network, contender.image_size, contender.channels).macs)
    batches = protocol.warmup + protocol.rounds
    for least in sorted(range(len(macs)), key=macs.__getitem__):
        contender = contenders[least]
        shape = 1, contender.channels, contender.image_size, contender.image_size
        try:
            runner = prepare(contender.build(), torch.rand(shape), protocol)
        except UnsupportedError:
            continue  # `measure` names it
        runner()
        seconds = min(seconds_of(runner) for _ in range(3))
        return seconds * sum(macs) / macs[least] * protocol.batch * batches
    return 0.0
