"""Figures 1 and 3, as pictures: accuracy against speed, and the memory of activations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.baselines import create_named, image_size_of
from repvgg.files import written_aside
from repvgg.memory import activation_memory, measured_memory
from repvgg.reparam import reparameterize
from repvgg.reproduce.printed import TABLE4, TABLE5, Printed
from repvgg.reproduce.report import Report
from repvgg.speed import Speed

# Of Figure 1, left and right.
PANELS = {
    "120 epochs, simple augmentation": TABLE4,
    "200 epochs, AutoAugment, mixup": TABLE5,
}
WHOLE_NETWORKS = ("RepVGG-A0", "ResNet-18", "RepVGG-A2", "ResNet-50", "RepVGG-B1g4", "ResNet-101")
MEGA = 1e6


def draw_figure1(path: Path, speeds: list[Speed], title: str) -> None:
    """Top-1 as printed against the measured speed, both panels, as PNG and SVG.

    Args:
        path: of the PNG; the SVG stands beside it.
        speeds: of the networks; those that were not measured are not drawn.
        title: where it was measured.
    """
    by_name = {speed.name: speed.images_per_second for speed in speeds}

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2)
        for ax, (panel, printed) in zip(axes, PANELS.items(), strict=True):
            rows = [row for row in printed if row.name in by_name]
            _scatter(ax, rows, by_name)
            ax.set_title(panel, fontsize=10)
            ax.set_xlabel("images a second, measured")
        axes[0].set_ylabel("ImageNet top-1 (%), as the paper prints it")
        figure.suptitle(f"Fig. 1: accuracy against speed ({title})", fontsize=11)
        figure.canvas.draw()  # so that the axes are where they will be
        for ax, printed in zip(axes, PANELS.values(), strict=True):
            rows = [row for row in printed if row.name in by_name]
            _label(ax, {row.name: (by_name[row.name], row.top1) for row in rows})

    write_figure(path, draw, (13, 6))


def _scatter(ax: Any, rows: list[Printed], speed: dict[str, float]) -> None:
    """A point for each network, those of RepVGG joined by a line."""
    ours = [row for row in rows if row.name.startswith("RepVGG")]
    families = {"RepVGG": ours, "others": [row for row in rows if row not in ours]}
    for (name, members), style in zip(families.items(), ("o-", "s"), strict=True):
        members = sorted(members, key=lambda row: speed[row.name])
        ax.plot([speed[r.name] for r in members], [r.top1 for r in members], style, label=name)
    ax.set_xscale("log")
    ax.margins(x=0.2, y=0.1)
    ax.grid(alpha=0.3, which="both")
    ax.legend(loc="lower left")


def _label(ax: Any, points: dict[str, tuple[float, float]]) -> None:
    """Write the names beside their points, each where it covers no point and no other name."""
    from matplotlib.transforms import Bbox

    renderer = ax.figure.canvas.get_renderer()
    places = ax.transData.transform(list(points.values()))
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    for name, point in points.items():
        text = ax.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8, va="center")
        for x, y, align in LABEL_PLACES:
            text.set(position=(x, y), ha=align)
            box = text.get_window_extent(renderer)
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(text.get_window_extent(renderer))


# Offsets in points, the nearest first.
LABEL_PLACES = [
    (sign * distance, height, align)
    for distance, heights in ((8, (0, 8, -8, 14, -14)), (14, (20, -20, 26, -26, 32, -32, 38, -38)))
    for height in heights
    for sign, align in ((1, "left"), (-1, "right"))
]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, batch norms folded, as in Fig. 3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → the same."""
        out = self.conv2(self.conv1(x).relu_())
        return (out + x).relu_()


def blocks(channels: int) -> dict[str, nn.Module]:
    """A residual block and a plain stack of as many layers, behind what makes their input."""
    maker = nn.Conv2d(1, channels, 1)
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
    return {
        "residual block": nn.Sequential(maker, ResidualBlock(channels)).eval(),
        "two plain layers": nn.Sequential(maker, *layers).eval(),
    }


def figure3(batch: int, device: torch.device) -> Report:
    """Activation memory of the two blocks of Fig. 3, and of whole networks.

    For the blocks in units of their input, which is what the figure draws: 2 and 1 between
    operations.
    """
    rows: list[tuple[Any, ...]] = []
    channels, side = 64, 56
    unit = 4 * batch * channels * side**2
    for name, block in blocks(channels).items():
        shape = (batch, 1, side, side)
        rows.append((name, *(value / unit for value in _memories(block, shape, device)), "inputs"))
    for name in WHOLE_NETWORKS:
        size = image_size_of(name)
        network = reparameterize(create_named(name))
        memories = _memories(network, (batch, 3, size, size), device)
        rows.append((name, *(value / MEGA for value in memories), "MB"))
    columns = "network", "between operations", "during operations", "measured", "unit"
    notes = (
        f"Batch {batch}, fp32, without images and weights. Figure 3 draws 2 inputs for a residual "
        "block and 1 for a plain network: what is kept between operations. While an operation "
        "runs, its output exists too. Eager PyTorch lets go of a tensor when its name is bound "
        "again, so what is measured can be more than what is computed.",
    )
    rows = [(row[0], *(round(value, 3) for value in row[1:4]), row[4]) for row in rows]
    return Report("Fig. 3: peak memory of activations", columns, tuple(rows), notes)


def _memories(network: nn.Module, shape: tuple[int, ...], device: torch.device) -> list[float]:
    computed = activation_memory(network, shape)
    measured = measured_memory(network.to(device), torch.zeros(shape, device=device))
    return [computed.between, computed.during, measured]


def draw_figure3(path: Path, report: Report) -> None:
    """Bars of a report of `figure3`, as PNG and SVG."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, width_ratios=(1, 2))
        for ax, unit in zip(axes, ("inputs", "MB"), strict=True):
            rows = [row for row in report.rows if row[-1] == unit]
            for index, column in enumerate(report.columns[1:4]):
                places = [place + 0.27 * (index - 1) for place in range(len(rows))]
                ax.bar(places, [row[1 + index] for row in rows], 0.26, label=column)
            ax.set_xticks(range(len(rows)), [str(row[0]) for row in rows], fontsize=8)
            ax.set_ylabel("in units of the block's input" if unit == "inputs" else "MB")
        axes[0].legend(fontsize=8)
        figure.suptitle(report.title, fontsize=11)

    write_figure(path, draw, (12, 4.5))


def draw_bars(path: Path, report: Report, columns: tuple[str, str]) -> None:
    """Two columns of a report side by side, a bar for each row, as PNG and SVG."""
    names = [str(row[0]) for row in report.rows]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for ax, column in zip(axes, columns, strict=True):
            index = report.columns.index(column)
            ours = ["RepVGG" in name for name in names]
            colors = ["tab:blue" if own else "tab:gray" for own in ours]
            ax.barh(names, [row[index] or 0 for row in report.rows], color=colors)
            ax.set_xlabel(column)
        axes[0].invert_yaxis()
        figure.suptitle(report.title, fontsize=10)

    write_figure(path, draw, (11, 1.5 + 0.25 * len(names)))


def write_figure(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Draw on an empty figure of this size in inches, and write it as PNG and SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        for target in (path, path.with_suffix(".svg")):
            with written_aside(target) as aside:
                figure.savefig(aside, dpi=150)
