"""The command line: `repvgg VERB …`.

A command is a dataclass, whose fields are its flags, and a `run` that imports what it needs only
then, so that `--help` answers at once. Wrong input ends in one line and exit code 2.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from repvgg.ablations.command import Ablate
from repvgg.console import say, show_table, warn, with_bar
from repvgg.data.pack import Pack
from repvgg.errors import InputError, Interrupted
from repvgg.reproduce.command import Bench, Compare, Reproduce
from repvgg.segmentation.command import SegmentTrain, segment_command
from repvgg.segmentation.config import SEGMENT_RECIPES
from repvgg.training.config import Device, TrainConfig
from repvgg.training.recipes import RECIPES

if TYPE_CHECKING:
    from repvgg.model import RepVGG

ModelFile = Annotated[Positional[Path], arg(metavar="MODEL")]
OutputFile = Annotated[Positional[Path], arg(metavar="OUTPUT")]


@dataclass(frozen=True)
class Quickstart:
    """Train a small RepVGG on digits, convert it, prove the equivalence, time it, export it.

    Takes under a minute or two and needs no files.
    """

    output: Path = Path("quickstart")
    """Folder for all that is written."""

    def run(self) -> None:
        from repvgg.quickstart import quickstart

        quickstart(self.output)


@dataclass(frozen=True)
class Train:
    """Train a network on a folder of images, or go on where the same command stopped."""

    output: Path | None = None
    """Folder of the run: models, history, and the states to go on from; if not given, one in runs/
    that is named after recipe and model."""
    recipe: Literal[tuple(RECIPES)] = "imagenet-120"  # pyright: ignore[reportInvalidTypeForm]
    """Named config that the flags below change; `--recipe NAME --help` shows its values."""
    restart: bool = False
    """Throw away what an earlier run left in the folder, and begin anew."""
    print_config: bool = False
    """Show the whole config as JSON and do nothing."""
    config: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)

    def run(self) -> None:
        if self.print_config:
            say(json.dumps(self.config.to_dict(), indent=2))
            return
        from repvgg.training.loop import train

        folder = train(self.config, self.output or self._usual_output, restart=self.restart)
        if os.environ.get("RANK", "0") != "0":
            return
        say(f"models: {folder.best} (best test accuracy), {folder.last}; history: {folder.path}")
        say(f"next: repvgg convert {folder.best} {folder.path / 'plain.safetensors'}")

    @property
    def _usual_output(self) -> Path:
        """A folder whose name any file system takes."""
        return Path("runs") / re.sub(r"[^\w.,=-]", "-", f"{self.recipe}-{self.config.model}")


@dataclass(frozen=True)
class Recipes:
    """List the recipes of `train` and of `segment train`."""

    def run(self) -> None:
        rows = []
        for command, recipes in (("train", RECIPES), ("segment train", SEGMENT_RECIPES)):
            for name, recipe in recipes.items():
                config = recipe()
                data = config.data or "--data DIR"
                rows.append((command, name, config.model, data, config.epochs, recipe.__doc__))
        show_table("recipes", ("command", "name", "model", "data", "epochs", "what for"), rows)


@dataclass(frozen=True)
class Evaluate:
    """Accuracy and loss of a network on labelled images."""

    model: ModelFile
    """File of a network, as `train` and `convert` write it."""
    data: str
    """Folder of class folders, or one that holds val/ or test/; `cifar10:DIR`; `digits`."""
    name: str | None = None
    """Name of the network, for a weight file that does not say it (timm's, the authors')."""
    batch_size: int = 256
    """Images at a time."""
    workers: int | None = None
    """Processes that decode images; chosen by the machine if not given."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        from repvgg.data.images import open_images
        from repvgg.training.evaluation import evaluate, evaluation_loader, with_classes_of
        from repvgg.training.setup import choose_device

        _need_positive("batch-size", self.batch_size)
        network = _classifier(self.model, self.name).to(choose_device(self.device))
        images, note = with_classes_of(network, open_images(self.data, "test"))
        if note:
            warn(note)
        loader = evaluation_loader(network, images, self.batch_size, self.workers)
        result = evaluate(network, loader, lambda it: with_bar("images", it, len(loader)))
        right = round(result.top1 * len(images))
        say(
            f"top-1 {100 * result.top1:.2f} % ({right} of {len(images)}), "
            f"top-5 {100 * result.top5:.2f} %, loss {result.loss:.4f}"
        )


