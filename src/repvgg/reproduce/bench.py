"""A network of one's own on every runtime: training-time against plain, latency and throughput."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.blocks import is_plain
from repvgg.console import progress_bar, warn
from repvgg.model import RepVGG
from repvgg.protocol import Protocol, Runtime
from repvgg.reparam import reparameterize
from repvgg.reproduce.report import Report
from repvgg.runtimes import (
    Runner,
    UnsupportedError,
    as_onnx,
    installed_runtimes,
    needs_onnx,
    prepare,
)
from repvgg.segmentation.pspnet import PSPNet
from repvgg.timing import Times, time_in_turn
from repvgg.verification import compare_outputs

COLUMNS = ("network", "runtime", "batch", "ms", "±", "images/s", "relative error")


def bench(
    network: RepVGG | PSPNet, protocol: Protocol, batches: Sequence[int], *, compiled: bool = False
) -> Report:
    """Time the network as it is and folded, on all installed runtimes, in turn at each batch.

    Args:
        network: training-time or plain.
        protocol: rounds, threads and device; its batch and runtime are not used.
        batches: images at a time.
        compiled: also by `torch.compile`.

    Raises:
        InputError: a device that is not there.
    """
    network = network.float().eval()
    plain = reparameterize(network)
    forms: dict[tuple[str, Runtime], nn.Module] = {}
    if not is_plain(network.block):
        forms["training-time", "torch"] = network
    for runtime in installed_runtimes():
        if runtime != "compile" or compiled:
            forms["plain", runtime] = plain
    rows = []
    with contextlib.ExitStack() as stack:
        onnx = None
        if any(needs_onnx(runtime) for _, runtime in forms):
            onnx = stack.enter_context(as_onnx(plain, _images(network, 1)))
        for batch in sorted(set(batches)):
            images = _images(network, batch)
            with torch.inference_mode():
                expected = plain.cpu()(images)
            used = dataclasses.replace(protocol, batch=batch)
            runners, errors = _runners(forms, images, used, expected, onnx)
            times = time_in_turn(runners, protocol.rounds, protocol.warmup)
            rows += [_row(key, batch, times[" ".join(key)], error) for key, error in errors.items()]
    title = f"{type(network).__name__} at {network.preprocessing.size} pixels, fp32"
    return Report(title, COLUMNS, tuple(rows), _findings(rows))


def _images(network: RepVGG | PSPNet, batch: int) -> Tensor:
    size = network.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, network.in_chans, size, size, generator=generator)


def _runners(
    forms: dict[tuple[str, Runtime], nn.Module],
    images: Tensor,
    protocol: Protocol,
    expected: Tensor,
    onnx: Path | None,
) -> tuple[dict[str, Runner], dict[tuple[str, Runtime], float]]:
    """All forms that can be run, and how far each one's logits are from the plain network's."""
    runners, errors = {}, {}
    with progress_bar(f"preparing, batch {len(images)}", len(forms)) as show:
        for (form, runtime), module in forms.items():
            used = dataclasses.replace(protocol, runtime=runtime)
            try:
                runner = prepare(module, images, used, onnx)
            except UnsupportedError as error:
                warn(f"left out: {error}")
                continue
            runners[f"{form} {runtime}"] = runner
            agreement = compare_outputs(expected, runner().float().cpu())
            errors[form, runtime] = agreement.max_rel_error
            show(runtime)
    return runners, errors


def _row(key: tuple[str, Runtime], batch: int, times: Times, error: float) -> tuple[Any, ...]:
    return (
        *key,
        batch,
        round(1000 * times.median, 3),
        f"{100 * times.spread:.1f} %",
        round(batch / times.median, 1),
        float(f"{error:.2g}"),
    )


def _findings(rows: list[tuple[Any, ...]]) -> tuple[str, ...]:
    """Which runtime to take."""
    plain = [row for row in rows if row[0] == "plain"]
    least = min(row[2] for row in plain)
    fastest = min((row for row in plain if row[2] == least), key=lambda row: row[3])
    most = max(plain, key=lambda row: row[5])
    notes = [
        f"Lowest latency at batch {least}: {fastest[1]}, {fastest[3]} ms. Most images a second: "
        f"{most[1]} at batch {most[2]}, {most[5]}."
    ]
    for row in rows:
        if row[0] == "training-time":
            same = next(p for p in plain if p[1:3] == row[1:3])
            notes.append(
                f"At batch {row[2]} the plain network is {row[3] / same[3]:.2f} times as fast as "
                "the training-time one."
            )
    return tuple(notes)


def draw(path: Path, report: Report) -> None:
    """Images a second of each form and runtime at each batch, as PNG and SVG."""
    from repvgg.reproduce.figures import write_figure

    kinds = list(dict.fromkeys(row[:2] for row in report.rows))
    batches = list(dict.fromkeys(row[2] for row in report.rows))

    def draw_bars(figure: Any) -> None:
        ax = figure.subplots()
        width = 0.8 / len(kinds)
        for index, kind in enumerate(kinds):
            heights = [row[5] for row in report.rows if row[:2] == kind]
            places = [
                place + width * (index - (len(kinds) - 1) / 2) for place in range(len(batches))
            ]
            ax.bar(places, heights, 0.95 * width, label=f"{kind[0]}, {kind[1]}")
        ax.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        ax.set_ylabel("images a second")
        ax.set_title(report.title, fontsize=10)
        ax.legend(fontsize=8)

    write_figure(path, draw_bars, (8, 4.5))
