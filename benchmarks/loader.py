"""How fast images are read, decoded and augmented, and what share of a training step that takes.

`python benchmarks/loader.py --data DIR [--quick] [--json FILE]`, where DIR is an image folder such
as the extracted imagenet_sample.tar. Everything is timed in turn, round after round:

- the loader alone, from the folder and from shards of it, for each number of workers;
- a training step on images at hand, and a step that takes its images from the shards;
- the stages of one sample, in one process.
"""

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from repvgg.console import say, show_table
from repvgg.data.images import Images, decode_image, open_images
from repvgg.data.loader import Batch, Loader, sample_seeds
from repvgg.data.pack import Pack
from repvgg.data.transforms import normalize, training_transform
from repvgg.machine import machine_facts
from repvgg.model import create_model
from repvgg.timing import Times, time_in_turn

BATCH, WORKERS = 32, (0, 1, 2)
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Images a second of the loader, and its share of a training step."""

    data: str = ".data/imagenet_sample"
    """Image folder; its val/ is read if it has one."""
    model: str = "repvgg_a0"
    """Network whose training step is timed, batch 32, fp32, SGD."""
    quick: bool = False
    """A tenth of the images and two rounds."""
    json: Path | None = None
    """File to write the rows to."""


def passes(loader: Loader, batches: int) -> Callable[[], None]:
    """A function that takes so many batches of a new pass."""
    epochs = iter(range(1, 1 << 30))

    def run() -> None:
        for number, _ in enumerate(loader.epoch(next(epochs)), start=1):
            if number == batches:
                break

    return run


class Trainer:
    """Training steps of a network, on one batch or on those of a loader."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.network = create_model(name).train().to(memory_format=torch.channels_last)
        self.transform: Any = training_transform(self.network.preprocessing, "crop-flip")
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, 0.9)

    def step(self, batch: Batch) -> None:
        """Forward, backward, update; images are made floats here, as in training."""
        logits = self.network(normalize(batch.images, self.network.preprocessing))
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, batch.labels).backward()
        self.optimizer.step()

    def on(self, batches: Iterator[Batch]) -> Callable[[], None]:
        """A function that takes the next batch and trains on it."""
        return lambda: self.step(next(batches))


def endless(items: Callable[[int], Iterator[Batch]]) -> Iterator[Batch]:
    """The batches of pass after pass."""
    for epoch in range(1, 1 << 30):
        yield from items(epoch)


def loader_rows(sources: dict[str, Images], trainer: Trainer, quick: bool) -> list[Row]:
    """The loader alone, beside the training step."""
    batches = 3 if quick else min(map(len, sources.values())) // BATCH
    rounds = 2 if quick else 7
    things: dict[str, Callable[[], None]] = {}
    for workers in WORKERS:
        for name, images in sources.items():
            loader = Loader(images, trainer.transform, BATCH, seed=0, workers=workers)
            things[f"{name}, {workers} workers"] = passes(loader, batches)
    images = Loader(sources["shards"], trainer.transform, BATCH, seed=0, workers=0)
    batch = next(images.epoch(1))
    things["step"] = lambda: trainer.step(batch)
    times = time_in_turn(things, rounds, warmup=1)
    step = times.pop("step")
    rows = [
        row(name, seconds, BATCH * batches)
        | {"share_of_step": seconds.median / batches / step.median}
        for name, seconds in times.items()
    ]
    return [*rows, row("training step alone", step, BATCH) | {"share_of_step": 1.0}]


