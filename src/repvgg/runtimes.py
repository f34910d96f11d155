"""Ways to run a network: PyTorch, compiled PyTorch, ONNX Runtime, OpenVINO, ncnn, MNN, and our own.

Each takes a network and a batch of images, and gives a call that computes the logits. All that a
runtime does once (export, compilation, its own layout of the weights) is done before.
"""

import contextlib
import copy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import repvgg
from repvgg.errors import InputError
from repvgg.export.onnx import export_onnx
from repvgg.protocol import Protocol, Runtime

Runner = Callable[[], Tensor]


class UnsupportedError(InputError):
    """A network that a runtime cannot run, where it can run others."""


# What must be installed for each runtime, and the extra of this package that has it.
MODULES: dict[Runtime, tuple[str, ...]] = {
    "torch": (),
    "compile": (),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "ncnn": ("onnx", "onnxscript", "ncnn", "pnnx"),
    "mnn": ("onnx", "onnxscript", "MNN"),
    "native": ("repvgg._native",),
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


def prepare(
    network: nn.Module, images: Tensor, protocol: Protocol, onnx: Path | None = None
) -> Runner:
    """A call that computes the logits of these images, (N, classes).

    Args:
        network: in eval mode; it is copied, not changed.
        images: (N, C, H, W) fp32.
        protocol: how to run it; the batch is that of the images. PyTorch's own number of threads
            and its GPU settings become what it says.
        onnx: the network as `export_onnx` wrote it, if that is there already; it takes seconds.

    Raises:
        InputError: the runtime is not installed, or there is no such device.
        UnsupportedError: it cannot run this network.
    """
    missing = [name for name in MODULES[protocol.runtime] if find_spec(name) is None]
    if missing and protocol.runtime != "native":  # which says itself what it lacks
        raise InputError(
            f"runtime {protocol.runtime}: {', '.join(missing)} needed, found not installed; "
            "pip install 'repvgg[runtimes]'"
        )
    threads = protocol.threads or torch.get_num_threads()
    if protocol.runtime == "native":
        return _native(network, images, threads)
    if not needs_onnx(protocol.runtime):
        return _torch(network, images, protocol)
    start = OTHERS[protocol.runtime]
    if onnx is not None:
        return start(onnx, images, threads)
    with as_onnx(network, images) as path:
        return start(path, images, threads)


def needs_onnx(runtime: Runtime) -> bool:
    """Whether a network goes there as ONNX."""
    return runtime in OTHERS


@contextlib.contextmanager
def as_onnx(network: nn.Module, images: Tensor) -> Iterator[Path]:
    """A network in a temporary file; of the images the first is the example."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(network, path, images[:1])
        yield path


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


def _native(network: nn.Module, images: Tensor, threads: int) -> Runner:
    try:
        engine = repvgg.compile(network, threads=threads)
    except InputError as error:
        raise UnsupportedError(f"runtime native: {error}") from None
    return lambda: engine(images)


def _onnxruntime(onnx: Path, images: Tensor, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(onnx: Path, images: Tensor, threads: int) -> Runner:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else half precision, where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    model = core.read_model(onnx)
    model.reshape(list(images.shape))
    compiled = core.compile_model(model, "CPU", settings)
    request, array = compiled.create_infer_request(), images.numpy()
    return lambda: torch.from_numpy(request.infer([array], share_inputs=True)[0])


def _ncnn(onnx: Path, images: Tensor, threads: int) -> Runner:
    ncnn: Any = import_module("ncnn")  # without types
    network = ncnn.Net()
    options = network.opt
    options.num_threads, options.use_vulkan_compute = threads, False
    # By default weights are kept in half precision, and on some processors computed with.
    options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
    options.use_bf16_packed = options.use_bf16_storage = False
    (package,) = cast(Any, find_spec("pnnx")).submodule_search_locations
    shape = ",".join(map(str, (1, *images.shape[1:])))
    with tempfile.TemporaryDirectory() as folder:
        source = shutil.copyfile(onnx, f"{folder}/network.onnx")  # it writes beside what it reads
        graph, weights = Path(f"{folder}/network.ncnn.param"), Path(f"{folder}/network.ncnn.bin")
        command = [f"{package}/pnnx", source, f"inputshape=[{shape}]", "fp16=0"]
        _convert("ncnn", command, weights)
        if network.load_param(str(graph)) or network.load_model(str(weights)):
            raise UnsupportedError("runtime ncnn: it does not know all operations of this network")
    # A `Mat` of an array is a view that does not keep the array alive.
    inputs = [ncnn.Mat(image).clone() for image in images.numpy()]

    def runner() -> Tensor:
        results = []
        for image in inputs:  # ncnn has no axis for them
            extractor = network.create_extractor()
            extractor.input("in0", image)
            results.append(np.array(extractor.extract("out0")[1]))
        return torch.from_numpy(np.stack(results))

    return runner


def _mnn(onnx: Path, images: Tensor, threads: int) -> Runner:
    # Without types; and `nn` is PyTorch's here.
    mnn, expr = (cast(Any, import_module(f"MNN.{name}")) for name in ("nn", "expr"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "network.mnn"
        # Its own command would install a package and report to a server.
        script = "import sys; from _tools import mnnconvert; mnnconvert(sys.argv)"
        files = ["--modelFile", str(onnx.resolve()), "--MNNModel", str(target)]
        command = [sys.executable, "-c", script, "-f", "ONNX", *files, "--bizCode", "repvgg"]
        _convert("mnn", command, target)
        # The argument `thread_num` of the loader takes two threads where one is asked for.
        settings = {"backend": "CPU", "precision": "high", "numThread": threads}
        manager = mnn.create_runtime_manager((settings,))
        network = mnn.load_module_from_file(
            str(target), ["images"], ["logits"], runtime_manager=manager
        )
    inputs = expr.const(images.numpy(), list(images.shape), expr.NCHW)
    return lambda: torch.from_numpy(np.array(network.forward(inputs).read()))


def _convert(runtime: Runtime, command: Sequence[str], result: Path) -> None:
    """Run a converter, which leaves a file; some end with exit code 0 and none."""
    done = subprocess.run(
        command, cwd=result.parent, capture_output=True, text=True, errors="replace"
    )
    if done.returncode or not result.exists():
        said = f"{done.stdout}\n{done.stderr}".strip().splitlines()[-1:]
        raise UnsupportedError(
            f"runtime {runtime}: its converter cannot read this network, and ended with exit code "
            f"{done.returncode}" + "".join(f" ({line[:200]})" for line in said)
        )


OTHERS: dict[Runtime, Callable[[Path, Tensor, int], Runner]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ncnn": _ncnn,
    "mnn": _mnn,
}
