"""Peak memory of one forward, in a process of its own: `python -m sdan_fast.bench.memory '{...}'` prints bytes as JSON.

What a forward adds to the process, its output included: the high-water mark of resident memory over what was resident
before (Linux), or what PyTorch's allocator says on a GPU. A small call before it pays for what every call shares.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sdan_fast import use_backend
from sdan_fast.models.fitted import seeded_sdan

from .cases import DTYPES, LAYOUTS
from .plain import PlainSDAN


def peak(
    *,
    shape: list[int],
    model: dict[str, int],
    dtype: str = "float32",
    layout: str = "NCHW",
    ours: bool = True,
    backend: str = "auto",
    device: str = "cpu",
    threads: int = 0,
) -> int:
    """Bytes that one forward adds at its peak, in this process.

    Raises:
        OSError: where the system does not say (other than Linux).
    """
    if threads:
        torch.set_num_threads(threads)
    network: torch.nn.Module = seeded_sdan(**model)
    if not ours:
        network = PlainSDAN(network).eval()  # type: ignore[arg-type]
    network = network.to(device, DTYPES[dtype])
    network = network.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])
    x = x.contiguous(memory_format=LAYOUTS[layout])
    with torch.no_grad(), use_backend(backend):
        network(x[:1, :, :16, :16])
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            network(x)
            return torch.cuda.max_memory_allocated() - before
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _resident("VmRSS")
        network(x)
        return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_elsewhere(**settings: Any) -> int | None:
    """`peak` in a fresh process, or in this one on a GPU, whose allocator counts; None where it cannot be measured."""
    if settings.get("device") == "cuda":
        return peak(**settings)
    settings.setdefault("threads", torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(settings)], capture_output=True, text=True
    )
    try:
        return int(json.loads(done.stdout)["bytes"]) if done.returncode == 0 else None
    except (ValueError, KeyError):
        return None


if __name__ == "__main__":
    print(json.dumps({"bytes": peak(**json.loads(sys.argv[1]))}))