def fed_rows(images: Images, trainer: Trainer, quick: bool) -> list[Row]:
    """Training steps on images at hand and on those of a loader, which shares the processors."""
    batch = next(Loader(images, trainer.transform, BATCH, seed=0, workers=0).epoch(1))
    things = {"step, images at hand": lambda: trainer.step(batch)}
    times = time_in_turn(things, 2 if quick else 10, warmup=1)
    for workers in WORKERS:
        loader = Loader(images, trainer.transform, BATCH, seed=0, workers=workers)
        name = f"step, shards, {workers} workers"
        # Not in turn with the others: idle loaders would fill their queues in the others' time.
        times |= time_in_turn(
            {name: trainer.on(endless(loader.epoch))}, 2 if quick else 10, warmup=2
        )
        del loader
    alone = times["step, images at hand"].median
    return [
        row(name, seconds, BATCH) | {"share_of_step": seconds.median / alone}
        for name, seconds in times.items()
    ]


def stage_rows(folder: Images, shards: Images, trainer: Trainer, quick: bool) -> list[Row]:
    """What the time of one sample is made of."""
    numbers = range(0, len(folder), 50 if quick else 5)
    files = [Path(folder.names[number]).read_bytes() for number in numbers]
    decoded = [decode_image("", 3, io.BytesIO(content)) for content in files]
    reader: Any = shards.decode
    crop, flip, to_tensor = trainer.transform.transform.transforms
    cropped = [crop(image) for image in decoded]

    def seed() -> None:
        with torch.random.fork_rng(devices=[]):
            for one in sample_seeds(0, 1, np.array(numbers)).tolist():
                torch.default_generator.manual_seed(one)

    stages: dict[str, Callable[[], object]] = {
        "read a file": lambda: [Path(folder.names[number]).read_bytes() for number in numbers],
        "read from a shard": lambda: [reader.__self__.read(number) for number in numbers],
        "decode": lambda: [decode_image("", 3, io.BytesIO(content)) for content in files],
        "seed": seed,
        "crop and resize": lambda: [crop(image) for image in decoded],
        "flip": lambda: [flip(image) for image in cropped],
        "to tensor": lambda: [to_tensor(image) for image in cropped],
    }
    times = time_in_turn(stages, 2 if quick else 11, warmup=1)
    return [row(name, seconds, len(numbers)) for name, seconds in times.items()]


def row(what: str, times: Times, images: int) -> Row:
    """Of things that took so many images each."""
    return {
        "what": what,
        "images_per_second": images / times.median,
        "median_ms": 1e3 * times.median / images,
        "min_ms": 1e3 * min(times.seconds) / images,
        "max_ms": 1e3 * max(times.seconds) / images,
        "spread": times.spread,
    }


def show(title: str, rows: list[Row]) -> None:
    """As a table; times are those of one image."""
    columns = ["", "images/s", "ms an image", "min", "max", "spread"]
    cells = [
        [r["what"], f"{r['images_per_second']:.0f}", *(f"{r[f'{key}_ms']:.3f}" for key in
         ("median", "min", "max")), f"{100 * r['spread']:.1f} %"]
        for r in rows
    ]  # fmt: skip
    if "share_of_step" in rows[0]:
        columns.append("of a step")
        for cell, r in zip(cells, rows, strict=True):
            cell.append(f"{100 * r['share_of_step']:.1f} %")
    show_table(title, columns, cells)


def main(options: Options) -> None:
    """Measure all three and show them."""
    folder, trainer = open_images(options.data, "test"), Trainer(options.model)
    with tempfile.TemporaryDirectory() as place:
        Pack(Path(options.data), Path(place), shard_megabytes=8).run()
        shards = open_images(place, "test")
        tables = {
            "loader": loader_rows({"folder": folder, "shards": shards}, trainer, options.quick),
            "fed": fed_rows(shards, trainer, options.quick),
            "stages": stage_rows(folder, shards, trainer, options.quick),
        }
    show("the loader alone, 224×224, crop-flip", tables["loader"])
    show(f"training steps of {options.model}, batch {BATCH}", tables["fed"])
    show("stages of one sample, in one process", tables["stages"])
    if options.json:
        rows = [{"table": table, **row} for table, rows in tables.items() for row in rows]
        content = {**machine_facts(), "load_average": os.getloadavg()[0], "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        say(f"written: {options.json}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
