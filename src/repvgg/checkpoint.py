"""Files of networks: one safe file that says all about a network, and weights of other origin."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.blocks import is_plain, trained_name
from repvgg.branches import MultiBranchBlock
from repvgg.errors import InputError
from repvgg.files import existing_file, written_aside
from repvgg.foreign import read_state_dict, to_our_names
from repvgg.model import RepVGG, create_model
from repvgg.reparam import convert, unwrapped

# Key of our description in the header of a safetensors file, and the version of its form.
METADATA_KEY = "repvgg"
FORMAT = 1


def save(model: nn.Module, path: str | Path) -> None:
    """Write weights, spec, class names and preprocessing into one safetensors file, atomically.

    Args:
        model: a `RepVGG` or `PSPNet`, training-time or plain, in any wrapper of torch's.
        path: what to write; its folder is made if need be.

    Raises:
        InputError: another model, or one that is no longer what its spec says, so that the file
            could not be loaded; or the file cannot be written.
    """
    network = unwrapped(model)
    architecture = next((k for k, c in _architectures().items() if type(network) is c), None)
    if architecture is None:
        raise InputError(f"save: a RepVGG is needed, found a {type(network).__name__}")
    config = {"architecture": architecture, **cast(RepVGG, network).config()}
    state, by_spec = network.state_dict(), _on_meta(config)
    _check_tensors(by_spec, state, "the model to save, against its own spec")
    _check_modules(by_spec, network)
    # Copies, since two names for one storage are refused, and since layout is not kept.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    description = json.dumps({"format": FORMAT, **config})
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata={METADATA_KEY: description})


def _check_modules(by_spec: nn.Module, network: nn.Module) -> None:
    """Raise unless a network computes what its spec says, since a file keeps no more than that."""
    needed, found = (dict(model.named_modules()) for model in (by_spec, network))
    for name in [*needed, *(found.keys() - needed.keys())]:
        expected, actual = _meaning(needed.get(name)), _meaning(found.get(name))
        if actual != expected:
            raise InputError(
                f"save: a file keeps weights and spec alone, by which {name} is {expected}; "
                f"found {actual}"
            )


def _meaning(module: nn.Module | None) -> str:
    """What a module computes, apart from its weights; alike for all forms of batch norm."""
    if module is None:
        return "not there"
    if isinstance(module, _BatchNorm):
        return f"batch norm, eps={module.eps}"
    if isinstance(module, nn.Conv2d | MultiBranchBlock):
        return f"{type(module).__name__}({module.extra_repr()})"
    return type(module).__name__


def load(path: str | Path) -> Any:
    """The network in a file of `save`, in eval mode, on the CPU, in the dtype it was saved in.

    Returns:
        A `RepVGG` or a `PSPNet`.

    Raises:
        InputError: no such file; one that is truncated or was not written by `save`; one whose
            tensors are not those of its spec.
    """
    path = existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            network = _on_meta(_description(file.metadata(), path))
            names = set(file.keys())
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in names}
            _check_names_and_shapes(network, shapes, str(path))
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from error
    _check_tensors(network, state, str(path))
    network.load_state_dict(state, assign=True)
    return network.eval()


def _architectures() -> dict[str, Any]:
    """Classes of networks that a file can hold, by the name that it has for them."""
    from repvgg.segmentation.pspnet import PSPNet  # which imports this module

    return {"repvgg": RepVGG, "pspnet": PSPNet}


def _on_meta(config: Mapping[str, Any]) -> Any:
    """A network without memory for its weights, from its `config()` or a file's claim of it."""
    fields = {**config}
    architecture = fields.pop("architecture", "repvgg")
    known = _architectures()
    if not isinstance(architecture, str) or architecture not in known:
        raise InputError(f"model: architecture one of {[*known]} needed, found {architecture!r}")
    with torch.device("meta"):
        return known[architecture].from_config(fields)


