"""What a measured figure depends on besides the code: processor, versions, threads, date."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RUNTIME_LIBRARIES = ("onnxruntime", "openvino", "ncnn", "pnnx", "mnn")
LIBRARIES = ("torch", "torchvision", "timm", *RUNTIME_LIBRARIES)


def machine_facts() -> dict[str, Any]:
    """The header of a file of results."""
    facts = _processor()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": facts.get("model name") or platform.processor() or platform.machine(),
        "avx2": "avx2" in facts.get("flags", "").split(),
        "avx512": "avx512f" in facts.get("flags", "").split(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: found for name in LIBRARIES if (found := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, str]:
    """The first processor of Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
