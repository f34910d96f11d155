"""Tables 4 and 5: accuracy as printed, cost computed, speed measured; the speed-ups of Sect. 4.1.

The accuracy is the paper's, since it takes training on ImageNet (`repvgg train`).
"""

from functools import lru_cache, partial

from torch import nn

from repvgg.baselines import create_named, image_size_of
from repvgg.costs import Cost, built_without_memory, cost
from repvgg.reparam import reparameterize
from repvgg.reproduce.printed import PAIRS, Printed
from repvgg.reproduce.report import Cell, Report
from repvgg.speed import Contender, Speed

WINOGRAD_NOTE = (
    "Winograd multiplies are counted here by the definition of Sect. 2.4, 4/9 for every 3×3 layer "
    "of stride 1. The paper found out layer by layer which ones cuDNN 7.5 ran so (footnote 3); of "
    "the grouped ones of RegNetX and ResNeXt it seems to have been a part."
)


def contenders(names: list[str]) -> list[Contender]:
    """The networks as they are run: every conv-BN pair and every block folded."""
    return [Contender(name, partial(folded, name), image_size_of(name)) for name in names]


def folded(name: str) -> nn.Module:
    """A network of the paper, random weights, folded."""
    return reparameterize(create_named(name))


@lru_cache(maxsize=64)
def cost_of(name: str) -> Cost:
    """Of a folded network of the paper, at the paper's size; no memory is taken."""
    network = built_without_memory(partial(create_named, name))
    return cost(reparameterize(network), image_size_of(name))


def report(printed: tuple[Printed, ...], speeds: list[Speed], title: str) -> Report:
    """The paper's columns beside ours, in the paper's order; rows without a speed have none."""
    by_name = {speed.name: speed for speed in speeds}
    rows: list[tuple[Cell, ...]] = []
    different = []
    for row in printed:
        found, speed = cost_of(row.name), by_name.get(row.name)
        ours = found.params / 1e6, found.macs / 1e9, found.winograd_multiplies / 1e9
        rows.append(
            (
                row.name,
                row.top1,
                row.speed,
                speed and round(speed.images_per_second, 2),
                speed and f"{100 * speed.times.spread:.1f} %",
                row.params,
                round(ours[0], 2),
                row.macs,
                round(ours[1], 2),
                row.winograd_multiplies,
                round(ours[2], 2),
            )
        )
        different += differences(row, found)
    columns = (
        "network", "paper: top-1 (%)", "paper: images/s", "images/s", "±", "paper: params (M)",
        "params (M)", "paper: FLOPs (B)", "FLOPs (B)", "paper: Wino MULs (B)", "Wino MULs (B)",
    )  # fmt: skip
    notes = (
        "Columns of the paper are as printed (its speeds: 1080Ti, fp32, batch 128); the others are "
        "computed and measured here.",
        *(f"Differs from the paper: {text}." for text in different),
        *([WINOGRAD_NOTE] if any("Winograd" in text for text in different) else []),
    )
    return Report(title, columns, tuple(rows), notes)


def differences(row: Printed, found: Cost) -> list[str]:
    """Where what is computed is not what is printed, to the printed digit.

    The paper cuts parameters off after two decimals and rounds the others to one.
    """
    texts = []
    params = int(found.params / 1e4) / 100
    if params != row.params:
        texts.append(f"{row.name} has {params:.2f} M parameters, {row.params:.2f} printed")
    pairs = (
        ("multiply-adds", row.macs, found.macs),
        ("Winograd multiplies", row.winograd_multiplies, found.winograd_multiplies),
    )
    for what, expected, value in pairs:
        if expected is not None and round(value / 1e9, 1) != expected:
            texts.append(f"{row.name} has {value / 1e9:.2f} B {what}, {expected} printed")
    return texts


def speedups(printed: tuple[Printed, ...], speeds: list[Speed], title: str) -> Report:
    """Each RepVGG against the ResNet that the text sets it against."""
    on_paper = {row.name: row.speed for row in printed}
    by_name = {speed.name: speed for speed in speeds}
    rows = []
    for (ours, theirs), stated in PAIRS.items():
        if ours in by_name and theirs in by_name:
            times = by_name[theirs].times.median / by_name[ours].times.median
            spread = by_name[theirs].times.spread + by_name[ours].times.spread
            rows.append(
                (
                    f"{ours} / {theirs}",
                    stated,
                    round(on_paper[ours] / on_paper[theirs], 3),
                    round(times, 3),
                    f"{100 * spread:.1f} %",
                )
            )
    columns = "pair", "paper: as stated", "paper: of its speeds", "speed-up", "±"
    return Report(f"Speed-up of RepVGG over the paired ResNet ({title})", columns, tuple(rows))


def comparison(speeds: list[Speed], title: str) -> Report:
    """Networks of any name, the fastest first."""
    rows = []
    for speed in sorted(speeds, key=lambda speed: speed.times.median):
        found = cost_of(speed.name)
        rows.append(
            (
                speed.name,
                speed.image_size,
                round(speed.images_per_second, 2),
                round(1000 * speed.times.median, 2),
                f"{100 * speed.times.spread:.1f} %",
                round(found.params / 1e6, 2),
                round(found.macs / 1e9, 2),
                round(found.winograd_multiplies / 1e9, 2),
            )
        )
    columns = (
        "network", "pixels", "images/s", "ms", "±", "params (M)", "FLOPs (B)", "Wino MULs (B)",
    )  # fmt: skip
    return Report(title, columns, tuple(rows))
