"""How networks are run when their speed is measured (paper, Sect. 4.1)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from repvgg.errors import InputError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Layout = Literal["channels-last", "contiguous"]
Runtime = Literal["torch", "compile", "onnxruntime", "openvino", "ncnn", "mnn", "native"]


@dataclass(frozen=True)
class Protocol:
    """How networks are run; the defaults are the paper's.

    Attributes:
        runtime: what runs them: PyTorch as it is, PyTorch's `torch.compile` (`compile`), or others
            on the CPU. ncnn, which has no batches, runs images one by one; it and MNN compute in
            fp32 here, where ncnn by default keeps weights in fp16.
        batch: images at a time.
        warmup: batches that are not timed, of each network.
        rounds: batches that are timed; in each round every network runs one, in turn.
        precision: of weights and images. fp32 is exact on GPUs too, where tf32 lets convolutions
            round to 10 bits; bf16 and fp16 hold everything in half precision.
        threads: of the CPU; PyTorch's number if None.
        device: where they run; `auto` takes a GPU where there is one.
        layout: of images and weights in memory, for PyTorch.
    """

    runtime: Runtime = "torch"
    batch: int = 128
    warmup: int = 50
    rounds: int = 50
    precision: Precision = "fp32"
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    layout: Layout = "channels-last"

    def __post_init__(self) -> None:
        for name, low in (("batch", 1), ("warmup", 0), ("rounds", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name}: {low} or more needed, found {value}")
        if self.runtime in ("torch", "compile"):
            return
        if self.precision != "fp32":
            raise InputError(
                f"precision: {self.runtime} is measured in fp32 alone, found {self.precision}"
            )
        if self.device == "cuda":
            raise InputError(f"device: {self.runtime} is measured on CPUs alone, found cuda")

    def quick(self) -> "Protocol":
        """With small batches and few rounds, in place of those that are the paper's."""
        usual = Protocol()
        smaller = {
            name: value
            for name, value in QUICK.items()
            if getattr(self, name) == getattr(usual, name)
        }
        return dataclasses.replace(self, **smaller)

    @property
    def is_the_papers_length(self) -> bool:
        """Whether batch and rounds are those of the paper."""
        usual = Protocol()
        return all(getattr(self, name) == getattr(usual, name) for name in QUICK)

    @property
    def title(self) -> str:
        """In a few words, for a table's head."""
        threads = f", threads: {self.threads}" if self.threads else ""
        layout = f", {self.layout}" if self.runtime in ("torch", "compile") else ""
        return f"{self.runtime}, {self.precision}, batch {self.batch}{threads}{layout}"

    @property
    def place(self) -> str:
        """The runtime, with the layout where it is not the usual one."""
        return self.runtime if self.layout == Protocol.layout else f"{self.runtime}, {self.layout}"

    @property
    def slug(self) -> str:
        """Part of the name of a file with results."""
        threads = f"-{self.threads}threads" if self.threads else ""
        layout = "" if self.layout == Protocol.layout else f"-{self.layout}"
        return f"{self.runtime}-{self.precision}-batch{self.batch}{threads}{layout}"


QUICK = {"batch": 8, "warmup": 1, "rounds": 5}
