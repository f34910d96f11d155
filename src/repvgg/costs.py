"""Parameters, multiply-adds and Winograd multiplies (paper, Sect. 2.4 and 4.1).

The paper counts a multiply-add as one operation. A 3×3 convolution of stride 1 done by Winograd's
F(2×2, 3×3) needs 4/9 of its multiply-adds as multiplications; everything else needs all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from repvgg.errors import InputError

WINOGRAD_SHARE = 4 / 9


@dataclass(frozen=True)
class LayerCost:
    """What one module computes itself, its children not counted.

    Attributes:
        name: as in `named_modules()`.
        module: its class and geometry.
        output_shape: of its (last) output, for one image.
        params: numbers in its own parameters.
        macs: multiply-adds for one image.
        winograd_multiplies: multiplications for one image.
    """

    name: str
    module: str
    output_shape: tuple[int, ...]
    params: int
    macs: int
    winograd_multiplies: float


@dataclass(frozen=True)
class Cost:
    """Totals for one image, and a row for each module that computes or holds parameters."""

    params: int
    macs: int
    winograd_multiplies: float
    layers: tuple[LayerCost, ...]


def cost(model: nn.Module, image_size: int | tuple[int, int] = 224, in_chans: int = 3) -> Cost:
    """Count by running the model on the meta device: no arithmetic is done, no memory is needed.

    Args:
        model: any module that takes images (1, in_chans, H, W); it is not changed.
        image_size: H = W in pixels, or (H, W).
        in_chans: channels of the image, if the model has no `in_chans` of its own.

    Raises:
        InputError: the model cannot take images of this size.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise InputError(f"image_size={image_size}: at least 1 pixel needed")
    image = torch.empty(1, getattr(model, "in_chans", in_chans), height, width, device="meta")
    reference = next(model.parameters(), image)
    modes = {module: module.training for module in model.modules()}
    counter = _Counter(model)
    try:
        model.eval()
        with torch.no_grad(), counter:
            torch.func.functional_call(
                model, _on_meta(model), (image.to(reference.dtype),), tie_weights=False
            )
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the model cannot take an image of {image.shape[1]}×{height}×{width}: {reason}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return counter.cost()


def built_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """A network on the meta device, for its costs alone.

    On the CPU where its constructor computes with tensors and torch cannot do that without values
    (RegNets of some versions of timm).
    """
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:
        return build()


def _on_meta(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer on the meta device, under one name for each module that has it.

    Under one name only: `functional_call` puts back what it found under each name in turn, so a
    module that is registered twice would keep its meta tensors.
    """
    return {
        f"{prefix}.{name}".lstrip("."): tensor.detach().to("meta")
        for prefix, module in model.named_modules()
        for name, tensor in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
    }


class _Counter(TorchDispatchMode):
    """Adds up what each operator costs, for the innermost module that is running."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.running: list[str] = []
        self.macs: dict[str, int] = {}
        self.multiplies: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> "_Counter":
        for name, module in self.model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(lambda *_, n=name: self.running.append(n)),
                module.register_forward_hook(lambda *args, n=name: self._finished(n, args[-1])),
            ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    def _finished(self, name: str, output: object) -> None:
        self.running.pop()
        if isinstance(output, Tensor):
            self.shapes[name] = tuple(output.shape[1:])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in flop_registry:
            macs = flop_registry[operator](*args, **(kwargs or {}), out_val=result) // 2
            is_winograd = operator is torch.ops.aten.convolution and _takes_winograd(*args)
            name = self.running[-1] if self.running else ""
            self.macs[name] = self.macs.get(name, 0) + macs
            share = WINOGRAD_SHARE if is_winograd else 1
            self.multiplies[name] = self.multiplies.get(name, 0) + macs * share
        return result

    def cost(self) -> Cost:
        layers, counted = [], set()
        for name, module in self.model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p not in counted]
            counted.update(own)
            if own or name in self.macs:
                layers.append(
                    LayerCost(
                        name,
                        _describe(module),
                        self.shapes.get(name, ()),
                        sum(p.numel() for p in own),
                        self.macs.get(name, 0),
                        self.multiplies.get(name, 0),
                    )
                )
        return Cost(
            params=sum(layer.params for layer in layers),
            macs=sum(layer.macs for layer in layers),
            winograd_multiplies=sum(layer.winograd_multiplies for layer in layers),
            layers=tuple(layers),
        )


def _takes_winograd(
    image: Tensor, kernel: Tensor, bias: Any, stride: list[int], padding: Any, dilation: list[int],
    transposed: bool, *_: Any,
) -> bool:  # fmt: skip
    """Whether the paper counts 4/9: 3×3, stride 1, of any dilation and groups (Sect. 2.4)."""
    return kernel.shape[2:] == (3, 3) and set(stride) == {1} and not transposed


def _describe(module: nn.Module) -> str:
    if not isinstance(module, nn.Conv2d):
        return type(module).__name__
    size = "×".join(map(str, module.kernel_size))
    text = f"Conv {size}, {module.in_channels} → {module.out_channels}"
    for name, value, usual in (
        ("stride", module.stride, (1, 1)),
        ("dilation", module.dilation, (1, 1)),
        ("groups", module.groups, 1),
    ):
        if value != usual:
            text += f", {name} {value[0] if isinstance(value, tuple) else value}"
    return text
