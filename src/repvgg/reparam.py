"""Conversion of a whole model (paper, Sect. 3.3; for the baselines, Sect. 4.1).

Every multi-branch block, wherever it sits in a model, becomes a convolution and its activation,
and every convolution that feeds nothing but a batch norm takes that batch norm in. The result is
a new module; the model that was given is only read.
"""

import copy
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from repvgg.branches import MultiBranchBlock
from repvgg.errors import InputError
from repvgg.fold import fold_conv_and_norm
from repvgg.plain import plain_conv

if TYPE_CHECKING:
    from repvgg.model import RepVGG
    from repvgg.segmentation.pspnet import PSPNet


@dataclass(frozen=True)
class Conversion:
    """A converted model, and what was done to get it. Names are those of `named_modules()`.

    Attributes:
        model: the plain model, in eval mode.
        blocks: multi-branch blocks that were folded.
        pairs: (convolution, batch norm) that were folded.
        remaining: module name → class, of batch norms and of other packages' multi-branch blocks
            that could not be folded.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    remaining: dict[str, str]

    def __str__(self) -> str:
        text = f"{len(self.blocks)} blocks and {len(self.pairs)} conv-BN pairs folded"
        if not self.remaining:
            return f"{text}; nothing remains to fold"
        names = [f"{name} ({kind})" for name, kind in self.remaining.items()]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"{text}; not folded: {', '.join(names[:8])}{more}"


@overload
def reparameterize(model: "RepVGG") -> "RepVGG": ...
@overload
def reparameterize(model: "PSPNet") -> "PSPNet": ...
@overload
def reparameterize(model: nn.Module) -> nn.Module: ...
def reparameterize(model: nn.Module) -> nn.Module:
    """The plain model that `model` is equal to at inference; `convert` also says what it did.

    Args:
        model: any module that holds multi-branch blocks, alone, nested or shared, in train or eval
            mode, inside `DistributedDataParallel` or `torch.compile` wrappers, of any float dtype.
            It is not changed.

    Returns:
        A new module in eval mode, on the same device and of the same dtype, without wrappers.

    Raises:
        InputError: a block that is not linear at inference.
    """
    return convert(model).model


def convert(model: nn.Module, *, fold_pairs: bool = True) -> Conversion:
    """`reparameterize`, with an account of what was folded and what was not.

    Args:
        model: see `reparameterize`.
        fold_pairs: also fold batch norms into the convolutions before them.

    Raises:
        InputError: a block that is not linear at inference.
    """
    model = unwrapped(model)
    # `deepcopy` takes what its memo holds in place of a copy, so a shared block stays shared, and
    # the weights of the blocks are never copied.
    memo: dict[int, Any] = {}
    plain_blocks = set()
    for name, module in model.named_modules():
        if isinstance(module, MultiBranchBlock):
            memo[id(module)] = _plain_of(module, name, memo)
            plain_blocks.add(memo[id(module)])
    for module in reversed(list(model.modules())):  # inner wrappers before outer ones
        if (inner := _wrapped_module(module)) is not None:
            memo[id(module)] = copy.deepcopy(inner, memo)
    plain = copy.deepcopy(model, memo).eval()
    for module in list(plain.modules()):
        if (became_plain := getattr(module, "became_plain", None)) is not None:
            became_plain()  # networks of this package say what they are
    return Conversion(
        plain,
        blocks=tuple(name for name, module in plain.named_modules() if module in plain_blocks),
        pairs=tuple(_fold_pairs(plain)) if fold_pairs else (),
        remaining=_remaining(plain),
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all of torch's wrappers around it."""
    while (inner := _wrapped_module(model)) is not None:
        model = inner
    return model


def _wrapped_module(module: nn.Module) -> nn.Module | None:
    """The model inside a wrapper of torch's, or None if this is no wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return module.module
    return getattr(module, "_orig_mod", None)  # torch.compile


def _plain_of(block: MultiBranchBlock, name: str, memo: dict[int, Any]) -> nn.Sequential:
    """The convolution and activation that a block is equal to."""
    try:
        if type(block).forward is not MultiBranchBlock.forward:
            raise InputError(f"{type(block).__name__} has a `forward` of its own")
        kernel, bias = block.equivalent()
    except InputError as error:
        raise InputError(
            f"block {name or '(the model itself)'} cannot be folded: {error}"
        ) from None
    with torch.device("meta"):  # no memory, and no draw from the random generator
        conv = plain_conv(block.layer)
    # A block may have no parameters: that of an identity alone.
    usual = kernel.new_empty(0, dtype=torch.get_default_dtype())
    _set_weights(conv, kernel, bias, like=next(block.parameters(), usual))
    activation = copy.deepcopy(block.activation, memo)
    parts = OrderedDict[str, nn.Module](conv=conv)
    if not isinstance(activation, nn.Identity):
        parts["relu" if isinstance(activation, nn.ReLU) else "activation"] = activation
    plain = nn.Sequential(parts)
    for hooks in HOOKS:  # what they see of the block, its input and output, is the same here
        setattr(plain, hooks, copy.deepcopy(getattr(block, hooks), memo))
    return plain


HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _set_weights(conv: nn.Module, kernel: Tensor, bias: Tensor, *, like: Tensor) -> None:
    """Give a convolution these fp64 weights, in the dtype and on the device of `like`."""
    for name, value in (("weight", kernel), ("bias", bias)):
        value = value.detach().to(like.device, like.dtype).contiguous()
        setattr(conv, name, nn.Parameter(value, requires_grad=like.requires_grad))


# --- Conv-BN pairs -------------------------------------------------------------------------------


class _PairTracer(fx.Tracer):
    """Records the calls of modules.

    It does not look into convolutions, batch norms, and modules with hooks: those hooks may change
    what goes in or out, and must not see the tracer's proxies.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_leaf = isinstance(m, CONVS) or _is_norm(m) or _is_observed(m)
        return is_leaf or super().is_leaf_module(m, module_qualified_name)


