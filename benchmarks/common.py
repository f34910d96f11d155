"""What every benchmark shares: the header of its results."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "torchvision", "Pillow")


def header() -> dict[str, Any]:
    """What a result depends on besides the code: processor, versions, threads, date."""
    facts = _processor()
    return {
        "machine": facts.get("model name") or platform.processor() or platform.machine(),
        "avx2": "avx2" in facts.get("flags", "").split(),
        "avx512": "avx512f" in facts.get("flags", "").split(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def _processor() -> dict[str, str]:
    """The first processor of Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
