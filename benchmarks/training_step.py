"""One training step: each form of the block, timm's RepVGG, and the plain network as the floor.

    python benchmarks/training_step.py [--quick] [--json FILE] [--models …] [--batch N]
        [--size N] [--precision fp32|bf16] [--forms …] [--rounds N] [--threads N]

All run in turn, round after round, on the same images: forward, loss and backward pass. Stored
activations are the tensors that autograd keeps for the backward pass, each storage once, without
parameters and buffers.
"""

import argparse
import contextlib
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import repvgg
from repvgg.console import say, show_table
from repvgg.lean import IMPLEMENTATIONS, use_implementation
from repvgg.machine import machine_facts
from repvgg.timing import Times, time_in_turn

DEFAULT_MODELS = ("repvgg_a0", "repvgg_b0", "repvgg_b1g4")


class SlicedConv(nn.Module):
    """timm's strided 1×1 convolution as a slice and a convolution of stride 1."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.stride = conv.weight, conv.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉)."""
        return torch.conv2d(x[..., :: self.stride, :: self.stride], self.weight)


def timm_network(name: str) -> nn.Module:
    """timm's, but for the stem's 1×1 convolution, which crashes in oneDNN (issue 6035)."""
    network: Any = timm.create_model(name, num_classes=1000)
    network.stem.conv_1x1.conv = SlicedConv(network.stem.conv_1x1.conv)
    return network


def plain_network(name: str) -> nn.Module:
    """The converted network, trained as is."""
    return repvgg.reparameterize(repvgg.create_model(name)).requires_grad_()


def networks(name: str, forms: list[str]) -> dict[str, nn.Module]:
    """All that run in turn, by the name in the table."""
    ours = {form: use_implementation(repvgg.create_model(name), form) for form in forms}
    return {"timm": timm_network(name), "plain": plain_network(name), **ours}


def step_of(network: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Callable:
    """Forward, loss and backward pass; the gradients are dropped, as before each real step."""
    network.to(images.device).to(memory_format=torch.channels_last).train()  # pyright: ignore

    def step() -> None:
        network.zero_grad()
        with (
            torch.autocast(images.device.type, torch.bfloat16)
            if precision == "bf16"
            else contextlib.nullcontext()
        ):
            loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()

    return step


def stored_bytes(step: Callable, network: nn.Module) -> int:
    """What autograd keeps in one step, each storage once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def with_cpu_seconds(step: Callable, seconds: list[float]) -> Callable:
    """The step, noting the processor time of all threads: on a shared machine, what it did itself.

    Only of use with one thread, because threads that wait for others spin.
    """

    def timed() -> None:
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)

    return timed


def peak_bytes(step: Callable, device: torch.device) -> int:
    """Most memory on the GPU in one step; on the CPU the most that the process ever held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row_of(name: str, form: str, times: Times, reference: Times, facts: dict) -> dict[str, Any]:
    """One flat row of the results; ratios are to timm's."""
    return {
        "model": name,
        "form": form,
        **facts,
        "median_ms": round(times.median * 1e3, 2),
        "min_ms": round(min(times.seconds) * 1e3, 2),
        "max_ms": round(max(times.seconds) * 1e3, 2),
        "spread": round(times.spread, 4),
        "images_per_second": round(facts["batch"] / times.median, 2),
        "time_ratio": round(times.median / reference.median, 4),
        "min_time_ratio": round(min(times.seconds) / min(reference.seconds), 4),
    }


def measure(name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each network."""
    torch.manual_seed(0)
    shape = (options.batch, 3, options.size, options.size)
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (options.batch,), device=device)
    models = networks(name, options.forms)
    steps = {
        form: step_of(model, images, labels, options.precision) for form, model in models.items()
    }
    stored = {form: stored_bytes(step, models[form]) for form, step in steps.items()}
    cpu_seconds: dict[str, list[float]] = {form: [] for form in steps}
    timed = {form: with_cpu_seconds(step, cpu_seconds[form]) for form, step in steps.items()}
    times = time_in_turn(timed, rounds=options.rounds, warmup=1)
    cpu = {form: statistics.median(seconds[1:]) for form, seconds in cpu_seconds.items()}
    peaks = {form: peak_bytes(step, device) for form, step in steps.items()}
    return [
        row_of(
            name,
            form,
            times[form],
            times["timm"],
            {
                "batch": options.batch,
                "size": options.size,
                "precision": options.precision,
                "layout": "channels_last",
                "rounds": options.rounds,
                "cpu_ms": round(cpu[form] * 1e3, 2),
                "cpu_ratio": round(cpu[form] / cpu["timm"], 4),
                "stored_mb": round(stored[form] / 1e6, 2),
                "stored_ratio": round(stored[form] / stored["timm"], 4),
                "peak_mb": round(peaks[form] / 1e6, 1) if device.type == "cuda" else None,
            },
        )
        for form in models
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the screen."""
    columns = (
        "form",
        "images/s",
        "ms",
        "± %",
        "time ÷ timm",
        "CPU ÷ timm",
        "stored MB",
        "stored ÷ timm",
    )
    first = rows[0]
    title = f"{first['model']}, batch {first['batch']} at {first['size']}, {first['precision']}"
    show_table(
        title,
        columns,
        [
            (
                row["form"],
                f"{row['images_per_second']:.1f}",
                f"{row['median_ms']:.0f}",
                f"{row['spread'] * 100:.1f}",
                f"{row['time_ratio']:.3f}",
                f"{row['cpu_ratio']:.3f}",
                f"{row['stored_mb']:.1f}",
                f"{row['stored_ratio']:.3f}",
            )
            for row in rows
        ],
    )


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description="Time and memory of one training step.")
    forms = [name for name in IMPLEMENTATIONS if name != "auto"]
    parser.add_argument("--quick", action="store_true", help="A0 with few small images")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument("--forms", nargs="+", default=forms, choices=forms)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, help="torch's own choice if not given")
    options = parser.parse_args()
    if options.quick:
        options.models, options.batch, options.size, options.rounds = ["repvgg_a0"], 2, 64, 2
    return options


def main() -> None:
    """Measure, show, write."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in options.models:
        rows += measure(name, options, device)
        show([row for row in rows if row["model"] == name])
    if options.json:
        facts = {**machine_facts(), "device": device.type}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        say(f"results in {options.json}")


if __name__ == "__main__":
    main()
