"""Table 8: PSPNets, mIoU and pixel accuracy as printed, cost computed, speed measured (Sect. 4.3).

The accuracy is the paper's, since it takes training on Cityscapes (`repvgg segment train`).
"""

from functools import lru_cache, partial

import torch
from torch import nn

from repvgg.costs import Cost, cost
from repvgg.model import create_model
from repvgg.reparam import reparameterize
from repvgg.reproduce.printed import TABLE8
from repvgg.reproduce.report import Cell, Report
from repvgg.speed import Contender, Speed

BATCH = 16
# Height and width in pixels: the paper's, and one for small machines.
PAPER_SIZE, SMALL_SIZE = 713, 257


def contenders(size: int) -> list[Contender]:
    """The six networks as they are run: every conv-BN pair and every block folded."""
    return [Contender(row.backbone, partial(folded, row.model), size) for row in TABLE8]


def folded(model: str) -> nn.Module:
    """A PSPNet with random weights, folded."""
    return reparameterize(create_model(model).eval())


@lru_cache(maxsize=16)
def cost_of(model: str, size: int) -> Cost:
    """Of a folded PSPNet without its auxiliary head; no memory is taken."""
    with torch.device("meta"):
        network = create_model(model)
    return cost(reparameterize(network), size)


def report(speeds: list[Speed], title: str) -> Report:
    """The paper's columns beside ours, in the paper's order; rows without a speed have none."""
    by_name = {speed.name: speed for speed in speeds}
    size = speeds[0].image_size if speeds else PAPER_SIZE
    rows: list[tuple[Cell, ...]] = []
    for row in TABLE8:
        found, speed = cost_of(row.model, size), by_name.get(row.backbone)
        rows.append(
            (
                row.backbone,
                row.miou,
                row.pixel_accuracy,
                row.speed,
                speed and round(speed.images_per_second, 3),
                speed and f"{100 * speed.times.spread:.1f} %",
                round(found.params / 1e6, 2),
                round(found.macs / 1e9, 2),
            )
        )
    columns = (
        "backbone", "paper: mIoU (%)", "paper: pixel acc (%)", "paper: images/s", "images/s", "±",
        "params (M)", "FLOPs (B)",
    )  # fmt: skip
    notes = (
        f"Measured here: PSPNets of 19 classes at {size}×{size} pixels. Columns of the paper are "
        "as printed (its speeds: 1080Ti, fp32, batch 16, 713×713 pixels).",
    )
    return Report(title, columns, tuple(rows), notes)
