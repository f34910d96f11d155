"""The commands of `repvgg segment`: train, evaluate, predict."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from repvgg.console import progress_bar, say, show_table, warn, with_bar
from repvgg.errors import InputError
from repvgg.segmentation.config import SEGMENT_RECIPES, SegmentConfig
from repvgg.training.config import Device

if TYPE_CHECKING:
    from repvgg.segmentation.evaluation import View
    from repvgg.segmentation.pspnet import PSPNet

ModelFile = Annotated[Positional[Path], arg(metavar="MODEL")]


@dataclass(frozen=True)
class SegmentTrain:
    """Train a PSPNet, or go on where the same command stopped."""

    output: Path
    """Folder of the run: models, history, and the states to go on from."""
    recipe: Literal[tuple(SEGMENT_RECIPES)] = "cityscapes"  # pyright: ignore[reportInvalidTypeForm]
    """Named config that the flags below change; `--recipe NAME --help` shows its values."""
    restart: bool = False
    """Throw away what an earlier run left in the folder, and begin anew."""
    print_config: bool = False
    """Show the whole config as JSON and do nothing."""
    config: OmitArgPrefixes[SegmentConfig] = field(default_factory=SegmentConfig)

    def run(self) -> None:
        if self.print_config:
            say(json.dumps(self.config.to_dict(), indent=2))
            return
        from repvgg.segmentation.train import train

        folder = train(self.config, self.output, restart=self.restart)
        if os.environ.get("RANK", "0") != "0":
            return
        say(f"models: {folder.best} (best mIoU), {folder.last}; history: {folder.path}")
        say(f"next: repvgg convert {folder.best} {folder.path / 'plain.safetensors'}")


@dataclass(frozen=True)
class Looking:
    """How the network looks at each image."""

    window: int = 0
    """Side in pixels of a square that slides over it; 0 for the whole at once."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of its height and width, whose results are averaged."""
    flip: bool = False
    """Also from left to right."""

    def view(self) -> "View":
        """What `probabilities` takes."""
        from repvgg.segmentation.evaluation import View

        return View(self.window, self.scales, self.flip)


@dataclass(frozen=True)
class SegmentEvaluate:
    """MIoU, pixel accuracy and the IoU of each class on labelled scenes."""

    model: ModelFile
    """File of a PSPNet, training-time or plain."""
    data: str
    """`camvid:DIR`, `cityscapes:DIR`, or a folder that holds a classes.json."""
    split: Literal["train", "val", "test"] = "val"
    """Its part."""
    looking: OmitArgPrefixes[Looking] = field(default_factory=Looking)
    workers: int | None = None
    """Processes that decode images; chosen by the machine if not given."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        from repvgg.segmentation.data import open_scenes
        from repvgg.segmentation.evaluation import evaluate, evaluation_loader
        from repvgg.training.setup import choose_device

        network = _load(self.model).to(choose_device(self.device))
        scenes = open_scenes(self.data, self.split)
        if scenes.class_names != (network.class_names or scenes.class_names) or (
            len(scenes.class_names) != network.num_classes
        ):
            raise InputError(
                f"{self.data}: the classes of {self.model} needed, {network.class_names}, "
                f"found {scenes.class_names}"
            )
        loader = evaluation_loader(scenes, self.workers)
        found = evaluate(
            network, loader, self.looking.view(), lambda it: with_bar("scenes", it, len(loader))
        )
        rows = [
            (name, f"{100 * iou:.2f}" if iou == iou else "neither there nor predicted")
            for name, iou in zip(scenes.class_names, found.iou, strict=True)
        ]
        show_table(f"{self.model} on {len(scenes)} scenes of {self.data}, {self.split}",
                   ("class", "IoU (%)"), rows)  # fmt: skip
        say(
            f"mIoU {100 * found.miou:.2f} %, pixel accuracy {100 * found.pixel_accuracy:.2f} %, "
            f"loss {found.loss:.4f}"
        )


@dataclass(frozen=True)
class SegmentPredict:
    """Color what is in images: an overlay as PNG for each, or the label maps."""

    model: ModelFile
    """File of a PSPNet, training-time or plain."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE [IMAGE …]")]
    """Images, and folders of images, which are searched through."""
    output: Path = Path("segmented")
    """Folder for a PNG of the stem of each image."""
    labels: bool = False
    """Write the number of the class of each pixel in place of an overlay."""
    opacity: float = 0.6
    """Of the colors over the image, from 0 to 1."""
    looking: OmitArgPrefixes[Looking] = field(default_factory=Looking)
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> None:
        from repvgg.data.images import find_images
        from repvgg.segmentation.prediction import legend, write_prediction
        from repvgg.training.setup import choose_device

        if not self.images:
            raise InputError("images: at least one image or folder is needed, found none")
        if not 0 <= self.opacity <= 1:
            raise InputError(f"opacity: 0 to 1 needed, found {self.opacity}")
        paths = [path for given in self.images for path in find_images(given)]
        targets = [self.output / f"{path.stem}.png" for path in paths]
        for path, target in zip(paths, targets, strict=True):
            if targets.count(target) > 1 or target.absolute() == path.absolute():
                raise InputError(f"{path}: {target} is another image, or is to be written twice")
        network = _load(self.model).to(choose_device(self.device))
        view, errors = self.looking.view(), 0
        opacity = None if self.labels else self.opacity
        with progress_bar("images", len(paths)) as show:
            for path, target in zip(paths, targets, strict=True):
                try:
                    write_prediction(network, path, target, view, opacity)
                except InputError as error:
                    errors += 1
                    warn(error)
                show(path.name)
        if not self.labels:
            show_table("colors", ("class", "RGB"), legend(network))
        say(f"written: {len(paths) - errors} images in {self.output}")
        if errors:
            raise InputError(f"{errors} of {len(paths)} images could not be decoded")


SEGMENT_COMMANDS: dict[str, type] = {
    "train": SegmentTrain,
    "evaluate": SegmentEvaluate,
    "predict": SegmentPredict,
}


def segment_command(recipe: str) -> Any:
    """The type of `repvgg segment`, with the defaults of a recipe in `train`."""
    commands = {name: Annotated[kind, subcommand(name)] for name, kind in SEGMENT_COMMANDS.items()}
    default = SegmentTrain(tyro.MISSING, recipe, config=SEGMENT_RECIPES[recipe]())
    commands["train"] = Annotated[SegmentTrain, subcommand("train", default=default)]
    any_of_them = Union[tuple(commands.values())]  # noqa: UP007

    @dataclass(frozen=True)
    class Segment:
        """A class for every pixel: train a PSPNet, evaluate it, color images with it."""

        command: OmitSubcommandPrefixes[any_of_them]  # pyright: ignore[reportInvalidTypeForm]
        """What to do."""

        def run(self) -> None:
            self.command.run()

    return Segment


def _load(path: Path) -> "PSPNet":
    from repvgg.checkpoint import load
    from repvgg.segmentation.pspnet import PSPNet

    network = load(path)
    if not isinstance(network, PSPNet):
        raise InputError(f"{path}: a PSPNet is needed, found a {type(network).__name__}")
    return network
