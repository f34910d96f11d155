"""Whether two networks compute the same, on given inputs."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.branches import MultiBranchBlock
from repvgg.errors import InputError
from repvgg.reparam import unwrapped


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of a second network are from those of the first.

    Attributes:
        max_abs_error: largest |difference| of any output.
        max_rel_error: `max_abs_error` over the largest |output| of the first network.
        top1_agreement: share of images (or pixels) with the same arg max over dimension 1; `None`
            if no output has classes.
        images: how many inputs were compared.
        layer_errors: relative error after each block that was folded, in the order of the network.
    """

    max_abs_error: float
    max_rel_error: float
    top1_agreement: float | None
    images: int
    layer_errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"max abs error {self.max_abs_error:.2e}, relative {self.max_rel_error:.2e}"
        if self.top1_agreement is not None:
            text += f", top-1 agreement {100 * self.top1_agreement:.2f} % of {self.images}"
        return text

    def require(self, max_rel_error: float) -> None:
        """Raise if the error is above `max_rel_error`.

        Raises:
            InputError: with the figures and the first layer that differs.
        """
        if self.max_rel_error <= max_rel_error:
            return
        first = next((n for n, e in self.layer_errors.items() if not e <= max_rel_error), None)
        where = f"; the first layer that differs is {first}" if first else ""
        raise InputError(
            f"the networks differ: {self}; a relative error of at most {max_rel_error:.0e} "
            f"is needed{where}"
        )


@torch.no_grad()
def verify(
    model: nn.Module,
    plain: nn.Module,
    inputs: Tensor | Iterable[Tensor],
    *,
    max_rel_error: float | None = None,
) -> Agreement:
    """Run both networks at inference, whatever their mode, and compare what they give.

    Args:
        model: the network before conversion.
        plain: the network after conversion. Both get their mode back afterwards.
        inputs: a batch of real inputs (N, C, H, W), or any number of batches, on the device and of
            the dtype of the networks.
        max_rel_error: raise if the relative error is above this.

    Raises:
        InputError: the networks differ by more than `max_rel_error`, or in the form of their
            output; the message has the figures. No batch at all.
    """
    batches = [inputs] if isinstance(inputs, Tensor) else inputs
    with at_inference(model), at_inference(plain):
        parts = [_agreement_on(model, plain, batch) for batch in batches]
    if not parts:
        raise InputError("verify: at least one batch of inputs needed, found none")
    agreement = functools.reduce(_merged, parts)
    if max_rel_error is not None:
        agreement.require(max_rel_error)
    return agreement


def _agreement_on(model: nn.Module, plain: nn.Module, batch: Tensor) -> Agreement:
    blocks = _block_pairs(model, plain)
    with _recorded([block for block, _ in blocks.values()]) as seen:
        expected = model(batch)
    with _recorded([block for _, block in blocks.values()]) as seen_plain:
        actual = plain(batch)
    layer_errors = {
        name: _errors(seen[index], seen_plain[index])[1]
        for index, name in enumerate(blocks)
        if index in seen and index in seen_plain
    }
    return dataclasses.replace(compare_outputs(expected, actual), layer_errors=layer_errors)


def compare_outputs(expected: object, actual: object) -> Agreement:
    """How far an output, a tensor or any nesting of tensors, is from the expected one.

    Raises:
        InputError: they differ in form.
    """
    tensors, others = _tensors(expected), _tensors(actual)
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in others]:
        raise InputError(
            f"the networks differ in the shape of their output: {[*map(_shape, tensors)]} "
            f"and {[*map(_shape, others)]}"
        )
    errors = [_errors(a, b) for a, b in zip(tensors, others, strict=True)]
    return Agreement(
        max_abs_error=max(error for error, _ in errors),
        max_rel_error=max(error for _, error in errors),
        top1_agreement=_top1_agreement(tensors[0], others[0]),
        images=len(tensors[0]) if tensors[0].dim() else 1,
    )


def _merged(one: Agreement, other: Agreement) -> Agreement:
    """The agreement on the images of both."""
    images, top1 = one.images + other.images, None
    if one.top1_agreement is not None and other.top1_agreement is not None:
        top1 = one.top1_agreement * one.images + other.top1_agreement * other.images
        top1 /= images
    return Agreement(
        max_abs_error=max(one.max_abs_error, other.max_abs_error),
        max_rel_error=max(one.max_rel_error, other.max_rel_error),
        top1_agreement=top1,
        images=images,
        layer_errors={
            name: max(error, other.layer_errors.get(name, error))
            for name, error in one.layer_errors.items()
        },
    )


@contextlib.contextmanager
def at_inference(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, in exact fp32; afterwards every module has its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with exact_fp32():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Let no convolution in fp32 round to 10 bits (TF32), as PyTorch lets them on GPUs.

    Else a network and its plain form would differ there by more than their folding does. Who has
    set `fp32_precision`, PyTorch's newer way to say so, keeps what is set.
    """
    try:
        before = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # it refuses to tell where the newer settings differ from the older ones
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _block_pairs(model: nn.Module, plain: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Blocks of `model`, by name, with what stands under the same name in `plain`."""
    plain_modules = dict(plain.named_modules())
    return {
        name: (module, plain_modules[name])
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, MultiBranchBlock) and name in plain_modules
    }


@contextlib.contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The last output of each module, by its position in the list."""
    seen: dict[int, Tensor] = {}

    def keep(index: int, output: Any) -> None:
        seen[index] = output.clone()  # a copy, since the next layer may work in place

    handles = [
        module.register_forward_hook(lambda _, __, output, index=index: keep(index, output))
        for index, module in enumerate(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: object) -> list[Tensor]:
    """All tensors of an output, which may be a tensor, a sequence or a mapping."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(values, list | tuple | type({}.values())):
        raise InputError(f"the network's output is a {type(output).__name__}, not made of tensors")
    return [tensor for value in values for tensor in _tensors(value)]


def _errors(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Largest absolute error, and that over the largest |expected|; infinite if not finite."""
    if expected.numel() == 0:
        return 0.0, 0.0
    expected, actual = expected.cpu().double(), actual.cpu().double()
    absolute = (expected - actual).abs().max().item()
    if not math.isfinite(absolute):
        return math.inf, math.inf
    largest = expected.abs().max().item()
    return absolute, absolute / largest if largest else (0.0 if absolute == 0 else math.inf)


def _top1_agreement(expected: Tensor, actual: Tensor) -> float | None:
    if expected.dim() < 2 or expected.shape[1] < 2:
        return None
    return (expected.argmax(1) == actual.argmax(1)).double().mean().item()


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
