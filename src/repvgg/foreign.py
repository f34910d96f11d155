"""Weight files of other origin: what they hold, and the names that their tensors have here.

Three namings are known: that of this package, timm's, and that of the paper's authors. A file is
read without running any code in it, and nothing in it is trusted.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repvgg.errors import InputError
from repvgg.files import existing_file

Replacement = str | Callable[[re.Match[str]], str]

# Of each naming: what betrays it, and the replacements that lead to the names of this package.
NAMINGS: dict[str, tuple[str, tuple[tuple[str, Replacement], ...]]] = {
    "authors": (
        r"\.rbr_(dense|1x1|identity|reparam)\.",
        (
            (r"^stage0\.", "stages.0.0."),
            (r"^stage(\d+)\.", r"stages.\1."),
            (r"\.rbr_dense\.", ".branches.conv3x3."),
            (r"\.rbr_1x1\.", ".branches.conv1x1."),
            (r"\.rbr_identity\.", ".branches.identity.bn."),
            (r"\.rbr_reparam\.", ".conv."),
            (r"^linear\.", "classifier."),
        ),
    ),
    "timm": (
        r"\.(conv_kxk|reparam_conv)\.",
        (
            (r"^stages\.(\d+)\.", lambda match: f"stages.{int(match[1]) + 1}."),
            (r"^stem\.", "stages.0.0."),
            (r"\.conv_kxk\.", ".branches.conv3x3."),
            (r"\.conv_1x1\.", ".branches.conv1x1."),
            (r"\.identity\.", ".branches.identity.bn."),
            (r"\.reparam_conv\.", ".conv."),
            (r"^head\.fc\.", "classifier."),
        ),
    ),
    "repvgg": (r"^stages\.0\.0\.(branches\.|conv\.)", ()),
}

# Where training scripts put the weights in a larger checkpoint, and what wrappers put before names.
WRAPPING_KEYS = ("state_dict", "model")
WRAPPING_PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle written by `torch.save`, by their names.

    A pickle is read with `weights_only=True` alone. Wrapping keys and prefixes are taken off.

    Raises:
        InputError: no such file; one that is truncated, needs code to be run, or holds no tensors.
    """
    path = existing_file(path)
    loaded = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    for _ in WRAPPING_KEYS:
        loaded = next((loaded[k] for k in WRAPPING_KEYS if _is_mapping(loaded.get(k))), loaded)
    state = {_without_prefixes(str(name)): tensor for name, tensor in loaded.items()}
    if not state:
        raise InputError(f"{path}: a mapping of names to tensors is needed, found an empty one")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or tensor.is_sparse:
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, not a dense tensor")
    return state


def to_our_names(state: Mapping[str, Tensor], path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The naming of a state dict, a key of `NAMINGS`, and the state dict under our names.

    Raises:
        InputError: none of the known namings; the message has the first names found.
    """
    for naming, (mark, replacements) in NAMINGS.items():
        if any(re.search(mark, name) for name in state):
            return naming, {_replaced(name, replacements): t for name, t in state.items()}
    raise InputError(
        f"{path}: the tensor names of a RepVGG (this package's, timm's or the authors') are "
        f"needed, found {', '.join(list(state)[:3])} …"
    )


def _replaced(name: str, replacements: tuple[tuple[str, Replacement], ...]) -> str:
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name


def _without_prefixes(name: str) -> str:
    while prefix := next((p for p in WRAPPING_PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_safetensors(path: Path) -> bool:
    """By content, since pickles often bear any ending: a length of 8 bytes, then JSON."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    _refuse_compression(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{path}: cannot be read as tensors alone, which is needed since anything more could "
            f"run code; it is damaged or no weight file ({reason[0] if reason else repr(error)})"
        ) from error
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{path}: a mapping of names to tensors is needed, found a {type(loaded).__name__}"
        )
    return loaded


def _refuse_compression(path: Path) -> None:
    """`torch.save` never compresses; a compressed archive could unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError(f"{path}: a compressed archive, which no weight file is")
