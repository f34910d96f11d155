"""Table 6's speeds: RepVGG-B0 as it trains, before conversion, without one branch or two."""

from functools import partial

from torch import nn

from repvgg.model import create_model
from repvgg.reproduce.printed import TABLE6
from repvgg.reproduce.report import Report
from repvgg.speed import Contender, Speed


def contenders() -> list[Contender]:
    """The four networks, none of them folded: batch norms, branches and additions are run."""
    return [Contender(row.block, partial(trained, row.block)) for row in TABLE6]


def trained(block: str) -> nn.Module:
    """RepVGG-B0 of these blocks, with random weights."""
    return create_model("repvgg_b0", block=block).eval()


def report(speeds: list[Speed], title: str) -> Report:
    """The paper's speeds beside ours, and what each branch costs."""
    by_name = {speed.name: speed for speed in speeds}
    plain = TABLE6[0]
    rows = []
    for row in TABLE6:
        speed = by_name.get(row.block)
        if speed is None or row.speed is None or plain.speed is None:
            continue
        share = speed.images_per_second / by_name[plain.block].images_per_second
        rows.append(
            (
                row.block,
                row.name,
                row.speed,
                round(speed.images_per_second, 1),
                f"{100 * speed.times.spread:.1f} %",
                round(row.speed / plain.speed, 3),
                round(share, 3),
            )
        )
    columns = (
        "block", "branches beside the 3×3", "paper: images/s", "images/s", "±",
        "paper: ÷ neither", "÷ neither",
    )  # fmt: skip
    notes = ("RepVGG-B0 at 224×224 before conversion, in eval mode; the paper: batch 128, 1080Ti.",)
    return Report(title, columns, tuple(rows), notes)