def _fold_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Fold, in place, each batch norm whose input is a convolution's output used nowhere else."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    shared = {
        id(parameter)
        for parameter, count in Counter(
            p for module in model.modules() for p in module._parameters.values() if p is not None
        ).items()
        if count > 1
    }
    folded = []
    for conv_name, norm_name in _adjacent_pairs(model, ""):
        conv = cast(nn.Conv2d, model.get_submodule(conv_name))
        norm = cast(Any, model.get_submodule(norm_name))
        follower = _after_folding(norm)
        if follower is None or uses[id(conv)] > 1 or uses[id(norm)] > 1:
            continue
        if _is_observed(conv) or _is_observed(norm) or id(conv.weight) in shared:
            continue
        kernel, bias = fold_conv_and_norm(conv, norm)
        _set_weights(conv, kernel, bias, like=conv.weight)
        parent, _, attribute = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, follower)
        folded.append((conv_name, norm_name))
    return folded


def _adjacent_pairs(module: nn.Module, prefix: str) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) in a row, by the data flow that torch.fx finds.

    A module whose code cannot be traced is left, and each of its children is tried; so is each
    module that the tracer does not look into.
    """
    if next(module.children(), None) is None:
        return []
    try:
        graph = _PairTracer().trace(module)
    except Exception:  # tracing runs the user's code on proxies: anything can be raised
        return [
            pair
            for name, child in module.named_children()
            for pair in _adjacent_pairs(child, f"{prefix}{name}.")
        ]
    called = {node: str(node.target) for node in graph.nodes if node.op == "call_module"}
    calls = Counter(called.values())
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = [
        pair
        for name in calls
        for pair in _adjacent_pairs(module.get_submodule(name), f"{prefix}{name}.")
    ]
    for norm_node, norm in called.items():
        conv_node = norm_node.args[0] if norm_node.args else None
        if not isinstance(conv_node, fx.Node) or conv_node not in called:
            continue
        conv = called[conv_node]
        if (
            _is_norm(module.get_submodule(norm))
            and _is_conv(module.get_submodule(conv))
            and len(conv_node.users) == 1
            and calls[conv] == calls[norm] == 1
            and not {conv, norm} & read  # their weights are not used elsewhere
        ):
            pairs.append((prefix + conv, prefix + norm))
    return pairs


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_conv(module: nn.Module) -> bool:
    """Whether this is linear in its weight; many a subclass, as timm's StdConv2d, is not."""
    forwards = [conv.forward for conv in CONVS]
    return isinstance(module, CONVS) and (
        type(module).forward in forwards or type(module).__name__ == "Conv2dSame"  # timm's
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether this is a batch norm, foldable or not."""
    return isinstance(module, _BatchNorm) or type(module).__name__ in (
        "FrozenBatchNorm2d",  # torchvision's
        "FrozenBatchNormAct2d",  # timm's
    )


def _is_observed(module: nn.Module) -> bool:
    """Whether hooks would see other values after folding, or a parametrization makes the weight."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations")
    )


def _after_folding(norm: Any) -> nn.Module | None:
    """What stays of a batch norm, or None if it cannot be folded."""
    if norm.running_mean is None:
        return None
    kind = type(norm).__name__
    if kind in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"):
        return nn.Sequential(norm.drop, norm.act).eval()  # timm's: norm, drop, act
    forwards = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if kind == "FrozenBatchNorm2d" or type(norm).forward in forwards:
        return nn.Identity().eval()
    return None


def _remaining(model: nn.Module) -> dict[str, str]:
    """Batch norms, and blocks of other packages that say they can be folded but were not."""
    remaining = {}
    for name, module in model.named_modules():
        foreign = any(callable(getattr(module, method, None)) for method in FOREIGN_METHODS)
        is_folded = any(getattr(module, conv, None) is not None for conv in FOREIGN_FOLDED_CONVS)
        if _is_norm(module) or (foreign and not is_folded):
            remaining[name or "(the model itself)"] = type(module).__name__
    return remaining


# The methods by which timm's and the authors' blocks fold themselves, and what they make then.
FOREIGN_METHODS = ("reparameterize", "switch_to_deploy")
FOREIGN_FOLDED_CONVS = ("reparam_conv", "rbr_reparam", "conv_reparam")
