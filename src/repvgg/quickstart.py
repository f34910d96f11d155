"""From images to a verified plain network, in one go, on the digits that scikit-learn brings."""

from pathlib import Path

import torch
from torch import Tensor, nn

from repvgg.checkpoint import load, save
from repvgg.console import say, show_table
from repvgg.costs import cost
from repvgg.data.images import Images, open_images
from repvgg.data.transforms import evaluation_transform, normalize
from repvgg.export.onnx import export_onnx, run_onnx
from repvgg.files import written_aside
from repvgg.model import RepVGG
from repvgg.reparam import convert
from repvgg.timing import Times, time_in_turn
from repvgg.training.loop import train
from repvgg.training.recipes import digits
from repvgg.verification import Agreement, compare_outputs, verify

TIMED_BATCH = 64


def quickstart(output: Path) -> None:
    """Train, convert, verify, time, export, draw; print one table of it all.

    Args:
        output: folder for all files; made if need be.

    Raises:
        InputError: the folder cannot be used, the conversion or the export is not equal to the
            trained network, or the packages for the export are missing.
    """
    say(f"training a small RepVGG on 1,437 images of digits; everything goes to {output}/")
    run = train(digits(), output / "run", restart=True)
    network = load(run.best)
    plain_path, onnx_path = output / "plain.safetensors", output / "plain.onnx"

    conversion = convert(network)
    save(conversion.model, plain_path)
    plain = load(plain_path)
    images = open_images("digits", "test")
    inputs, labels = _as_batch(images, network)
    equality = verify(network, plain, inputs, max_rel_error=1e-4)
    export_onnx(plain, onnx_path)
    exported = run_onnx(onnx_path, inputs)
    with torch.inference_mode():
        before, after = network(inputs), plain(inputs)
    onnx_equality = compare_outputs(after, exported)
    onnx_equality.require(1e-4)

    times = _times(network, plain, inputs[:TIMED_BATCH])
    figure_path = output / "quickstart.png"
    _draw(figure_path, run.read_history(), times, images, after.argmax(1))
    show_table(
        "repvgg quickstart",
        ("what", "training-time network", "plain network"),
        [
            ("test accuracy", _accuracy(before, labels), _accuracy(after, labels)),
            ("same class, image by image", "", _same(equality, len(labels))),
            ("largest relative error", "", f"{equality.max_rel_error:.1e}"),
            ("in ONNX: same class", "", _same(onnx_equality, len(labels))),
            ("in ONNX: largest relative error", "", f"{onnx_equality.max_rel_error:.1e}"),
            ("modules that compute", _leaves(network), _leaves(plain)),
            *_cost_rows(network, plain),
            (f"ms for {TIMED_BATCH} images, median", *_milliseconds(times)),
            ("file", run.best, plain_path),
        ],
    )
    speedup = times["training-time"].median / times["plain"].median
    say(f"The plain network gives the same answers {speedup:.1f} times as fast.")
    say(f"Also written: {onnx_path}, {figure_path}, {run.path / 'history.csv'}")
    say(f"Next: repvgg predict {plain_path} YOUR_IMAGE.png, or repvgg train --help")


def _as_batch(images: Images, network: RepVGG) -> tuple[Tensor, Tensor]:
    transform = evaluation_transform(network.preprocessing)
    pixels = torch.stack([transform(images.decode(index)) for index in range(len(images))])
    return normalize(pixels, network.preprocessing), torch.tensor(images.labels)


@torch.inference_mode()
def _times(network: nn.Module, plain: nn.Module, batch: Tensor) -> dict[str, Times]:
    things = {"training-time": lambda: network(batch), "plain": lambda: plain(batch)}
    return time_in_turn(things, rounds=50, warmup=10)


def _accuracy(logits: Tensor, labels: Tensor) -> str:
    right = int((logits.argmax(1) == labels).sum())
    return f"{100 * right / len(labels):.2f} % ({right} of {len(labels)})"


def _same(agreement: Agreement, images: int) -> str:
    return f"{round((agreement.top1_agreement or 0) * images)} of {images}"


def _leaves(network: nn.Module) -> int:
    leaves = [m for m in network.modules() if next(m.children(), None) is None]
    return sum(not isinstance(m, nn.Identity | nn.Dropout | nn.Flatten) for m in leaves)


def _cost_rows(network: RepVGG, plain: RepVGG) -> list[tuple[str, str, str]]:
    before, after = (cost(n, n.preprocessing.size) for n in (network, plain))
    return [
        ("parameters", f"{before.params:,}", f"{after.params:,}"),
        ("multiply-adds an image", f"{before.macs:,}", f"{after.macs:,}"),
    ]


def _milliseconds(times: dict[str, Times]) -> list[str]:
    return [f"{1e3 * t.median:.2f} ± {100 * t.spread:.0f} %" for t in times.values()]


def _draw(
    path: Path,
    history: list[dict[str, float]],
    times: dict[str, Times],
    images: Images,
    predictions: Tensor,
) -> None:
    """Accuracy over the epochs, time of the two networks, and what the plain one sees."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    accuracy, bars, seen = figure.subplots(1, 3, width_ratios=(3, 2, 3))
    for split in ("train", "test"):
        values = [100 * row[f"{split}_top1"] for row in history]
        accuracy.plot([row["epoch"] for row in history], values, label=split)
    accuracy.set(xlabel="epoch", ylabel="top-1 (%)", title="Training", ylim=(80, 100.5))
    accuracy.legend()
    accuracy.grid(alpha=0.3)
    medians = [1e3 * t.median for t in times.values()]
    bars.bar(list(times), medians, color=["tab:gray", "tab:green"])
    bars.set(ylabel=f"ms for {TIMED_BATCH} images", title="The same function, two structures")
    rows, columns = 4, 8
    mosaic = [[images.decode(r * columns + c) for c in range(columns)] for r in range(rows)]
    grid = torch.cat([torch.cat([_tile(image) for image in row], 1) for row in mosaic])
    seen.imshow(grid, cmap="gray_r")
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        right = int(predictions[index]) == images.labels[index]
        seen.text(
            *(column * 10, row * 10 + 9.5),
            str(int(predictions[index])),
            color="tab:green" if right else "tab:red",
            fontsize=8,
        )
    seen.set(title="What the plain network reads")
    seen.axis("off")
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120)


def _tile(image: object) -> Tensor:
    import numpy as np

    return torch.nn.functional.pad(torch.from_numpy(np.array(image)), (0, 2, 0, 2))
