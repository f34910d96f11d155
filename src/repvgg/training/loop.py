"""The training loop: epochs of steps, each epoch's state kept, so that a stopped run goes on."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from repvgg.checkpoint import save
from repvgg.console import progress_bar, say, warn
from repvgg.data.images import Images, open_images
from repvgg.data.loader import Batch, Loader, derived_seed
from repvgg.data.transforms import normalize, training_transform
from repvgg.errors import InputError
from repvgg.model import RepVGG, create_model
from repvgg.preprocessing import Preprocessing
from repvgg.training.config import TrainConfig
from repvgg.training.evaluation import evaluate, evaluation_loader
from repvgg.training.optimizer import build_optimizer, cosine_rate
from repvgg.training.run_folder import RunFolder

# One image in so many may be broken before the run stops.
BROKEN_ALLOWED_IN = 1000
# The loss is fetched from the device, and checked, once in so many steps.
STEPS_BETWEEN_CHECKS = 20


def choose_device(name: str) -> torch.device:
    """The device of a config's `device`.

    Raises:
        InputError: a GPU is asked for where torch finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in found and not found[name]():
        raise InputError(f"device={name}: torch finds no such device here")
    return torch.device(name)


def build_network(config: TrainConfig, images: Images) -> RepVGG:
    """The untrained network of a config for these images; its weights depend on the seed alone."""
    torch.manual_seed(derived_seed(config.seed))
    preprocessing = None
    if config.image_size is not None:
        preprocessing = Preprocessing.for_channels(images.channels, config.image_size)
    return create_model(
        config.model,
        num_classes=len(images.class_names),
        in_chans=images.channels,
        preprocessing=preprocessing,
        class_names=images.class_names,
    )


def train(config: TrainConfig, output: Path, *, restart: bool = False) -> RunFolder:
    """Train a network, or go on where an earlier call with the same config stopped.

    Args:
        config: of the run.
        output: its folder, see `RunFolder`.
        restart: begin anew.

    Raises:
        InputError: data or config that cannot be used, too many broken images, a loss that is no
            longer a number.
    """
    return Run(config, output, restart=restart).finish()


