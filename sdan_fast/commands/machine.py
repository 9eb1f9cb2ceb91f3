"""What this machine is and which versions run on it, for `info`, `demo` and result files."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sdan_fast
from sdan_fast import backends

_PACKAGES = (
    *("torch", "triton", "numpy", "safetensors", "typer", "rich", "pillow", "scikit-image"),
    *("onnx", "onnxruntime", "openvino"),
)


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """The versions of this package, of Python and of what it uses; None for what is not installed."""
    found: dict[str, str | None] = {"sdan_fast": sdan_fast.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of every GPU that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def describe() -> dict[str, Any]:
    """Processor, instruction set, threads and GPUs."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernel_instruction_set": backends.kernel_instruction_set(),
        "kernel_instruction_set_cap": os.environ.get("SDAN_FAST_CPU_ISA"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with a plus if files differ from it; None outside git."""
    git = ["git", "-C", str(Path(sdan_fast.__file__).parent.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if status.stdout.strip() else "")


def build_record() -> dict[str, Any] | None:
    """What setup.py wrote about the extensions that it built; None where it never ran."""
    path = Path(sdan_fast.__file__).with_name("_build_info.json")
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
