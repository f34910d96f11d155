"""Memory of activations at inference (paper, Sect. 3.1 and Fig. 3): computed, and measured.

Counted is what the network makes of its images, not the images and the weights. Two peaks matter:
that *between* operations, which the paper draws (what must be kept until the next operation
begins), and that *during* them, which an allocator sees (an operation's inputs and its output
exist at once).
"""

import copy
import operator
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repvgg.errors import InputError


@dataclass(frozen=True)
class ActivationMemory:
    """Peaks in bytes.

    Attributes:
        between: of what is kept from one operation to the next.
        during: of what exists at once while an operation runs.
    """

    between: int
    during: int


def activation_memory(network: nn.Module, shape: tuple[int, ...]) -> ActivationMemory:
    """Computed from the graph, by the last use of each tensor; nothing is run.

    Views and in-place operations share the memory that they are made on.

    Args:
        network: in eval mode; not changed.
        shape: of the images, (N, C, H, W).

    Raises:
        InputError: a network whose graph cannot be traced.
    """
    dtype = next(network.parameters()).dtype
    try:
        root = _on_meta(network)
        graph = fx.GraphModule(root, _Tracer().trace(root))
    except Exception as error:  # tracing runs the user's code on proxies: anything can be raised
        raise InputError(f"the graph of {type(network).__name__} cannot be traced: {error}") from (
            error
        )
    tracker = _Storages(graph, garbage_collect_values=False)
    with torch.no_grad():
        tracker.run(torch.empty(shape, dtype=dtype, device="meta"))
    return tracker.peaks()


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy whose weights take no memory."""
    tensors = [*network.parameters(), *network.buffers()]
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), requires_grad=False)
        if isinstance(t, nn.Parameter)
        else t.to("meta")
        for t in tensors
    }
    return copy.deepcopy(network, memo)


class _Proxy(fx.Proxy):
    """Knows `+=`, of which torch.fx otherwise makes an addition that takes memory."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Storages(fx.Interpreter):
    """Runs a graph on the meta device and notes which storages each node reads and makes."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.owned: dict[fx.Node, set[int]] = {}
        self.bytes: dict[int, int] = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        storages = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.owned[n] = {storage._cdata for storage in storages}
        if n.op not in ("placeholder", "get_attr"):
            self.bytes |= {storage._cdata: storage.nbytes() for storage in storages}
        else:
            self.bytes |= {storage._cdata: 0 for storage in storages}
        return result

    def peaks(self) -> ActivationMemory:
        nodes = list(self.owned)
        last_use = {
            storage: index
            for index, node in enumerate(nodes)
            for used in (*node.all_input_nodes, node)
            for storage in self.owned[used]
        }
        live: set[int] = set()
        between = during = 0
        for index, node in enumerate(nodes):
            live |= self.owned[node]
            during = max(during, sum(self.bytes[storage] for storage in live))
            live = {storage for storage in live if last_use[storage] > index}
            between = max(between, sum(self.bytes[storage] for storage in live))
        return ActivationMemory(between, during)


def measured_memory(network: nn.Module, images: Tensor) -> int:
    """Peak in bytes of what exists at once while the network runs on these images.

    On a CUDA device the allocator says it, with its rounding and the workspaces of the
    convolutions; on a CPU every storage that an operation makes is counted until it is freed.

    Args:
        network: in eval mode, on the device of the images.
        images: (N, C, H, W).
    """
    with torch.inference_mode():
        if images.is_cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            network(images)
            return torch.cuda.max_memory_allocated() - before
        with _Allocations(images, network) as allocations:
            network(images)
        return allocations.peak


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are freed."""

    def __init__(self, images: Tensor, network: nn.Module):
        super().__init__()
        known = (images, *network.parameters(), *network.buffers())
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if (key := storage._cdata) in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count
