"""Trains every row of Tables 6 and 7 under the same settings and seeds, and compares them."""

import csv
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student_t

from repvgg.ablations.jobs import Job, side_by_side
from repvgg.checkpoint import load
from repvgg.console import say
from repvgg.errors import InputError
from repvgg.files import reading, written_aside
from repvgg.model import RepVGG
from repvgg.reparam import reparameterize
from repvgg.reproduce.figures import write_figure
from repvgg.reproduce.printed import TABLE6, TABLE7, PrintedAblation
from repvgg.reproduce.report import Report
from repvgg.timing import Times, time_in_turn
from repvgg.training.config import TrainConfig
from repvgg.training.loop import train
from repvgg.training.run_folder import RunFolder, require_same_config, write_config
from repvgg.training.setup import choose_device
from repvgg.verification import compare_outputs

# Of the block in both tables, Table 6 prints the speed too.
PRINTED = {row.block: row for row in (*TABLE7, *TABLE6)}
# Rows that are not the paper's.
LATER = {
    "diverse_branch": "Diverse Branch Block",
    "mobileone": "MobileOne, 4 × 3×3",
    "quantization_aware": "QARepVGG",
    "squeeze_excite": "RepVGG-D2se",
    "post_squeeze_excite": "RepVGGplus",
}
ROWS = (*PRINTED, *LATER)
RESULTS = "results.csv"
SPEED_BATCH = 32


@dataclass(frozen=True)
class Outcome:
    """A network that was trained.

    Attributes:
        block: its name in blocks.py.
        seed: of its weights and of the order and augmentation of the images.
        top1: share of the test images after the last epoch.
        train_top1: share of the training images, augmented, in the last epoch.
        conversion_error: relative, of the folded network in fp32; None if it cannot be folded.
    """

    block: str
    seed: int
    top1: float
    train_top1: float
    conversion_error: float | None


def ablate(
    config: TrainConfig, output: Path, rows: Sequence[str], seeds: Sequence[int], jobs: int = 1
) -> list[Outcome]:
    """Train every row with every seed, or go on where this was stopped.

    Returns all that the folder has.

    Args:
        config: the settings that all share; its block and seed are not used.
        output: a folder, which gets a run for each row and seed, and the results; those that are
            there, of other rows and seeds too, stay.
        rows: names in `ROWS`.
        seeds: of the runs; all rows with the first one come first.
        jobs: runs side by side, which share the cores.

    Raises:
        InputError: an unknown row, a folder with results of another config, or what `train` raises.
        Interrupted: SIGINT or SIGTERM came; all states are kept.
    """
    if unknown := sorted(set(rows) - set(ROWS)):
        raise InputError(f"rows: {', '.join(unknown)} unknown; {', '.join(ROWS)} exist")
    results = output / RESULTS
    # A call that failed before the first run began, say for wrong data, leaves a config alone.
    if results.exists() or any(output.glob("*-seed*/config.json")):
        require_same_config(output, config)
    write_config(output, config)
    outcomes = read_outcomes(results) if results.exists() else []
    done = {(o.block, o.seed) for o in outcomes}
    todo = [
        Job(
            f"{block}, seed {seed}",
            dataclasses.replace(config, block=block, seed=seed),
            run_path(output, block, seed),
        )
        for seed in seeds
        for block in rows
        if (block, seed) not in done
    ]
    say(f"{len(todo)} runs to do, {len(outcomes)} done before")
    start, all_epochs = time.monotonic(), _epochs_left(todo)
    for number, job in enumerate(_trained(todo, jobs), start=1):
        outcomes.append(outcome_of(job.config, job.path))
        write_outcomes(results, outcomes)
        epochs = _epochs_left(todo)
        left = (time.monotonic() - start) / max(1, all_epochs - epochs) * epochs
        say(
            f"{job.name}: top-1 {outcomes[-1].top1:.2%}; {number} of {len(todo)} runs done, about "
            f"{timedelta(seconds=round(left))} left"
        )
    return outcomes


