"""Plain networks as ONNX, the exchange file that most runtimes read."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from repvgg.errors import InputError
from repvgg.files import existing_file, written_aside
from repvgg.model import RepVGG
from repvgg.reparam import convert
from repvgg.segmentation.pspnet import PSPNet
from repvgg.verification import at_inference


def require(*modules: str) -> None:
    """Raise unless these optional modules can be imported.

    Raises:
        InputError: with the command that installs them.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise InputError(
            f"{', '.join(missing)} needed, found not installed; pip install 'repvgg[export]'"
        )


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image: Tensor | None = None,
    *,
    dynamic_size: bool = False,
) -> None:
    """Write a model as ONNX: input `images` (N, C, H, W), output `logits`; N may vary.

    Multi-branch blocks are folded first. The weights are in the file itself, which is written
    atomically.

    Args:
        model: any module that takes one tensor.
        path: the `.onnx` file to write.
        image: (1, C, H, W), an example; by default what a network of this package is prepared for.
        dynamic_size: whether H and W may vary too, as a `PSPNet` can take them.

    Raises:
        InputError: onnx is not installed, blocks that cannot be folded, no example.
    """
    require("onnx", "onnxscript")
    conversion = convert(model)
    if conversion.remaining:
        warnings.warn(f"exported with {conversion}", stacklevel=2)
    plain = conversion.model
    if image is None:
        if not isinstance(plain, RepVGG | PSPNet):
            raise InputError("export_onnx: `image`, an example (1, C, H, W), is needed")
        size = plain.preprocessing.size
        image = next(plain.parameters()).new_zeros(1, plain.in_chans, size, size)
    # Two images, since the exporter takes an extent of 1 to be fixed.
    example = image.expand(2, *image.shape[1:]).contiguous()
    dynamic = {0: torch.export.Dim("batch")}
    if dynamic_size:
        dynamic |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with written_aside(path) as aside, at_inference(plain), _quiet():
        torch.onnx.export(
            plain,
            (example,),
            str(aside),
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(dynamic,),
        )


def run_onnx(path: str | Path, images: Tensor) -> Tensor:
    """What onnxruntime computes on the CPU from a file of `export_onnx`.

    Args:
        path: the `.onnx` file.
        images: (N, C, H, W).

    Raises:
        InputError: onnxruntime is not installed, or the file is no ONNX model.
    """
    require("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(
            existing_file(path), providers=["CPUExecutionProvider"]
        )
    except InputError:
        raise
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise InputError(f"{path}: not a usable ONNX model ({error})") from error
    (logits,) = session.run(None, {"images": images.cpu().numpy()})
    return torch.from_numpy(logits)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own chatter and deprecation warnings, none of them about our model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere):
            yield
    logger.setLevel(level)