@dataclass(frozen=True)
class Convert:
    """Fold a training-time network into the plain one, verify it, and write it."""

    model: ModelFile
    """File of the training-time network."""
    output: OutputFile
    """File to write the plain network to; nothing is written if the two differ."""
    name: str | None = None
    """Name of the network, for a weight file that does not say it (timm's, the authors')."""
    data: str | None = None
    """Images to verify on, all of them, see `evaluate`, or `segment evaluate` for a PSPNet; random
    ones if not given."""
    max_rel_error: float | None = None
    """Largest error relative to the largest logit; by the precision of the file if not given."""

    def run(self) -> None:
        from repvgg.blocks import STAGES, is_plain
        from repvgg.checkpoint import save
        from repvgg.reparam import convert
        from repvgg.verification import verify

        network = _load(self.model, self.name)
        if is_plain(network.block):
            raise InputError(f"{self.model}: a training-time network is needed, found a plain one")
        if network.block in STAGES:
            raise InputError(
                f"{self.model}: {network.block} keeps its shortcuts, so that there is no plain "
                "network of it"
            )
        conversion = convert(network)
        inputs = _inputs(network, self.data)
        bound = self.max_rel_error
        if bound is None:
            bound = _usual_bound(network)
        agreement = verify(network, conversion.model, inputs, max_rel_error=bound)
        save(conversion.model, self.output)
        say(f"{self.output}: {conversion}")
        on = f"{agreement.images} images of {self.data}" if self.data else "random images"
        say(f"verified on {on}: {agreement}")


@dataclass(frozen=True)
class Predict:
    """Name what is in images: the most probable classes, a line an image."""

    model: ModelFile
    """File of a network, training-time or plain."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE [IMAGE …]")]
    """Images, and folders of images, which are searched through."""
    top_k: int = 5
    """Classes to name for each image."""
    name: str | None = None
    """Name of the network, for a weight file that does not say it (timm's, the authors')."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        from repvgg.data.images import find_images
        from repvgg.prediction import predict
        from repvgg.training.setup import choose_device

        if not self.images:
            raise InputError("images: at least one image or folder is needed, found none")
        paths = [path for given in self.images for path in find_images(given)]
        network = _classifier(self.model, self.name).to(choose_device(self.device))
        errors = []
        for prediction in predict(network, paths, self.top_k):
            if prediction.error:
                errors.append(prediction.error)
                warn(prediction.error)
                continue
            classes = ", ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.classes)
            say(f"{prediction.path}: {classes}")
        if errors:
            raise InputError(f"{len(errors)} of {len(paths)} images could not be decoded")


