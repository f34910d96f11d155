"""The native engine beside the general runtimes, in turn in one run.

`python benchmarks/engine.py [--models NAME ...] [--batches N ...] [--threads N ...] [--sizes N ...]
[--runtimes NAME ...] [--isa NAME] [--quick] [--json FILE]`. All compute in fp32 and hold their
weights in fp32. In each round every runtime gets a moment of rest, so that the waiting threads of
the one before are asleep, one call that is not timed, and one that is. The file grows case by case,
and a second call goes on from it.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported: its threads would go on spinning while another runtime is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro
from torch import nn

import repvgg
from repvgg.console import say, show_table
from repvgg.files import written_aside
from repvgg.machine import machine_facts
from repvgg.protocol import Protocol, Runtime
from repvgg.runtimes import Runner, as_onnx, installed_runtimes, needs_onnx, prepare
from repvgg.timing import Times
from repvgg.verification import compare_outputs

Row = dict[str, Any]
COLUMNS = ("model", "size", "batch", "threads", "runtime", "ms", "±", "times as fast", "error")


@dataclass(frozen=True)
class Options:
    """Milliseconds of a batch on each runtime."""

    models: list[str] = field(default_factory=lambda: ["repvgg_a0", "repvgg_b1"])
    batches: list[int] = field(default_factory=lambda: [1, 8])
    threads: list[int] = field(default_factory=lambda: [os.cpu_count() or 1])
    sizes: list[int] = field(default_factory=lambda: [224])
    """Side of the images in pixels."""
    runtimes: list[Runtime] = field(default_factory=installed_runtimes)
    isa: str | None = None
    """Instruction set of the engine, in place of the best."""
    rounds: int = 15
    quick: bool = False
    """Three rounds."""
    json: Path | None = None
    """File of the rows; cases that it has are not measured again."""


def network_of(name: str) -> nn.Module:
    """Plain, with varied statistics folded in."""
    torch.manual_seed(0)
    model = repvgg.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    return repvgg.reparameterize(model)


def rested(runner: Runner) -> float:
    """Seconds of a call, after one that is not timed."""
    time.sleep(0.03)
    runner()
    start = time.perf_counter()
    runner()
    return time.perf_counter() - start


def measure(network: nn.Module, case: Row, options: Options, onnx: Path) -> list[Row]:
    """One row for each runtime."""
    size, batch, threads = case["size"], case["batch"], case["threads"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    with torch.inference_mode():
        expected = network(images)
    runners: dict[str, Runner] = {}
    for name in options.runtimes:
        say(f"{case['model']}, batch {batch}, {size} pixels, {threads} threads: preparing {name}")
        if name == "native":
            engine = repvgg.compile(network, threads=threads, isa=options.isa)
            runners[name] = lambda: engine(images)
        else:
            protocol = Protocol(runtime=name, batch=batch, threads=threads, device="cpu")
            used = onnx if needs_onnx(name) else None
            runners[name] = prepare(network, images, protocol, used)
    errors = {name: compare_outputs(expected, run()).max_rel_error for name, run in runners.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(3 if options.quick else options.rounds):
        for name, run in runners.items():
            seconds[name].append(rested(run))
    rows = []
    for name, values in seconds.items():
        times = Times(tuple(values))
        rows.append(
            {
                **case,
                "runtime": name,
                "isa": (options.isa or "best") if name == "native" else None,
                "median_ms": 1e3 * times.median,
                "min_ms": 1e3 * min(values),
                "max_ms": 1e3 * max(values),
                "spread": times.spread,
                "max_rel_error": errors[name],
            }
        )
    return rows


def table_of(rows: list[Row]) -> list[tuple[Any, ...]]:
    """With each runtime's speed over that of the best other than the engine."""
    lines = []
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("model", "size", "batch", "threads"))]
        others = [r["median_ms"] for r in same if r["runtime"] != "native"]
        ratio = f"{min(others) / row['median_ms']:.2f}" if others else ""
        ms, spread = f"{row['median_ms']:.2f}", f"{100 * row['spread']:.1f} %"
        place = (row["model"], row["size"], row["batch"], row["threads"], row["runtime"])
        lines.append((*place, ms, spread, ratio, f"{row['max_rel_error']:.1e}"))
    return lines


def main(options: Options) -> None:
    """Measure case by case; write after each."""
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    for model in options.models:
        network = network_of(model)
        with as_onnx(network, torch.zeros(1, 3, 224, 224)) as onnx:
            for size in options.sizes:
                for threads in options.threads:
                    for batch in options.batches:
                        case = {"model": model, "size": size, "batch": batch, "threads": threads}
                        if any(case.items() <= row.items() for row in rows):
                            continue
                        torch.set_num_threads(threads)
                        found = measure(network, case, options, onnx)
                        rows += found
                        show_table("", COLUMNS, table_of(found))
                        if options.json:
                            text = json.dumps({**machine_facts(), "rows": rows}, indent=1)
                            with written_aside(options.json) as aside:
                                aside.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