class Run:
    """A run: network, optimizer, data and history, at the end of some epoch.

    Args: see `train`.
    """

    def __init__(self, config: TrainConfig, output: Path, *, restart: bool = False):
        if not config.data:
            raise InputError("data: a folder of images is needed, found none given")
        self.config = config
        self.device = choose_device(config.device)
        train_images = open_images(config.data, "train")
        test_images = open_images(config.data, "test")
        if train_images.class_names != test_images.class_names:
            raise InputError(
                f"{config.data}: the same classes to train and to test on are needed, found "
                f"{_difference(train_images.class_names, test_images.class_names)} in one alone"
            )
        self.network = build_network(config, train_images)
        self.network.to(self.device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.network, config)
        self.loader = Loader(
            train_images,
            training_transform(self.network.preprocessing, config.augmentation),
            config.batch_size,
            seed=config.seed,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.test_loader = evaluation_loader(
            self.network, test_images, config.batch_size, config.workers
        )
        self.broken_allowed = len(train_images) // BROKEN_ALLOWED_IN
        self.images = len(train_images)
        self.history: list[dict[str, float]] = []
        self.folder = RunFolder(output, config, restart=restart)
        self._restore()

    def _restore(self) -> None:
        state = self.folder.load_state()
        if state is None:
            return
        if (found := state["images"]) != self.images or state["classes"] != self._classes():
            raise InputError(
                f"{self.config.data}: the run was begun with {found} images of "
                f"{len(state['classes'])} classes, found {self.images} of {len(self._classes())}"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]
        say(f"going on after epoch {len(self.history)} of {self.config.epochs}")

    def _classes(self) -> list[str]:
        return list(self.network.class_names or ())

    def finish(self) -> RunFolder:
        """Train to the last epoch."""
        for epoch in range(len(self.history) + 1, self.config.epochs + 1):
            self.history.append(self._epoch(epoch))
            self._keep(epoch)
        self.folder.draw_history(self.history)
        return self.folder

    def _epoch(self, epoch: int) -> dict[str, float]:
        """Train and test once; the row for the history."""
        torch.manual_seed(derived_seed(self.config.seed, epoch))  # for dropout
        started = time.perf_counter()
        description = f"epoch {epoch}/{self.config.epochs}"
        with progress_bar(description, len(self.loader)) as show:
            loss, top1, images = self._train_epoch(epoch, show)
        seconds = time.perf_counter() - started
        test = evaluate(self.network, self.test_loader)
        row = {
            "epoch": epoch,
            "train_loss": round(loss, 5),
            "train_top1": round(top1, 5),
            "test_loss": round(test.loss, 5),
            "test_top1": round(test.top1, 5),
            "images_per_second": round(images / seconds, 1),
            "seconds": round(time.perf_counter() - started, 2),
        }
        say(
            f"{description}: loss {loss:.4f}, test loss {test.loss:.4f}, "
            f"test top-1 {100 * test.top1:.2f} %, {images / seconds:.0f} images/s"
        )
        return row

    def _train_epoch(self, epoch: int, show: Callable[[str], None]) -> tuple[float, float, int]:
        """All steps of an epoch: mean loss, share of right first classes, number of images."""
        self.network.train()
        total, hits = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        images, broken, started, note = 0, [], time.perf_counter(), ""
        for step, batch in enumerate(self.loader.epoch(epoch)):
            broken += self._account_for_broken(batch, len(broken))
            progress = (epoch - 1 + step / len(self.loader)) / self.config.epochs
            loss, right = self._step(batch, cosine_rate(progress, self.config.learning_rate))
            images += len(batch.labels)
            total += loss * len(batch.labels)
            hits += right
            if step % STEPS_BETWEEN_CHECKS == 0 or step + 1 == len(self.loader):
                self._check_finite(total, epoch, step)
                rate = images / (time.perf_counter() - started)
                note = f"loss {total.item() / images:.3f}, {rate:.0f} images/s"
            show(note)
        return total.item() / images, hits.item() / images, images

    def _step(self, batch: Batch, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the optimizer: the mean loss, and the number of right first classes."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        labels = batch.labels.to(self.device, non_blocking=True)
        images = batch.images.to(self.device, non_blocking=True)
        images = normalize(images, self.network.preprocessing)
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), (logits.argmax(1) == labels).sum()

    def _account_for_broken(self, batch: Batch, so_far: int) -> tuple[str, ...]:
        """Name the images that were left out; too many of them stop the run."""
        for number, message in enumerate(batch.broken, start=so_far + 1):
            if number > self.broken_allowed:
                raise InputError(
                    f"{message}; {number} of {self.images} images are broken, more than 1 in "
                    f"{BROKEN_ALLOWED_IN}"
                )
            warn(f"left out: {message}")
        return batch.broken

    def _check_finite(self, total: torch.Tensor, epoch: int, step: int) -> None:
        if not torch.isfinite(total):
            raise InputError(
                f"the loss is no longer a number at step {step} of epoch {epoch} (or up to "
                f"{STEPS_BETWEEN_CHECKS} before); a lower learning_rate may help, "
                f"{self.config.learning_rate} was given"
            )

    def _keep(self, epoch: int) -> None:
        """Write what the end of an epoch leaves."""
        save(self.network, self.folder.last)
        tops = [row["test_top1"] for row in self.history]
        if tops[-1] == max(tops) or not self.folder.best.exists():
            save(self.network, self.folder.best)
        self.folder.write_history(self.history)
        state: dict[str, Any] = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "images": self.images,
            "classes": self._classes(),
        }
        self.folder.save_state(epoch, state)


def _difference(one: tuple[str, ...], other: tuple[str, ...]) -> str:
    return ", ".join(sorted(set(one) ^ set(other))[:5])