def _trained(todo: Sequence[Job], jobs: int) -> Iterator[Job]:
    """Each when it is done."""
    if jobs > 1:
        yield from side_by_side(todo, jobs)
        return
    for job in todo:
        say(job.name)
        train(job.config, job.path)
        yield job


def _epochs_left(jobs: Sequence[Job]) -> int:
    """Also of those that run side by side, or were begun by an earlier call."""
    runs = [(job.config.epochs, RunFolder(job.path, job.config, writes=False)) for job in jobs]
    return sum(epochs - len(run.read_history()) for epochs, run in runs)


def outcome_of(config: TrainConfig, path: Path) -> Outcome:
    """Of a run that is done."""
    run = RunFolder(path, config, writes=False)
    last = run.read_history()[-1]
    return Outcome(
        config.block,
        config.seed,
        last["test_top1"],
        last["train_top1"],
        conversion_error(load(run.last)),
    )


def run_path(output: Path, block: str, seed: int) -> Path:
    """The folder of a run."""
    return output / f"{block}-seed{seed}"


def conversion_error(network: RepVGG) -> float | None:
    """Relative error of the folded network's logits, in fp32; None if it cannot be folded."""
    try:
        plain = reparameterize(network)
    except InputError:
        return None
    with torch.inference_mode():
        images = _images(network, 16)
        return compare_outputs(network(images), plain(images)).max_rel_error


def _images(network: RepVGG, count: int) -> torch.Tensor:
    size = network.preprocessing.size
    shape = count, network.in_chans, size, size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """As CSV, a row for each run."""
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Outcome)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(outcome) for outcome in outcomes)


def read_outcomes(path: Path) -> list[Outcome]:
    """What `write_outcomes` wrote.

    Raises:
        InputError: no such file, or something else in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: results of `repvgg ablate` are needed, found nothing")
    with (
        reading(path, "results of `repvgg ablate` are needed"),
        open(path, newline="", encoding="utf-8") as file,
    ):
        outcomes = [
            Outcome(
                row["block"],
                int(row["seed"]),
                float(row["top1"]),
                float(row["train_top1"]),
                float(row["conversion_error"]) if row["conversion_error"] else None,
            )
            for row in csv.DictReader(file)
        ]
    if unknown := sorted({outcome.block for outcome in outcomes} - set(ROWS)):
        raise InputError(f"{path}: rows {', '.join(unknown)} unknown; {', '.join(ROWS)} exist")
    return outcomes


def speeds(output: Path, outcomes: Sequence[Outcome]) -> dict[str, tuple[Times, Times | None]]:
    """Inference of each row before and after conversion, in turn, in batches of 32.

    Only of those whose network is still there, beside the results; on a GPU where there is one.
    """
    device = choose_device("auto")
    runners = {}
    files = {o: run_path(output, o.block, o.seed) / "last.safetensors" for o in outcomes}
    of_blocks = {outcome.block: outcome for outcome in outcomes if files[outcome].exists()}
    for block, outcome in of_blocks.items():
        network = load(files[outcome]).to(device)
        images = _images(network, SPEED_BATCH).to(device)
        runners[f"{block} trained"] = partial(network, images)
        if outcome.conversion_error is not None:
            runners[f"{block} plain"] = partial(reparameterize(network), images)
    with torch.inference_mode():
        times = time_in_turn(runners)
    return {block: (times[f"{block} trained"], times.get(f"{block} plain")) for block in of_blocks}


def report(
    outcomes: Sequence[Outcome],
    title: str,
    times: dict[str, tuple[Times, Times | None]] | None = None,
    table: Sequence[PrintedAblation] = tuple(PRINTED.values()),
) -> Report:
    """A row for each block: the paper's accuracy and ours, with the spread over the seeds."""
    rows: list[tuple[Any, ...]] = []
    names = {row.block: row for row in table}
    for block, tops in tops_by_block(outcomes).items():
        printed = names.get(block)
        errors = [o.conversion_error for o in outcomes if o.block == block]
        trained, plain = (times or {}).get(block, (None, None))
        error = (
            f"{max(filter(None, errors), default=0):.1e}" if None not in errors else "not folded"
        )
        rows.append(
            (
                block,
                printed.name if printed else LATER[block],
                printed.top1 if printed else None,
                round(100 * statistics.mean(tops), 2),
                round(100 * statistics.stdev(tops), 2) if len(tops) > 1 else None,
                len(tops),
                printed.speed if printed else None,
                *_speed(trained),
                *_speed(plain),
                error,
            )
        )
    columns = (
        "block", "row", "paper: top-1 (%)", "top-1 (%)", "sd", "seeds", "paper: images/s before",
        "images/s before", "± before (%)", "images/s after", "± after (%)", "conversion error",
    )  # fmt: skip
    return Report(title, columns, tuple(rows))


