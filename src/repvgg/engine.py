"""The Python front of the native engine, which runs plain networks alone."""

import hashlib
import json
import logging
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from repvgg import __version__
from repvgg.errors import InputError
from repvgg.files import existing_file, written_aside

if TYPE_CHECKING:
    from torch import Tensor, nn

Tune = Literal["fast", "full"]
Weights = Literal["fp32", "fp16"]

# Of the operations, in the module's own numbers.
KINDS = {"pool": 2, "upsample": 3, "concat": 4}
DEFAULT_SIZE = 224
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is computed, and what it took.

    Attributes:
        layer: its name in the network; of the first ones, if they are computed band by band
            together, all their names.
        algorithm: `direct`, or the Winograd tile `F(rows×columns)` of its output.
        shape: of its result: channels, height, width.
        milliseconds: the least of several runs, on all threads.
        effective_gflops: operations of the direct convolution in this time, 10⁹ a second.
        share_of_limit: multiplications of the chosen algorithm in this time, as a share of what
            the threads could do at their peak.
        weight_megabytes: its weights, as the algorithm wants them.
    """

    layer: str
    algorithm: str
    shape: tuple[int, int, int]
    milliseconds: float
    effective_gflops: float
    share_of_limit: float
    weight_megabytes: float


class Plan(list[LayerPlan]):
    """The layers of a network in order; printed as a table."""

    def __str__(self) -> str:
        lines = [("layer", "algorithm", "C×H×W", "ms", "GFLOPS", "limit", "MB")]
        lines += [
            (
                row.layer,
                row.algorithm,
                "×".join(map(str, row.shape)),
                f"{row.milliseconds:.3f}",
                f"{row.effective_gflops:.1f}",
                f"{row.share_of_limit:.0%}",
                f"{row.weight_megabytes:.2f}",
            )
            for row in self
        ]
        lines.append(("all", "", "", f"{sum(row.milliseconds for row in self):.3f}", "", "", ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if index < 3 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


@dataclass(frozen=True)
class Memory:
    """Bytes that an engine holds.

    Attributes:
        weights: transformed, for all plans in use.
        activations: the maps of the plans in use; each plan has two buffers in turn (Fig. 3).
        scratch: transformed tiles of the threads.
    """

    weights: int
    activations: int
    scratch: int


class Engine:
    """A network that is ready to run; made by `repvgg.compile` or `Engine.load`.

    The first call with a new batch or image size makes a plan: for each layer the algorithm, by
    measuring the few that look best. Plans are kept on disk by processor and version, so that a
    later process has them at once. Several threads may call an engine; they take turns. Several
    engines run side by side.
    """

    def __init__(self, native: Any, tune: Tune | None):
        self._native = native
        self._plans = _PlanFile(native.isa, tune)
        self._native.adopt(self._plans.known)
        self._last_shape: tuple[int, int, int] | None = None

    @property
    def isa(self) -> str:
        """Instruction set in use: `avx512`, `avx2`, `neon` or `portable`."""
        return self._native.isa

    @property
    def threads(self) -> int:
        """Threads that work, the calling one included."""
        return self._native.threads

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the logits; empty if unknown."""
        return tuple(self._native.class_names)

    @overload
    def __call__(self, images: "Tensor") -> "Tensor": ...
    @overload
    def __call__(self, images: np.ndarray) -> np.ndarray: ...
    def __call__(self, images: Any) -> Any:
        """Images → logits.

        Args:
            images: a numpy array or a CPU tensor in any order of memory, not copied: fp32
                (N, C, H, W), normalized; or uint8 (N, H, W, C), which the engine normalizes.

        Returns:
            fp32 (N, classes), or (N, C, H, W) if the network ends in a map; of the same kind as
            `images`.

        Raises:
            InputError: another type or shape.
        """
        array = images if isinstance(images, np.ndarray) else _array_of(images)
        shape = self._checked(array)
        try:
            logits = self._native(array)
        except _module().NativeError as error:
            raise InputError(str(error)) from None
        if shape != self._last_shape:
            self._last_shape = shape
            self._plans.keep(self._native.decisions())
        if isinstance(images, np.ndarray):
            return logits
        return sys.modules["torch"].from_numpy(logits)

    def _checked(self, array: np.ndarray) -> tuple[int, int, int]:
        channels = self._native.in_channels
        if array.ndim != 4 or array.dtype not in (np.float32, np.uint8):
            raise InputError(
                "images: float32 (N, C, H, W) or uint8 (N, H, W, C) needed, "
                f"found {array.dtype} {array.shape}"
            )
        last = array.dtype == np.uint8
        n, found, h, w = (array.shape[axis] for axis in ((0, 3, 1, 2) if last else (0, 1, 2, 3)))
        if found != channels or not min(h, w):
            raise InputError(f"images: {channels} channels and a size needed, found {array.shape}")
        return n, h, w

    def profile(self, batch: int = 1, size: int | tuple[int, int] = 224, repeats: int = 10) -> Plan:
        """Run on zeros and time every layer.

        Args:
            batch: images at a time.
            size: (height, width) in pixels, or the side of a square.
            repeats: runs; the least time of each layer counts.
        """
        height, width = (size, size) if isinstance(size, int) else size
        rows = self._native.profile(batch, height, width, repeats)
        self._plans.keep(self._native.decisions())
        peak = self._native.peak_flops * self.threads
        return Plan(
            LayerPlan(
                row["layer"],
                row["algorithm"].replace("x", "×"),
                row["shape"],
                row["milliseconds"],
                2 * row["multiply_adds"] / row["milliseconds"] / 1e6,
                2 * row["multiplications"] / (row["milliseconds"] / 1e3) / peak,
                row["weight_bytes"] / 1e6,
            )
            for row in rows
            if row["milliseconds"] > 0
        )

    @property
    def plan(self) -> Plan:
        """The plan of the images seen last, or of one image of 224×224; layers timed anew."""
        n, h, w = self._last_shape or (1, DEFAULT_SIZE, DEFAULT_SIZE)
        return self.profile(n, (h, w))

    @property
    def memory(self) -> Memory:
        """What the engine holds now."""
        return Memory(*self._native.memory())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network as one file, which `Engine.load` and the C interface take.

        Raises:
            InputError: it cannot be written.
        """
        with written_aside(path) as aside:
            self._native.save(str(aside))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        tune: Tune | None = "fast",
        weights: Weights = "fp32",
        compact: bool = False,
        isa: str | None = None,
        pin: bool = False,
    ) -> "Engine":
        """An engine from a file of `save`; its weights stay in the file until they are used.

        Args:
            path: of the file. It is checked whole, and never runs code.
            threads, tune, weights, compact, isa, pin: see `repvgg.compile`.

        Raises:
            InputError: the file is cut, altered, or none of these; a wrong argument.
        """
        native = _module()
        try:
            made = native.Engine.load(
                str(existing_file(path)),
                threads or 0,
                pin,
                tune or "none",
                isa or "",
                weights,
                compact,
            )
        except native.NativeError as error:
            raise InputError(str(error)) from None
        return cls(made, tune)


def compile(
    network: "nn.Module",
    *,
    threads: int | None = None,
    tune: Tune | None = "fast",
    weights: Weights = "fp32",
    compact: bool = False,
    isa: str | None = None,
    pin: bool = False,
) -> Engine:
    """Make the native engine of a plain network.

    Args:
        network: plain: 3×3 and 1×1 convolutions with ReLU, pooling, a linear head (what
            `repvgg.reparameterize` gives). It is read, not changed.
        threads: to work with; as many as this process may use if None.
        tune: `fast` measures for each layer the algorithms that look best, `full` all of them,
            None trusts the model of costs.
        weights: `fp16` stores them in half precision and computes in single: half the memory and
            traffic of an algorithm (another may then be the fastest), for an error of the logits
            of about 1e-3.
        compact: keep the weights as they are and transform them each time they are read: a ninth
            to a quarter of their memory, for more time.
        isa: instruction set: `avx512`, `avx2`, `neon`, `portable`; the best that the processor
            has if None, or what the environment variable RVGG_ISA says.
        pin: each thread to a core of its own.

    Raises:
        InputError: a layer that the engine does not run, by name; a wrong argument; no native
            part in this installation.
    """
    import torch

    from repvgg.export.graph import operations

    native = _module()
    preprocessing = getattr(network, "preprocessing", None)
    nodes = operations(network)
    channels = next((n.weight.shape[1] * n.groups for n in nodes if n.weight is not None), 3)
    mean = preprocessing.mean if preprocessing else (0.0,) * channels
    std = preprocessing.std if preprocessing else (1.0,) * channels
    try:
        builder = native.Builder(list(mean), list(std))
        for node in nodes[1:]:
            if node.kind == "conv":
                assert isinstance(node.weight, torch.Tensor)
                assert isinstance(node.bias, torch.Tensor)
                builder.conv(
                    node.name,
                    node.inputs[0],
                    node.weight.numpy(),
                    node.bias.numpy(),
                    node.groups,
                    node.stride,
                    node.dilation,
                    node.relu,
                )
            else:
                kind = KINDS[node.kind]
                builder.other(kind, node.name, node.inputs, node.bins, node.align_corners)
        builder.class_names(list(getattr(network, "class_names", None) or ()))
        made = native.Engine(
            builder, threads or 0, pin, tune or "none", isa or "", weights, compact
        )
    except native.NativeError as error:
        raise InputError(str(error)) from None
    return Engine(made, tune)


def instruction_sets() -> list[str]:
    """Those that this processor and this build have, the best first."""
    return _module().isas()


def _module() -> Any:
    try:
        from repvgg import _native  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise InputError(
            "engine: this installation has no native part; a C++20 compiler (GCC 11, Clang 14 or "
            "later) is needed, then pip install -v --force-reinstall --no-deps repvgg, which shows "
            f"what its build lacks ({error})"
        ) from None
    return _native


def _array_of(images: Any) -> np.ndarray:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(images, torch.Tensor):
        raise InputError(f"images: a numpy array or tensor needed, found {type(images).__name__}")
    if images.device.type != "cpu":
        raise InputError(f"images: a tensor on the CPU needed, found one on {images.device}")
    return images.detach().numpy()


class _PlanFile:
    """Decisions of the tuning, kept on disk by processor, instruction set and version."""

    def __init__(self, isa: str, tune: Tune | None):
        self.tune = tune
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(base) / "repvgg" / "plans"
        self.isa = isa
        self.known = {**self._read("fast"), **self._read("full")} if tune != "full" else {}
        if tune == "full":
            self.known = self._read("full")

    def _path(self, tune: str) -> Path:
        processor = hashlib.sha256(_processor_name().encode()).hexdigest()[:12]
        return self.folder / f"{processor}-{self.isa}-{__version__}-{tune}.json"

    def _read(self, tune: str) -> dict[str, str]:
        try:
            plans = json.loads(self._path(tune).read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(plans, dict):
            return {}
        return {k: v for k, v in plans.items() if isinstance(k, str) and isinstance(v, str)}

    def keep(self, decisions: dict[str, str]) -> None:
        """Add what is new to the file; a model's guess is not kept."""
        if self.tune is None or decisions.items() <= self.known.items():
            return
        self.known.update(decisions)
        try:
            with written_aside(self._path(self.tune)) as aside:
                merged = {**self._read(self.tune), **self.known}
                aside.write_text(json.dumps(merged, indent=0, sort_keys=True))
        except (InputError, OSError) as error:
            log.warning("plans are not kept: %s", error)


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    # The clock changes from moment to moment; the rest says what the processor is.
    same = [line for line in lines if line.startswith(("model", "cpu family", "cache", "flags"))]
    return "\n".join(same) or platform.processor()
