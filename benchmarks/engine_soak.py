"""A soak of the native engine: many calls of all shapes from several threads.

`python benchmarks/engine_soak.py [--minutes N] [--callers N] [--model NAME] [--json FILE]`. Four
threads call two engines, of one and of two threads, with random batches of random sizes; every
result is compared with PyTorch's in double precision. The resident memory is noted at intervals:
it must not grow once the plans that are kept have been through their cache. Exits with 1 if a
result is wrong or the memory grew.
"""

import json
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from engine import network_of, resident_megabytes

import repvgg
from repvgg.console import progress_bar, say
from repvgg.engine import Engine
from repvgg.files import written_aside
from repvgg.machine import machine_facts

SIZES = tuple(range(32, 257, 16))
LARGEST_BATCH = 8
TOLERANCE = 1e-5
# Of the resident memory, from the second quarter of the time to the last.
GROWTH = 1.05


@dataclass(frozen=True)
class Options:
    """Calls without end, for a while."""

    model: str = "repvgg_a0"
    minutes: float = 10
    callers: int = 4
    json: Path | None = None
    """File of the result."""


class Soak:
    """Calls, and what went wrong."""

    def __init__(self, network: torch.nn.Module, seconds: float):
        generator = torch.Generator().manual_seed(0)
        self.images = {
            size: torch.randn(LARGEST_BATCH, 3, size, size, generator=generator) for size in SIZES
        }
        network.double()
        with torch.inference_mode():
            self.truth = {size: network(x.double()) for size, x in self.images.items()}
        network.float()
        self.end = time.monotonic() + seconds
        self.calls, self.worst, self.failures = 0, 0.0, list[str]()
        self._lock = threading.Lock()

    def call(self, engine: Engine, seed: int) -> None:
        """Until the time is over."""
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            size, count = chance.choice(SIZES), chance.randint(1, LARGEST_BATCH)
            first = chance.randint(0, LARGEST_BATCH - count)
            part = slice(first, first + count)
            try:
                logits = engine(self.images[size][part])
            except Exception as error:
                self._note(1.0, f"{count} images of {size}×{size}: {error!r}")
                return
            truth = self.truth[size][part]
            error = float((logits.double() - truth).abs().max() / truth.abs().max())
            self._note(error, f"{count} images of {size}×{size}: error {error:.1e}")

    def _note(self, error: float, what: str) -> None:
        with self._lock:
            self.calls += 1
            self.worst = max(self.worst, error)
            if not error <= TOLERANCE:
                self.failures.append(what)


def main(options: Options) -> None:
    """Run, and say what was seen."""
    network = network_of(options.model)
    engines = [repvgg.compile(network, threads=threads, tune=None) for threads in (1, 2)]
    soak = Soak(network, 60 * options.minutes)
    threads = [
        threading.Thread(target=soak.call, args=(engines[i % 2], i)) for i in range(options.callers)
    ]
    for thread in threads:
        thread.start()
    memory = list[float]()
    with progress_bar("soak", 40) as show:
        for _ in range(40):
            time.sleep(60 * options.minutes / 40)
            memory.append(resident_megabytes())
            show(f"{soak.calls} calls, {memory[-1]:.0f} MB")
    for thread in threads:
        thread.join()
    growth = statistics.median(memory[30:]) / statistics.median(memory[10:20])
    row: dict[str, Any] = {
        "model": options.model,
        "minutes": options.minutes,
        "callers": options.callers,
        "calls": soak.calls,
        "largest_error": soak.worst,
        "failures": soak.failures,
        "resident_megabytes": [round(megabytes) for megabytes in memory],
        "growth": round(growth, 4),
    }
    say(
        f"{soak.calls} calls, largest error {soak.worst:.1e}, {len(soak.failures)} failures; "
        f"{memory[10]:.0f} MB after a quarter, {memory[-1]:.0f} MB at the end"
    )
    if options.json:
        with written_aside(options.json) as aside:
            aside.write_text(json.dumps({**machine_facts(), **row}, indent=1) + "\n")
    sys.exit(bool(soak.failures) or growth > GROWTH)


if __name__ == "__main__":
    main(tyro.cli(Options))
