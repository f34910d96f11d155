"""What a training run is: a complete, typed config.

No heavy import stands here, so that the command line can show every field and its default at once.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from repvgg.errors import InputError

Augmentation = Literal[
    "crop-flip", "autoaugment-crop-flip", "shift-flip", "shift-alternate-flip", "shift", "none"
]
Schedule = Literal["cosine", "linear", "poly"]
OptimizerName = Literal["sgd", "muon"]
Precision = Literal["fp32", "bf16", "fp16", "fp64"]
Implementation = Literal["auto", "branches", "fused", "recompute_cheap", "recompute_all", "merged"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step, over all processes.
        learning_rate: the highest, for steps of base_batch_size images; it is scaled in
            proportion to batch_size and falls to 0 along the schedule.
        base_batch_size: the batch_size that learning_rate is for.
        warmup_epochs: over which the rate rises from 0 in proportion to the steps.
        schedule: how the rate falls after the warm-up: along half a cosine, linearly, or as the
            power 0.9 of what is still to be done.
        optimizer: stochastic gradient descent; or the same but for the kernels of convolutions,
            which take orthogonalized steps, without weight decay (training/muon.py).
        muon_rate: highest length of an orthogonalized step relative to the kernel, for any
            batch_size; it follows the schedule.
        bias_rate: rate of the shifts of batch norms and of the last layer's bias, relative to
            that of the others.
        momentum: of the optimizer.
        nesterov: whether the momentum looks ahead by a step, as Nesterov's does.
        weight_decay: on the kernels of convolutions and linear layers only.
        ema_decay: a moving average of the weights with this decay a step is what is tested and
            kept as model; 0 for none.
        accumulate: parts in which a process computes its share of a step, to save memory.
        precision: of the convolutions; weights, batch norms and loss are fp32 with bf16 and fp16
            too. With fp64 everything is.
        channels_last: memory layout of images and weights.
        compile: whether `torch.compile` compiles the network.
        implementation: way through the training-time block, all of the same result; they differ in
            time and memory (docs/training_block.md).
        gradient_checkpointing: recompute each stage in the backward pass, to save memory.
        sync_bn: take batch statistics over all processes.
        seed: of the initial weights, the order of the images and their augmentation.
        checkpoint_minutes: between whole states that are kept within an epoch.
        kept_checkpoints: latest whole states that are kept.
        workers: processes that decode images, each training process; chosen by the machine if
            None.
        device: where to train; `auto` takes a GPU where there is one.
    """

    epochs: int = 120
    batch_size: int = 256
    learning_rate: float = 0.1
    base_batch_size: int = 256
    warmup_epochs: float = 0.0
    schedule: Schedule = "cosine"
    optimizer: OptimizerName = "sgd"
    muon_rate: float = 0.02
    bias_rate: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    ema_decay: float = 0.0
    accumulate: int = 1
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False
    implementation: Implementation = "auto"
    gradient_checkpointing: bool = False
    sync_bn: bool = False
    seed: int = 0
    checkpoint_minutes: float = 10.0
    kept_checkpoints: int = 3
    workers: int | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        require_bounds(self, BOUNDS)
        for name, kind in (
            ("schedule", Schedule),
            ("optimizer", OptimizerName),
            ("precision", Precision),
            ("implementation", Implementation),
        ):
            require_one_of(self, name, get_args(kind))
        if self.nesterov and not self.momentum:
            raise InputError("nesterov: a momentum above 0 needed, found 0")
        if self.batch_size < 2 * self.accumulate:
            raise InputError(
                f"accumulate: parts of 2 images or more needed, found {self.accumulate} parts of "
                f"a batch_size of {self.batch_size}"
            )

    @property
    def scaled_learning_rate(self) -> float:
        """The highest rate of the run: learning_rate in proportion to the batch."""
        return self.learning_rate * self.batch_size / self.base_batch_size

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A training run; the defaults are those of the paper (Sect. 4.1, 120 epochs).

    Attributes:
        model: name of a network, with changed fields if need be: `repvgg_a0:a=0.5`.
        block: what the network trains with, of blocks.py (Tables 6 and 7); its own if empty.
        pretrained: weights to begin with: a file, or `hub` for timm's published ones.
        whiten_stem: fix the 3×3 kernel of the first layer to the directions in which patches of the
            training images vary, each of unit variance.
        branch_scale: what the batch norms of the branches beside the first, the 3×3, begin with; 1
            in the paper. Smaller ones are not in the way of a 3×3 branch that learns fast.
        data: folder with train/ and val/, each with a folder a class; `cifar10:DIR`; `digits`.
        augmentation: random changes of the training images: a resized part and a flip, the same
            with AutoAugment, a shift and a flip, a shift with reflected borders and a flip in every
            second epoch, a shift alone, or none.
        max_shift: of an augmentation that shifts: how far at most, as a share of the size.
        label_smoothing: share of a label that is spread over all classes.
        mixup: alpha of the beta distribution by which pairs of images are mixed; 0 for none.
        auxiliary_weight: what the loss of each auxiliary head counts, against 1 of the network's
            own; heads are built for training alone, none for 0. The model's own if None: 0.1 for
            RepVGGplus, 0 for the others. The training loss that is shown is with theirs.
        image_size: side in pixels of the square that the network sees; the model's own if None.
    """

    model: str = "repvgg_a0"
    block: str = ""
    pretrained: str = ""
    whiten_stem: bool = False
    branch_scale: float = 1.0
    data: str = ""
    augmentation: Augmentation = "crop-flip"
    max_shift: float = 0.125
    label_smoothing: float = 0.0
    mixup: float = 0.0
    auxiliary_weight: float | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, "augmentation", get_args(Augmentation))
        if self.whiten_stem and self.pretrained:
            raise InputError("whiten_stem: for a network without pretrained weights only")
        if self.branch_scale != 1 and self.pretrained:
            raise InputError("branch_scale: for a network without pretrained weights only")


def require_bounds(config: Any, bounds: tuple[tuple[str, float, float], ...]) -> None:
    """Raise unless the fields that the config has are between these bounds, or None.

    Raises:
        InputError: naming the field.
    """
    for name, low, high in bounds:
        value = getattr(config, name, None)
        if value is not None and not low <= value <= high:
            upper = f" to {high}" if high < UNBOUNDED else " or more"
            raise InputError(f"{name}: {low}{upper} needed, found {value}")


def require_one_of(config: Any, name: str, known: tuple[Any, ...]) -> None:
    """Raise unless the field has one of these values.

    Raises:
        InputError: naming the field.
    """
    if getattr(config, name) not in known:
        raise InputError(f"{name}: one of {known} needed, found {getattr(config, name)!r}")


UNBOUNDED = 1e300

BOUNDS = (
    ("epochs", 1, UNBOUNDED),
    ("batch_size", 2, UNBOUNDED),
    ("learning_rate", 0, UNBOUNDED),
    ("base_batch_size", 1, UNBOUNDED),
    ("warmup_epochs", 0, UNBOUNDED),
    ("muon_rate", 0, 1),
    ("bias_rate", 0, UNBOUNDED),
    ("branch_scale", 0, UNBOUNDED),
    ("momentum", 0, 1),
    ("weight_decay", 0, UNBOUNDED),
    ("label_smoothing", 0, 0.99),
    ("max_shift", 0, 0.5),
    ("mixup", 0, UNBOUNDED),
    ("auxiliary_weight", 0, UNBOUNDED),
    ("ema_decay", 0, 0.999999),
    ("accumulate", 1, UNBOUNDED),
    ("image_size", 1, 16384),
    ("seed", 0, UNBOUNDED),
    ("checkpoint_minutes", 0, UNBOUNDED),
    ("kept_checkpoints", 1, UNBOUNDED),
    ("workers", 0, 1024),
)

# Fields that say where and how safely a run computes, not what; it may go on with others.
PLACE_FIELDS = ("data", "workers", "device", "checkpoint_minutes", "kept_checkpoints")


def changed_fields(config: RunConfig, earlier: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which a config says another run than an earlier one: name → (earlier, now)."""
    # A field that there was not yet had what is now its default.
    now, earlier = config.to_dict(), {**type(config)().to_dict(), **earlier}
    return {
        name: (earlier.get(name), now.get(name))
        for name in sorted(now.keys() | earlier.keys())
        if name not in PLACE_FIELDS and earlier.get(name) != now.get(name)
    }