def _speed(times: Times | None) -> tuple[float | None, float | None]:
    """Images a second, and their spread in percent."""
    if times is None:
        return None, None
    return round(SPEED_BATCH / times.median, 1), round(100 * times.spread, 1)


def tops_by_block(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Accuracies of the seeds of each block, in the order of `ROWS`."""
    return {
        block: tops for block in ROWS if (tops := [o.top1 for o in outcomes if o.block == block])
    }


def orders(
    outcomes: Sequence[Outcome], table: Sequence[PrintedAblation], title: str = "Orders"
) -> Report:
    """For each pair of rows that the paper orders: does the order hold, and how surely.

    The deviation of a run is estimated from all rows together, since the few seeds of one say
    little: three can lie close to each other by chance. "open" is what Student's t-test with these
    degrees of freedom does not tell from no difference, at 95 %.
    """
    tops = {block: [100 * top for top in of] for block, of in tops_by_block(outcomes).items()}
    freedom = sum(len(of) - 1 for of in tops.values())
    columns = "order in the paper", "paper: difference", "difference", "standard error", "here"
    by_top1 = sorted((row for row in table if row.block in tops), key=lambda row: -row.top1)
    if not freedom or len(by_top1) < 2:
        note = f"{title}: two rows that the paper orders, and two seeds of a row, are needed."
        return Report(title, columns, (), (note,))
    squares = sum(statistics.pvariance(of) * len(of) for of in tops.values())
    deviation = math.sqrt(squares / freedom)
    limit = float(student_t.ppf(0.975, freedom))
    rows = []
    for better, worse in itertools.combinations(by_top1, 2):
        ours, others = tops[better.block], tops[worse.block]
        difference = statistics.mean(ours) - statistics.mean(others)
        error = deviation * math.sqrt(1 / len(ours) + 1 / len(others))
        sure = abs(difference) > limit * error
        rows.append(
            (
                f"{better.name} > {worse.name}",
                round(better.top1 - worse.top1, 2),
                round(difference, 2) + 0.0,  # no −0
                round(error, 2),
                ("holds" if difference > 0 else "reversed") if sure else "open",
            )
        )
    notes = (
        f"Differences in percentage points. A run deviates by {deviation:.2f} ({freedom} degrees "
        f"of freedom); open: within {limit:.2f} standard errors of none.",
    )
    return Report(title, columns, tuple(rows), notes)


def draw(path: Path, outcomes: Sequence[Outcome], title: str) -> None:
    """Mean accuracy of each row with the seeds as points, as PNG and SVG."""
    tops = tops_by_block(outcomes)

    def bars(figure: Any) -> None:
        ax = figure.subplots()
        means = [100 * statistics.mean(values) for values in tops.values()]
        ax.barh(range(len(tops)), means, color="lightsteelblue")
        for place, values in enumerate(tops.values()):
            ax.plot([100 * value for value in values], [place] * len(values), "k.", markersize=4)
        names = [PRINTED[b].name if b in PRINTED else LATER[b] for b in tops]
        ax.set_yticks(range(len(tops)), names)
        ax.invert_yaxis()
        ax.set_xlim(max(0, min(means) - 5), 100 * max(map(max, tops.values())) + 0.5)
        ax.set_xlabel("test accuracy (%), a point for each seed")
        ax.set_title(title, fontsize=10)

    write_figure(path, bars, (8, 5))