@dataclass(frozen=True)
class Profile:
    """Print a network layer by layer: shapes, parameters, multiply-adds, Winograd multiplies."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """File of a network, or a name: `repvgg_a0`, or `repvgg_a0:a=0.5,strides=1-1-2-2-2`."""
    block: str = "plain"
    """Of a name: the plain network, or the training-time one."""
    image_size: int | None = None
    """Side in pixels of the image; what the network is meant for if not given."""
    num_classes: int | None = None
    """Of a name: outputs of the linear layer; 1000 if not given, 19 of a PSPNet."""
    engine: bool = False
    """What the native engine makes of it: each layer's algorithm, time, share of the processor's
    limit, and the memory that it needs."""
    batch: int = 1
    """Of `--engine`: images at a time."""
    threads: int | None = None
    """Of `--engine`: all cores if not given."""
    tune: Literal["fast", "full"] = "fast"
    """Of `--engine`: measure the algorithms that look best for a layer, or all."""
    compact: bool = False
    """Of `--engine`: keep no transformed weights, for less memory."""

    def run(self) -> None:
        from repvgg.costs import cost
        from repvgg.model import create_model

        if not self.engine:
            _need_usual(self, ("batch", "threads", "tune", "compact"), "needs --engine")
        if self.model.endswith((".safetensors", ".pth", ".pt")) or Path(self.model).exists():
            _need_usual(self, ("block", "num_classes"), "is for a name, not a file")
            network = _load(Path(self.model), None)
        else:
            network = create_model(self.model, num_classes=self.num_classes, block=self.block)
        size = network.preprocessing.size if self.image_size is None else self.image_size
        _need_positive("image_size", size)
        if self.engine:
            return self._profile_engine(network, size)
        total = cost(network, size)
        rows = [
            (row.name, row.module, "×".join(map(str, row.output_shape)), f"{row.params:,}",
             f"{row.macs / 1e6:,.2f}", f"{row.winograd_multiplies / 1e6:,.2f}")
            for row in total.layers
        ]  # fmt: skip
        rows.append(
            ("total", f"{network.block} network at {size}×{size}", "", f"{total.params:,}",
             f"{total.macs / 1e6:,.2f}", f"{total.winograd_multiplies / 1e6:,.2f}")
        )  # fmt: skip
        columns = ("layer", "what", "output", "parameters", "multiply-adds (M)", "Winograd (M)")
        show_table(self.model, columns, rows)
        return None

    def _profile_engine(self, network: Any, size: int) -> None:
        from repvgg.engine import compile
        from repvgg.reparam import reparameterize

        _need_positive("batch", self.batch)
        engine = compile(
            reparameterize(network), threads=self.threads, tune=self.tune, compact=self.compact
        )
        plan = engine.profile(self.batch, size)
        rows = [
            (row.layer, row.algorithm, "×".join(map(str, row.shape)), f"{row.milliseconds:.3f}",
             f"{row.effective_gflops:.1f}", f"{row.share_of_limit:.0%}",
             f"{row.weight_megabytes:.2f}")
            for row in plan
        ]  # fmt: skip
        total = sum(row.milliseconds for row in plan)
        rows.append(("total", "", "", f"{total:.3f}", "", "", ""))
        columns = ("layer", "algorithm", "output", "ms", "GFLOPS", "of the limit", "weights, MB")
        title = f"{self.model}, batch {self.batch}, {engine.threads} threads, {engine.isa}"
        show_table(title, columns, rows)
        memory = engine.memory
        say(
            f"Weights {memory.weights / 1e6:.1f} MB, maps {memory.activations / 1e6:.1f} MB, "
            f"transformed tiles {memory.scratch / 1e6:.1f} MB."
        )


@dataclass(frozen=True)
class Export:
    """Write a network, folded, as ONNX or for the native engine, and check what was written.

    The number of images may vary, and of a PSPNet, and for the engine, their height and width.
    """

    model: ModelFile
    """File of a network, training-time or plain."""
    output: OutputFile
    """File to write, ending in .onnx, or in .rvgg for the engine."""
    name: str | None = None
    """Name of the network, for a weight file that does not say it (timm's, the authors')."""

    def run(self) -> None:
        import torch

        from repvgg.files import written_aside
        from repvgg.verification import compare_outputs

        writers = {".onnx": self._onnx, ".rvgg": self._engine}
        if self.output.suffix not in writers:
            raise InputError(f"{self.output}: a name that ends in .onnx or .rvgg is needed")
        write = writers[self.output.suffix]
        network = _load(self.model, self.name).float()
        (inputs,) = _inputs(network, None)
        with written_aside(self.output) as aside:
            outputs = write(network, aside, inputs)
            with torch.inference_mode():
                agreement = compare_outputs(network(inputs), outputs)
            agreement.require(1e-4)
        where = "onnxruntime" if self.output.suffix == ".onnx" else "the engine"
        say(f"{self.output}: equal in {where}, {agreement}")

    @staticmethod
    def _onnx(network: Any, path: Path, inputs: Any) -> Any:
        from repvgg.export.onnx import export_onnx, require, run_onnx
        from repvgg.model import RepVGG

        require("onnx", "onnxscript", "onnxruntime")
        export_onnx(network, path, dynamic_size=not isinstance(network, RepVGG))
        return run_onnx(path, inputs)

    @staticmethod
    def _engine(network: Any, path: Path, inputs: Any) -> Any:
        from repvgg.engine import Engine, compile
        from repvgg.reparam import reparameterize

        compile(reparameterize(network), tune=None).save(path)
        return Engine.load(path, tune=None)(inputs)


COMMANDS: dict[str, type] = {
    "quickstart": Quickstart,
    "train": Train,
    "recipes": Recipes,
    "pack": Pack,
    "evaluate": Evaluate,
    "convert": Convert,
    "predict": Predict,
    "profile": Profile,
    "export": Export,
    "ablate": Ablate,
    "bench": Bench,
    "compare": Compare,
    "reproduce": Reproduce,
}


def _load(path: Path, name: str | None) -> "RepVGG":
    """A network in eval mode from a file that says what it is, or one of the name."""
    from repvgg.checkpoint import load, network_from_weights

    if name is None:
        return load(path)
    network, loaded = network_from_weights(name, path)
    say(loaded)
    return network


def _classifier(path: Path, name: str | None) -> "RepVGG":
    from repvgg.model import RepVGG

    network = _load(path, name)
    if not isinstance(network, RepVGG):
        raise InputError(f"{path}: a network that classifies is needed; see `repvgg segment`")
    return network


def _inputs(network: "RepVGG", data: str | None) -> Any:
    """Batches of real images, prepared, or one of random images; in the network's dtype."""
    import torch

    like = next(network.parameters())
    if data is None:
        size = network.preprocessing.size
        count = max(1, min(8, 8 * 224**2 // size**2))  # a large one says as much as eight small
        shape = (count, network.in_chans, size, size)
        return [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)]
    from repvgg.data.images import open_images
    from repvgg.data.transforms import normalize
    from repvgg.model import RepVGG
    from repvgg.segmentation import evaluation as of_scenes
    from repvgg.segmentation.data import open_scenes
    from repvgg.training import evaluation

    if isinstance(network, RepVGG):
        loader = evaluation.evaluation_loader(network, open_images(data, "test"), batch_size=64)
    else:
        loader = of_scenes.evaluation_loader(open_scenes(data, "val"))

    def batches() -> Any:
        for batch in with_bar("verifying", loader.epoch(), len(loader)):
            if batch.broken:
                raise InputError(batch.broken[0])
            yield normalize(batch.images, network.preprocessing).to(like.dtype)

    return batches()


def _usual_bound(network: "RepVGG") -> float:
    """Relative error that rounding alone may make in the precision of the network's weights."""
    import torch

    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(next(network.parameters()).dtype, 5e-2)


def _need_usual(command: Any, names: tuple[str, ...], reason: str) -> None:
    """Raise if one of these fields was given, which would be ignored."""
    usual = {field.name: field.default for field in dataclasses.fields(command)}
    for name in names:
        if getattr(command, name) != usual[name]:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: {reason}, found {getattr(command, name)}")


def _need_positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name}: 1 or more needed, found {value}")