def _description(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise InputError(
            f"{path}: holds no spec, so `repvgg.save` did not write it; `repvgg.load_weights` "
            "reads weights alone into a model that you create"
        )
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its description is not JSON ({error})") from error
    if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
        raise InputError(f"{path}: a description of format {FORMAT} needed, found {text[:80]}")
    return description


# --- Weights of other origin ---------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_weights` found and did.

    Attributes:
        path: the file.
        naming: whose names its tensors had: "repvgg", "timm" or "authors".
        form: "train" or "plain", which network it holds.
        converted: a training-time network was folded to fill a plain model.
        head_note: why the linear layer was left untrained; empty if it was loaded.
    """

    path: Path
    naming: str
    form: str
    converted: bool
    head_note: str

    def __str__(self) -> str:
        text = f"{self.path}: {self.form} network in {self.naming} naming"
        text += ", folded on loading" if self.converted else ""
        return f"{text}; {self.head_note}" if self.head_note else text


def load_weights(model: RepVGG, path: str | Path) -> LoadedWeights:
    """Fill a model with the weights in a file: this package's, timm's or the authors'.

    Loading is strict and all or nothing. The linear layer alone may differ: with another number of
    classes the model keeps its own, and a warning says so. Into a plain model a training-time
    network is folded.

    Args:
        model: training-time or plain; keeps its device and dtype.
        path: a safetensors file, or a pickle of tensors alone.

    Raises:
        InputError: the file cannot be read or is of another network; the message has the names
            that are missing, not known, or of another shape.
    """
    loaded = _fill(model, path, *to_our_names(read_state_dict(path), path))
    if loaded.head_note:
        warnings.warn(f"{path}: {loaded.head_note}", stacklevel=2)
    return loaded


def load_features(model: RepVGG, path: str | Path) -> LoadedWeights:
    """`load_weights` for a network without classes: the linear layer of the file is left out."""
    return _fill(model, path, *to_our_names(read_state_dict(path), path))


def network_from_weights(model: str, path: str | Path) -> tuple[RepVGG, LoadedWeights]:
    """A network by its name, with the weights in a file that does not say what it is.

    Training-time or plain, and of so many classes and input channels, as the file is.

    Args:
        model: a name that `create_model` takes.
        path: see `load_weights`.

    Raises:
        InputError: see `load_weights`.
    """
    naming, state = to_our_names(read_state_dict(path), path)
    network = create_model(
        model,
        num_classes=len(state.get("classifier.weight", ())),
        in_chans=_input_channels(state, path),
        block="plain" if _form(state) == "plain" else "repvgg",
    )
    loaded = _fill(network, path, naming, state)
    return network.eval(), loaded


def _input_channels(state: Mapping[str, Tensor], path: str | Path) -> int:
    for name in ("stages.0.0.conv.weight", "stages.0.0.branches.conv3x3.conv.weight"):
        if name in state and state[name].dim() == 4:
            return state[name].shape[1]
    raise InputError(f"{path}: holds no kernel of a first convolution")


def _form(state: Mapping[str, Tensor]) -> str:
    return "train" if any(".branches." in name for name in state) else "plain"


def _fill(model: RepVGG, path: str | Path, naming: str, state: dict[str, Tensor]) -> LoadedWeights:
    """Load a state dict of our names into a model, folding it first if need be."""
    form = _form(state)
    if form == "plain" and not is_plain(model.block):
        raise InputError(
            f"{path}: holds a plain network, from which the branches cannot be had back; "
            "create the model with block='plain'"
        )
    block = model.block if form == "plain" else trained_name(model.block)
    network = _on_meta({**model.config(), "block": block})
    for name, tensor in network.state_dict().items():
        if name.endswith(".num_batches_tracked"):  # old files lack it, and inference needs it not
            state.setdefault(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
    head_note = _settle_head(state, model)
    _check_tensors(network, state, str(path))
    converted = form == "train" and is_plain(model.block)
    if converted:
        network.load_state_dict(state, assign=True)
        state = convert(network, fold_pairs=False).model.state_dict()
    model.load_state_dict(state)
    return LoadedWeights(Path(path), naming, form, converted, head_note)


def _settle_head(state: dict[str, Tensor], model: RepVGG) -> str:
    """Put the model's own linear layer in place of one that does not fit; say why."""
    names = ("classifier.weight", "classifier.bias")
    found = state["classifier.weight"].shape[0] if "classifier.weight" in state else 0
    if found == model.num_classes:
        return ""
    for name in names:
        state.pop(name, None)
    own = model.state_dict()
    state.update({name: own[name].cpu() for name in names if name in own})
    return f"the file has {found} classes, the model {model.num_classes}: " + (
        "its linear layer stays untrained" if model.num_classes else "no linear layer is used"
    )


def _check_names_and_shapes(
    network: nn.Module, shapes: Mapping[str, torch.Size], where: str
) -> None:
    """Raise unless the names and shapes are those of the network; say how they differ."""
    needed = network.state_dict()
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}"
        for kind, names in (
            ("missing", needed.keys() - shapes.keys()),
            ("not of this network", shapes.keys() - needed.keys()),
        )
        if names
    ]
    for name, tensor in needed.items():
        if name in shapes and shapes[name] != tensor.shape:
            problems.append(
                f"{name}: shape {tuple(tensor.shape)} needed, found {tuple(shapes[name])}"
            )
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"{where}: not these weights. {'; '.join(problems[:4])}{more}")


def _check_tensors(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """`_check_names_and_shapes`, and whether floating point stands where it must."""
    _check_names_and_shapes(network, {name: t.shape for name, t in state.items()}, where)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise InputError(
                f"{where}: {name} of a {tensor.dtype} needed, found {state[name].dtype}"
            )
