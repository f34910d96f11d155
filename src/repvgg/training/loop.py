"""The training loop: epochs of steps, and whole states from which a stopped run goes on exactly.

Every random choice of a step depends on (seed, epoch, step or sample) alone, so a run that was
killed and goes on from its last state ends with the same bits as one that was not.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from repvgg.checkpoint import save
from repvgg.console import progress_bar, say, warn
from repvgg.data.loader import Batch, derived_seed
from repvgg.errors import InputError, Interrupted
from repvgg.reparam import reparameterize
from repvgg.training import setup
from repvgg.training.auxiliary import Supervised
from repvgg.training.classification import Classification
from repvgg.training.config import RunConfig
from repvgg.training.distributed import World, joined
from repvgg.training.optimizer import build_optimizers, schedule, set_rates
from repvgg.training.run_folder import RunFolder, in_words
from repvgg.training.task import TaskFactory

# One image in so many may be broken before the run stops.
BROKEN_ALLOWED_IN = 1000
# In so many steps the loss is fetched from the device and checked, and many processes agree.
STEPS_BETWEEN_CHECKS = 20


def train(
    config: RunConfig,
    output: Path,
    *,
    restart: bool = False,
    task: TaskFactory = Classification,
) -> RunFolder:
    """Train a network, or go on where an earlier call with the same config stopped.

    In each process that `torchrun` starts, this trains its part.

    Args:
        config: of the run.
        output: its folder, see `RunFolder`.
        restart: begin anew.
        task: makes what is trained of a config of its kind.

    Raises:
        InputError: data or config that cannot be used, too many broken images, a loss that is no
            longer a number.
        Interrupted: SIGINT or SIGTERM came; the state of that step is kept.
    """
    with joined(setup.choose_device(config.device)) as world:
        return Run(config, output, world, restart=restart, task=task).finish()


class Run:
    """A run: network, optimizer, data and history, after some step of some epoch.

    Attributes:
        network: what is tested and kept.
        trained: the network, perhaps in what it trains with alone.
        epoch, step: the step that comes next; epochs count from 1, steps of an epoch from 0.
        sums: (3,) of this epoch so far, in this process: loss, right answers, images.
    """

    def __init__(
        self,
        config: RunConfig,
        output: Path,
        world: World,
        *,
        restart: bool = False,
        task: TaskFactory = Classification,
    ):
        self.config, self.world = config, world
        self.task = task(config, world)
        self.images, self.loader = self.task.images, self.task.loader
        self.network = network = self.task.network
        self.trained = self.task.trained
        self.optimizers = build_optimizers(self.trained, config, self.task.faster, self.task.factor)
        self.scaler = torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
            world.device.type, enabled=config.precision == "fp16"
        )
        self.average = None
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        self.history: list[dict[str, float]] = []
        self.epoch, self.step = 1, 0
        dtype = next(network.parameters()).dtype
        self.sums = torch.zeros(3, device=world.device, dtype=dtype)
        self.bad_step = torch.full((), -1, device=world.device)
        self.broken = 0
        self.folder = RunFolder(output, config, restart=restart, writes=world.is_first)
        world.any(False)  # no process reads the folder before the first has looked it over
        self._restore()
        self.model = setup.for_steps(self.trained, config, world)

    @property
    def result(self) -> Any:
        """The network that is tested and kept: the moving average, if there is one."""
        return self.network if self.average is None else self.average.module

    def finish(self) -> RunFolder:
        """Train to the last epoch."""
        self._announce()
        try:
            with signals_kept() as self.received:
                self.kept_at = time.monotonic()
                while self.epoch <= self.config.epochs:
                    self._train_epoch()
                    self._end_epoch()
        finally:
            self.model = self.trained  # DDP would keep the group of processes alive
        if self.world.is_first:
            self.folder.draw_history(self.history)
        return self.folder

    def _announce(self) -> None:
        config = self.config
        if not self.world.is_first:
            return
        if (rate := config.scaled_learning_rate) != config.learning_rate:
            say(
                f"learning rate {config.learning_rate:g} × {config.batch_size} images a step / "
                f"{config.base_batch_size} = {rate:g}"
            )
        if (self.epoch, self.step) != (1, 0):
            say(f"going on at step {self.step} of epoch {self.epoch} of {config.epochs}")

    # --- An epoch --------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """The steps of this epoch that are still to be done."""
        self.model.train()
        self.started, done_before, note = time.monotonic(), self.step, ""
        with self._bar() as show, setup.repeatable():
            for batch in self.loader.epoch(self.epoch, skip=self.step):
                self._account_for_broken(batch)
                loss, right = self._step(batch)
                count = len(batch.labels)
                self.bad_step = torch.where(
                    (self.bad_step < 0) & ~loss.isfinite(), self.step, self.bad_step
                )
                self.sums += torch.stack((loss * count, right, torch.full_like(loss, count)))
                self.step += 1
                if self._after_step():
                    rate = (self.step - done_before) * self.config.batch_size / self._elapsed()
                    note = f"loss {self.sums[0] / self.sums[2]:.3f}, {rate:.0f} images/s"
                show(note)
        self.images_per_second = (
            (self.step - done_before) * self.config.batch_size / self._elapsed()
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self.started + 1e-9

    @contextmanager
    def _bar(self) -> Iterator[Callable[[str], None]]:
        if not self.world.is_first:
            yield lambda note: None
            return
        description = f"epoch {self.epoch}/{self.config.epochs}"
        with progress_bar(description, len(self.loader), done=self.step) as show:
            yield show

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One step of the optimizer: this process's mean loss, and its right answers."""
        torch.manual_seed(  # for dropout
            derived_seed(self.config.seed, self.epoch, self.step, self.world.rank)
        )
        epochs_done = self.epoch - 1 + self.step / len(self.loader)
        set_rates(self.optimizers, schedule(self.config, epochs_done))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        tensors = (batch.images, batch.labels, batch.mix)
        tensors = [tensor.to(self.world.device, non_blocking=True) for tensor in tensors]
        parts = list(zip(*(t.chunk(self.config.accumulate) for t in tensors), strict=True))
        losses, hits = [], []
        for number, (images, labels, mix) in enumerate(parts, start=1):
            share = len(labels) / len(batch.labels)
            with self._gradients_kept_here(number < len(parts)):
                loss, right = self.task.loss(self.model, images, labels, mix)
                self.scaler.scale(loss * share).backward()
            losses.append(loss.detach() * share)
            hits.append(right)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return torch.stack(losses).sum(), torch.stack(hits).sum()

    def _gradients_kept_here(self, kept: bool) -> Any:
        """Whether the gradients wait for those of further parts before all processes share them."""
        if kept and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _end_epoch(self) -> None:
        """Test, and write what the end of an epoch leaves."""
        test = self.task.test(_to_be_run(self.result))
        loss, right, images = self.world.sum(*self.sums.tolist())
        row = {
            "epoch": self.epoch,
            "train_loss": round(loss / images, 6),
            f"train_{self.task.hits}": round(right / images, 6),
            **{f"test_{name}": round(value, 6) for name, value in test.items()},
            "images_per_second": round(self.images_per_second, 1),
            "seconds": round(self._elapsed(), 2),
        }
        self.history.append(row)
        self.epoch, self.step, self.broken = self.epoch + 1, 0, 0
        self.sums.zero_()
        if self.world.is_first:
            self._publish(row)
        self._keep()

    def _publish(self, row: dict[str, float]) -> None:
        """Show the row of an epoch, and write the models and the history."""
        tests = [in_words(name, value) for name, value in row.items() if name.startswith("test_")]
        say(
            f"epoch {row['epoch']}/{self.config.epochs}: loss {row['train_loss']:.4f}, "
            f"{', '.join(tests)}, {row['images_per_second']:.0f} images/s"
        )
        save(self.result, self.folder.last)
        scores = [row[f"test_{self.task.score}"] for row in self.history]
        if scores[-1] == max(scores) or not self.folder.best.exists():
            save(self.result, self.folder.best)
        self.folder.write_history(self.history)
        self.folder.log(row)

    # --- What can go wrong -----------------------------------------------------------------------

    def _account_for_broken(self, batch: Batch) -> None:
        """Name the images that were left out; too many of them stop the run."""
        for message in batch.broken:
            self.broken += 1
            if self.broken > self.images // BROKEN_ALLOWED_IN:
                raise InputError(
                    f"{message}; {self.broken} of {self.images} images are broken, more than 1 in "
                    f"{BROKEN_ALLOWED_IN}"
                )
            warn(f"left out: {message}")

    def _check_finite(self) -> None:
        """Every process must call it."""
        step = int(self.bad_step)
        if self.world.any(step >= 0):
            where = f"at step {step}" if step >= 0 else f"of another process up to step {self.step}"
            raise InputError(
                f"the loss is no longer a number {where} of epoch {self.epoch}; a lower "
                f"learning_rate than {self.config.learning_rate} may help; the states in "
                f"{self.folder.path} are from before"
            )

    def _after_step(self) -> bool:
        """Stop if a signal came, keep the state if it is time to; whether the loss was checked."""
        is_check = self.step % STEPS_BETWEEN_CHECKS == 0 or self.step == len(self.loader)
        if self.world.size > 1 and not is_check:
            return False  # the processes must agree, and to ask one another takes time
        is_due = time.monotonic() - self.kept_at >= 60 * self.config.checkpoint_minutes
        stop, keep = self.world.sum(bool(self.received), is_due and self.world.is_first)
        if is_check or stop or keep:
            self._check_finite()
        if stop or keep:
            self._keep()
        if stop:
            raise Interrupted(
                f"stopped at step {self.step} of epoch {self.epoch}; the same command goes on "
                "from there",
                next(iter(self.received), signal.SIGTERM),
            )
        return is_check

    # --- States ----------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Write the whole state, in the first process; every process must call it."""
        self.kept_at = time.monotonic()
        sums = self.world.sum(*self.sums.tolist())
        if not self.world.is_first:
            return
        state: dict[str, Any] = {
            "network": self.network.state_dict(),
            "heads": None,
            "average": None if self.average is None else self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "epoch": self.epoch,
            "step": self.step,
            "sums": sums,
            "broken": self.broken,
            "images": self.images,
            "classes": self._classes(),
            "config": self.config.to_dict(),
        }
        if isinstance(self.trained, Supervised):
            state["heads"] = self.trained.heads.state_dict()
        self.folder.save_state((self.epoch - 1) * len(self.loader) + self.step, state)

    def _restore(self) -> None:
        state = self.folder.load_state()
        if state is None:
            return
        if (found := state["images"]) != self.images or state["classes"] != self._classes():
            raise InputError(
                f"{self.folder.path}: the run was begun with {found} images of "
                f"{len(state['classes'])} classes, found {self.images} of {len(self._classes())}"
            )
        self.network.load_state_dict(state["network"])
        if isinstance(self.trained, Supervised):
            self.trained.heads.load_state_dict(state["heads"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.epoch, self.step = state["history"], state["epoch"], state["step"]
        self.broken = state["broken"]
        if self.world.is_first:  # which stands for all of them
            self.sums.copy_(torch.tensor(state["sums"]))

    def _classes(self) -> list[str]:
        return list(self.network.class_names or ())


def _to_be_run(network: Any) -> Any:
    """The network folded, which is faster; itself if it cannot be (a row of Table 7)."""
    try:
        return reparameterize(network)
    except InputError:
        return network


@contextmanager
def signals_kept() -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that come meanwhile, which then do not end the process at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    earlier = [signal.signal(n, lambda number, _: received.append(number)) for n in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)