def _chosen_recipe(arguments: list[str], recipes: Collection[str], usual: str) -> str:
    """The value of `--recipe`, needed before the parser runs since it sets the other defaults."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--recipe":
            value = value if equals else "".join(arguments[index + 1 : index + 2])
            return value if value in recipes else usual
    return usual


def _parser(arguments: list[str]) -> Any:
    """The union of all commands, with the defaults of the chosen recipe in `train`."""
    commands = {name: Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items()}
    if arguments[:1] == ["train"]:
        recipe = _chosen_recipe(arguments, RECIPES, Train.recipe)
        commands["train"] = Annotated[
            Train,
            subcommand("train", default=Train(recipe=recipe, config=RECIPES[recipe]())),
        ]
    recipe = SegmentTrain.recipe
    if arguments[:2] == ["segment", "train"]:
        recipe = _chosen_recipe(arguments, SEGMENT_RECIPES, recipe)
    commands["segment"] = Annotated[segment_command(recipe), subcommand("segment")]
    return Union[tuple(commands.values())]  # noqa: UP007


class _Held(io.StringIO):
    """What is said on the standard error, kept back, in the colours that it would have there."""

    def isatty(self) -> bool:
        return sys.stderr.isatty()


def _parsed(arguments: list[str]) -> Any:
    """The command that the arguments name.

    Raises:
        InputError: values that its config refuses, which tyro would report under names of its own.
        SystemExit: anything else that is wrong, which tyro has reported.
    """
    held = _Held()
    try:
        with contextlib.redirect_stderr(held):
            return tyro.cli(
                _parser(arguments),
                prog="repvgg",
                description="Networks that train with many branches and run as a plain stack of "
                "3×3 convolution + ReLU.",
                args=arguments or ["--help"],
            )
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        if cause is None:
            sys.stderr.write(held.getvalue())
            raise
        field, colon, reason = str(cause).partition(":")
        raise InputError(f"--{field.replace('_', '-')}{colon}{reason}") from None


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name, those of the process if none are given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = lambda message, *_, **__: warn(f"warning: {message}")
    try:
        _parsed(arguments).run()
    except InputError as error:
        warn(f"repvgg: {error}")
        sys.exit(2)
    except Interrupted as stop:
        warn(f"repvgg: {stop}")
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        warn("repvgg: interrupted")
        sys.exit(130)
    except BrokenPipeError:  # as in `repvgg predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a lost shard; out of a worker, with its traceback
        warn(f"repvgg: {str(error).strip().splitlines()[-1]}")
        sys.exit(1)
