"""Ways to run a network: PyTorch, compiled PyTorch, ONNX Runtime, OpenVINO.

Each takes a network and a batch of images, and gives a call that computes the logits. All that a
runtime does once (export, compilation, its own layout of the weights) is done before.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.errors import InputError
from repvgg.export.onnx import export_onnx
from repvgg.protocol import Protocol, Runtime

Runner = Callable[[], Tensor]

# What must be installed for each runtime, and the extra of this package that has it.
MODULES: dict[Runtime, tuple[str, ...]] = {
    "torch": (),
    "compile": (),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


def torch_device(protocol: Protocol) -> torch.device:
    """Where the networks run.

    Raises:
        InputError: `cuda` where there is none.
    """
    has_gpu = torch.cuda.is_available()
    if protocol.device == "cuda" and not has_gpu:
        raise InputError("device: a CUDA device is needed, found none")
    is_gpu = has_gpu and protocol.device != "cpu" and protocol.runtime in ("torch", "compile")
    return torch.device("cuda" if is_gpu else "cpu")


def dtype_of(protocol: Protocol) -> torch.dtype:
    """Of weights and images."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(protocol.precision, torch.float32)


def installed_runtimes() -> list[Runtime]:
    """Those of which everything is installed."""
    return [name for name, modules in MODULES.items() if all(map(find_spec, modules))]


def prepare(network: nn.Module, images: Tensor, protocol: Protocol) -> Runner:
    """A call that computes the logits of these images, (N, classes).

    Args:
        network: in eval mode; it is copied, not changed.
        images: (N, C, H, W) fp32.
        protocol: how to run it; the batch is that of the images. PyTorch's own number of threads
            and its GPU settings become what it says.

    Raises:
        InputError: the runtime is not installed, or there is no such device.
    """
    missing = [name for name in MODULES[protocol.runtime] if find_spec(name) is None]
    if missing:
        raise InputError(
            f"runtime {protocol.runtime}: {', '.join(missing)} needed, found not installed; "
            "pip install 'repvgg[runtimes]'"
        )
    threads = protocol.threads or torch.get_num_threads()
    if protocol.runtime in ("torch", "compile"):
        return _torch(network, images, protocol)
    return OTHERS[protocol.runtime](network, images, threads)


def _torch(network: nn.Module, images: Tensor, protocol: Protocol) -> Runner:
    last = protocol.layout == "channels-last"
    layout = torch.channels_last if last else torch.contiguous_format
    device, dtype = torch_device(protocol), dtype_of(protocol)
    network = copy.deepcopy(network).to(device, dtype).to(memory_format=layout)  # pyright: ignore
    x = images.to(device, dtype).contiguous(memory_format=layout)
    run: Any = torch.compile(network) if protocol.runtime == "compile" else network

    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = protocol.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = protocol.precision == "tf32"
        torch.backends.cudnn.benchmark = True
    elif protocol.threads:
        torch.set_num_threads(protocol.threads)

    def runner() -> Tensor:
        with torch.inference_mode():
            return run(x)

    return runner


def _onnxruntime(network: nn.Module, images: Tensor, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with _as_onnx(network, images) as path:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(network: nn.Module, images: Tensor, threads: int) -> Runner:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else half precision, where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    with _as_onnx(network, images) as path:
        model = core.read_model(path)
        model.reshape(list(images.shape))
        compiled = core.compile_model(model, "CPU", settings)
    request, array = compiled.create_infer_request(), images.numpy()
    return lambda: torch.from_numpy(request.infer([array], share_inputs=True)[0])


@contextlib.contextmanager
def _as_onnx(network: nn.Module, images: Tensor) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(network, path, images[:1])
        yield path


OTHERS: dict[Runtime, Callable[[nn.Module, Tensor, int], Runner]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
