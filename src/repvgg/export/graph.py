"""A plain network as the list of operations that the native engine runs."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from repvgg.errors import InputError
from repvgg.segmentation.pspnet import pooled


@dataclass
class Operation:
    """One node: what it does, on which earlier ones.

    Attributes:
        kind: `input`, `conv`, `pool`, `upsample` or `concat`.
        name: of the module in the network.
        inputs: positions in the list; `upsample` also takes a map of the size that is wanted.
        weight: (out, in / groups, k, k) fp32, of a convolution with k = 1 or 3.
        bias: (out,) fp32.
        groups, stride, dilation: of the convolution.
        relu: whether a ReLU follows.
        bins: side of the map that a pooling gives, 1 for a mean over the whole map.
        align_corners: of the bilinear upsampling.
    """

    kind: str
    name: str
    inputs: list[int] = field(default_factory=list)
    weight: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 1
    stride: int = 1
    dilation: int = 1
    relu: bool = False
    bins: int = 1
    align_corners: bool = False


def operations(network: nn.Module) -> list[Operation]:
    """The network as operations, the input first, the result last.

    Convolutions of 3×3 (padding equal to the dilation) and 1×1, each with or without ReLU, means
    over the map or its bins, linear layers behind them, bilinear upsampling to the size of another
    map, concatenation of channels. Dropout does nothing.

    Raises:
        InputError: naming a layer that is none of these.
    """
    try:
        graph = fx.Tracer(autowrap_functions=(pooled,)).trace(network)
    except Exception as error:  # whatever the network's own code raises when it is traced
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise InputError(f"network: its forward cannot be followed: {reason}") from error
    reader = _Reader(network)
    for node in graph.nodes:
        reader.read(node)
    return reader.result


class _Reader:
    """Goes through a traced graph; `place` says at which operation each value is."""

    def __init__(self, network: nn.Module):
        self.modules = dict(network.named_modules())
        self.result: list[Operation] = []
        self.place: dict[fx.Node, int] = {}
        self.users: dict[int, int] = {}

    def read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.result:
                raise InputError(f"network: one input needed, found a second, {node.name}")
            self.place[node] = self._add(Operation("input", "input"))
        elif node.op == "output":
            (value,) = node.args
            if not isinstance(value, fx.Node) or value not in self.place:
                raise InputError("network: one tensor as result needed")
            if self.place[value] != len(self.result) - 1:
                raise InputError("network: the result must come from its last layer")
        elif node.op == "call_module":
            self._module(node, self.modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            self._call(node)
        else:
            raise _unknown(str(node.target), f"a value of its own ({node.op})")

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name, of = str(node.target), node.args[0]
        for kinds, read in _MODULES:
            if isinstance(module, kinds):
                self.place[node] = read(self, name, self._at(of, name), module)
                return
        raise _unknown(name, type(module).__name__)

    def _call(self, node: fx.Node) -> None:
        target = node.target
        if target in (getattr, operator.getitem) or target == "size":
            return  # parts of a shape; whoever takes them looks where they come from
        if target in (F.relu, torch.relu, "relu"):
            self.place[node] = self._relu(node.name, self._at(node.args[0], node.name), None)
        elif target in (torch.flatten, "flatten", F.dropout):
            self.place[node] = self._at(node.args[0], node.name)
        elif target is torch.cat:
            self.place[node] = self._concat(node)
        elif target is F.interpolate:
            self.place[node] = self._upsample(node)
        elif target in (F.adaptive_avg_pool2d, pooled):
            at = self._at(node.args[0], node.name)
            self.place[node] = self._pool(node.name, at, node.args[1])
        else:
            raise _unknown(node.name, getattr(target, "__name__", str(target)))

    def _at(self, value: Any, name: str) -> int:
        if not isinstance(value, fx.Node) or value not in self.place:
            raise _unknown(name, "an input that is no map")
        return self.place[value]

    def _add(self, operation: Operation) -> int:
        for index in operation.inputs:
            self.users[index] = self.users.get(index, 0) + 1
        self.result.append(operation)
        return len(self.result) - 1

    def _conv(self, name: str, at: int, conv: nn.Conv2d) -> int:
        kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
        padding = (kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1])
        square = len(set(kernel)) == len(set(stride)) == len(set(dilation)) == 1
        if kernel[0] not in (1, 3) or not square or conv.padding not in (padding, "same"):
            raise _unknown(name, f"a convolution of {kernel}, padding {conv.padding}")
        if conv.padding_mode != "zeros":
            raise _unknown(name, f"padding_mode={conv.padding_mode!r}")
        return self._add(
            Operation(
                "conv",
                name,
                [at],
                weight=_array(conv.weight),
                bias=_bias(conv.bias, conv.out_channels),
                groups=conv.groups,
                stride=stride[0],
                dilation=dilation[0] if kernel[0] == 3 else 1,
            )
        )

    def _linear(self, name: str, at: int, linear: nn.Linear) -> int:
        before = self.result[at]
        if before.kind != "pool" or before.bins != 1:
            raise _unknown(name, "a linear layer that does not follow a mean over the map")
        return self._add(
            Operation(
                "conv",
                name,
                [at],
                weight=_array(linear.weight)[:, :, None, None],
                bias=_bias(linear.bias, linear.out_features),
            )
        )

    def _relu(self, name: str, at: int, _: Any) -> int:
        before = self.result[at]
        if before.kind != "conv" or at in self.users:
            raise _unknown(name, "a ReLU that does not directly follow a convolution")
        before.relu = True
        return at

    def _pool_module(self, name: str, at: int, pool: nn.AdaptiveAvgPool2d) -> int:
        return self._pool(name, at, pool.output_size)

    def _pool(self, name: str, at: int, size: Any) -> int:
        sides = set(size) if isinstance(size, tuple | list) else {size}
        if len(sides) != 1 or not isinstance(bins := sides.pop(), int):
            raise _unknown(name, f"a pooling to {size}")
        return self._add(Operation("pool", name, [at], bins=bins))

    def _same(self, name: str, at: int, module: nn.Module) -> int:
        if isinstance(module, nn.Flatten) and module.start_dim != 1:
            raise _unknown(name, f"flattening from dimension {module.start_dim}")
        return at

    def _concat(self, node: fx.Node) -> int:
        maps = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim not in (1, -3) or not isinstance(maps, list | tuple):
            raise _unknown(node.name, f"a concatenation along dimension {dim}")
        return self._add(Operation("concat", node.name, [self._at(m, node.name) for m in maps]))

    def _upsample(self, node: fx.Node) -> int:
        names = ("size", "scale_factor", "mode", "align_corners")
        options = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        like = _size_of(options.get("size"))
        if options.get("mode") != "bilinear" or like not in self.place:
            raise _unknown(node.name, "an upsampling that is not bilinear to the size of a map")
        inputs = [self._at(node.args[0], node.name), self.place[like]]
        corners = bool(options.get("align_corners"))
        return self._add(Operation("upsample", node.name, inputs, align_corners=corners))


_MODULES: list[tuple[Any, Callable[..., int]]] = [
    (nn.Conv2d, _Reader._conv),
    (nn.Linear, _Reader._linear),
    (nn.ReLU, _Reader._relu),
    (nn.AdaptiveAvgPool2d, _Reader._pool_module),
    ((nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d), _Reader._same),
]


def _size_of(size: Any) -> Any:
    """The map whose shape `size` is a part of: `x.shape[-2:]`, `x.shape[2:]`, `x.size()[2:]`."""
    if not isinstance(size, fx.Node) or size.target is not operator.getitem:
        return None
    shape, part = size.args
    if part not in (slice(-2, None, None), slice(2, None, None)) or not isinstance(shape, fx.Node):
        return None
    from_shape = shape.target is getattr and shape.args[1] == "shape"
    return shape.args[0] if from_shape or shape.target == "size" else None


def _array(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu().contiguous()


def _bias(bias: Tensor | None, channels: int) -> Tensor:
    return torch.zeros(channels) if bias is None else _array(bias)


def _unknown(name: str, found: str) -> InputError:
    hint = " (convert it with repvgg.reparameterize first)" if "Batch" in found else ""
    return InputError(
        f"layer {name}: the engine runs 3×3 and 1×1 convolutions with ReLU, pooling, a linear "
        f"head, bilinear upsampling and concatenation; found {found}{hint}"
    )
