"""The native engine beside the general runtimes, in turn in one run.

`python benchmarks/engine.py [--models NAME ...] [--batches N ...] [--threads N ...] [--sizes N ...]
[--runtimes NAME ...] [--isa NAME] [--quick] [--json FILE]`. All compute in fp32 and hold their
weights in fp32. Each runtime has a process of its own, which is stopped while another one works:
some let their threads spin long after a call. In each round every runtime does one call that is
not timed and one that is. The file grows case by case, and a second call goes on from it.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

# Before torch is imported: its threads would go on spinning while another runtime is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro
from torch import Tensor, nn

import repvgg
from repvgg.console import say, show_table
from repvgg.files import written_aside
from repvgg.machine import machine_facts
from repvgg.protocol import Protocol, Runtime
from repvgg.runtimes import as_onnx, installed_runtimes, needs_onnx, prepare
from repvgg.timing import Times
from repvgg.verification import compare_outputs

Row = dict[str, Any]
COLUMNS = (
    "model",
    "size",
    "batch",
    "threads",
    "runtime",
    "ms",
    "±",
    "times as fast",
    "error",
    "MB",
)


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
            nn.init.normal_(cast(Tensor, module.running_mean), 0, 0.2)
            nn.init.uniform_(cast(Tensor, module.running_var), 0.5, 2)
    return repvgg.reparameterize(model)


def work(pipe: Any, case: Row, name: Runtime, isa: str | None, onnx: Path) -> None:
    """Life of one runtime's process: prepare, say how exact and how large it is, run when asked.

    The engine says too how it computes each layer, and which share of the processor's limit it
    reaches.
    """
    torch.set_num_threads(case["threads"])
    network = network_of(case["model"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case["batch"], 3, case["size"], case["size"], generator=generator)
    with torch.inference_mode():
        expected = network(images)
    before, facts = resident_megabytes(), {}
    if name == "native":
        engine = repvgg.compile(network, threads=case["threads"], isa=isa)

        def run() -> torch.Tensor:
            return engine(images)

        run()
        facts["layers"] = [dataclasses.asdict(layer) for layer in engine.plan]
    else:
        protocol = Protocol(
            runtime=name, batch=case["batch"], threads=case["threads"], device="cpu"
        )
        run = prepare(network, images, protocol, onnx if needs_onnx(name) else None)
    error = compare_outputs(expected, run()).max_rel_error
    pipe.send({"max_rel_error": error, "megabytes": resident_megabytes() - before, **facts})
    while pipe.recv():
        run()
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)


def resident_megabytes() -> float:
    """Of this process, in 10⁶ bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Worker:
    """A runtime in a process that sleeps unless it is asked."""

    def __init__(self, *args: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.facts: Row = self.pipe.recv()
        self._signal(signal.SIGSTOP)

    def seconds(self) -> float:
        """Of one call."""
        self._signal(signal.SIGCONT)
        self.pipe.send(True)
        result = self.pipe.recv()
        self._signal(signal.SIGSTOP)
        return result

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid or 0, number)


def measure(case: Row, options: Options, onnx: Path) -> list[Row]:
    """One row for each runtime."""
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {}
    try:
        for name in options.runtimes:
            say(f"{case}: preparing {name}")
            try:
                workers[name] = Worker(case, name, options.isa, onnx)
            except EOFError:
                say(f"{name} cannot run {case['model']}")
        for _ in range(3 if options.quick else options.rounds):
            for name, worker in workers.items():
                seconds.setdefault(name, []).append(worker.seconds())
    finally:
        for worker in workers.values():
            worker.stop()
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
                **workers[name].facts,
            }
        )
    return rows


def table_of(rows: list[Row]) -> list[tuple[Any, ...]]:
    """With each runtime's speed over that of the best other than the engine."""
    lines = []
    for row in rows:
        same = [
            r for r in rows if all(r[k] == row[k] for k in ("model", "size", "batch", "threads"))
        ]
        others = [r["median_ms"] for r in same if r["runtime"] != "native"]
        ratio = f"{min(others) / row['median_ms']:.2f}" if others else ""
        ms, spread = f"{row['median_ms']:.2f}", f"{100 * row['spread']:.1f} %"
        place = (row["model"], row["size"], row["batch"], row["threads"], row["runtime"])
        lines.append(
            (*place, ms, spread, ratio, f"{row['max_rel_error']:.1e}", round(row["megabytes"]))
        )
    return lines


def main(options: Options) -> None:
    """Measure case by case; write after each."""
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    for model in options.models:
        with as_onnx(network_of(model), torch.zeros(1, 3, 224, 224)) as onnx:
            for size in options.sizes:
                for threads in options.threads:
                    for batch in options.batches:
                        case = {"model": model, "size": size, "batch": batch, "threads": threads}
                        if any(case.items() <= row.items() for row in rows):
                            continue
                        found = measure(case, options, onnx)
                        rows += found
                        show_table("", COLUMNS, table_of(found))
                        if options.json:
                            text = json.dumps({**machine_facts(), "rows": rows}, indent=1)
                            with written_aside(options.json) as aside:
                                aside.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
