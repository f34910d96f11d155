"""The folder of a run: its config, history, whole states to go on from, and models.

`config.json`, `history.csv`, `history.png`, `last.safetensors`, `best.safetensors`, in
`checkpoints/` the latest whole states, and in `tensorboard/` the history once more, for it to
show. Each file but those of TensorBoard is whole at every moment.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from repvgg.console import warn
from repvgg.errors import InputError
from repvgg.files import reading, written_aside
from repvgg.training.config import RunConfig, changed_fields

NAMES = ("config.json", "history.csv", "history.png", "last.safetensors", "best.safetensors")


def write_config(folder: Path, config: RunConfig) -> None:
    """Say in a folder what was run there."""
    with written_aside(folder / "config.json") as aside:
        aside.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def require_same_config(folder: Path, config: RunConfig) -> None:
    """Raise if what was run in a folder had another config.

    Raises:
        InputError: naming the fields that differ; or the folder's config cannot be read.
    """
    path = folder / "config.json"
    with reading(path, "the settings of a run are needed"):
        changed = changed_fields(config, json.loads(path.read_text()))
    if changed:
        text = ", ".join(f"{name} {old!r} → {new!r}" for name, (old, new) in changed.items())
        raise InputError(
            f"{folder}: holds a run of another config ({text}); "
            "give another --output, the same config, or --restart"
        )


class RunFolder:
    """Opens the folder of a run, new or begun.

    Args:
        path: the folder; it is made if need be.
        config: of the run.
        restart: throw away what an earlier run left there.
        writes: whether this is the process that writes; the others read only.

    Raises:
        InputError: the folder holds a run of another config, or other files and no run.
    """

    def __init__(
        self, path: Path, config: RunConfig, *, restart: bool = False, writes: bool = True
    ):
        self.path, self._kept, self._writes = path, config.kept_checkpoints, writes
        self.last, self.best = path / "last.safetensors", path / "best.safetensors"
        self._states, self._logs = path / "checkpoints", path / "tensorboard"
        self._log: Any = None
        if not writes:
            return
        if restart:
            self._remove_run()
        if (path / "config.json").exists():
            require_same_config(path, config)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path}: an empty folder or one of a run is needed, found neither")
        for left_over in self._states.glob(".*.tmp.pt"):  # by a run that was killed in writing
            left_over.unlink()
        write_config(path, config)

    def _remove_run(self) -> None:
        if not (self.path / "config.json").exists():
            return
        for name in NAMES:
            (self.path / name).unlink(missing_ok=True)
        for folder in (self._states, self._logs):
            shutil.rmtree(folder, ignore_errors=True)

    def save_state(self, steps: int, state: dict[str, Any]) -> None:
        """Write the whole state after so many steps, and remove the oldest beyond those kept."""
        with written_aside(self._states / f"step-{steps:09d}.pt") as aside:
            torch.save(state, aside)
        for path in self._state_paths()[: -self._kept]:
            path.unlink()

    def load_state(self) -> dict[str, Any] | None:
        """The newest whole state, or None; one that cannot be read is named and passed over."""
        for path in reversed(self._state_paths()):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged pickle can raise anything
                if self._writes:
                    warn(f"{path}: cannot be read, going on from the one before ({error})")
        return None

    def _state_paths(self) -> list[Path]:
        return sorted(self._states.glob("step-*.pt"))

    def write_history(self, rows: list[dict[str, float]]) -> None:
        """One row an epoch as CSV."""
        with (
            written_aside(self.path / "history.csv") as aside,
            open(aside, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)

    def log(self, row: dict[str, float]) -> None:
        """Add a row of the history to the log that TensorBoard shows."""
        from torch.utils.tensorboard import SummaryWriter

        if self._log is None:
            # What an earlier process logged of this epoch or later did not last.
            self._log = SummaryWriter(str(self._logs), purge_step=int(row["epoch"]))
        for name, value in row.items():
            if name != "epoch":
                self._log.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))
        self._log.flush()

    def read_history(self) -> list[dict[str, float]]:
        """What `write_history` wrote; nothing before the first epoch ends."""
        path = self.path / "history.csv"
        if not path.exists():
            return []
        with reading(path, "the history of a run is needed"), open(path, newline="") as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    def draw_history(self, rows: list[dict[str, float]]) -> None:
        """Loss and shares of right answers against the epoch, training and test."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        epochs = [row["epoch"] for row in rows]
        axes_of_loss, axes_of_shares = figure.subplots(1, 2)
        for name in (name for name in rows[0] if name.startswith(("train_", "test_"))):
            axes = axes_of_loss if name.endswith("_loss") else axes_of_shares
            scale = 1 if name.endswith("_loss") else 100
            values = [scale * row[name] for row in rows]
            axes.plot(epochs, values, marker=".", label=_label(name))
        for axes, unit in ((axes_of_loss, "loss (nats)"), (axes_of_shares, "%")):
            axes.set(xlabel="epoch", ylabel=unit)
            axes.grid(alpha=0.3)
            axes.legend()
        with written_aside(self.path / "history.png") as aside:
            figure.savefig(aside, dpi=120)


WORDS = {"loss": "loss", "top1": "top-1", "miou": "mIoU", "pixel_accuracy": "pixel accuracy"}


def _label(name: str) -> str:
    """`test_top1` as "test top-1"."""
    split, _, metric = name.partition("_")
    return f"{split} {WORDS[metric]}"


def in_words(name: str, value: float) -> str:
    """A figure of the history: a loss as it is, a share of right answers in %."""
    figure = f"{value:.4f}" if name.endswith("_loss") else f"{100 * value:.2f} %"
    return f"{_label(name)} {figure}"
