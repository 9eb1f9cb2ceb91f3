"""What each kernel of SDAN's own calls takes on a GPU, beside the modelled time of docs/gpu-model.md.

    python benchmarks/gpu_kernels.py    # writes benchmarks/results/<gpu>-kernels.json

The calls are those of `sdan_fast.inspecting.workload` that are counted there. Every kernel is timed by the driver's own
trace (torch.profiler), with an L2 cache that holds nothing of the call: no launch overhead and no gaps are in it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

import gpu_check
from sdan_fast.bench import report
from sdan_fast.inspecting import triton_counts, workload
from sdan_fast.ops import OPS

BACKENDS = ("cuda", "triton")
ROUNDS = 11
FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU


def on_gpu(tree: Any) -> Any:
    """The same values there; strides stay."""
    return pytree.tree_map(lambda t: t.detach().cuda() if isinstance(t, torch.Tensor) else t, tree)


def calls(backend: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(case and pass, call) of everything that is counted and that the backend has kernels for."""
    for case in triton_counts.calls():
        op = OPS[case.op]
        if backend not in op.kernels:
            continue
        args, kwargs = on_gpu(case.make())
        yield f"{case.name} forward", functools.partial(op.overloads[backend], *args, **kwargs)
        if backend in op.backward_kernels:
            grad = torch.randn_like(op.overloads[backend](*args, **kwargs))
            run = functools.partial(op.backward_overloads[backend], grad, *args, **kwargs)
            for name, mask in zip(("backward", "backward of x"), workload.masks(case.op, args), strict=False):
                yield f"{case.name} {name}", functools.partial(run, output_mask=mask)


def kernels_of(call: Callable[[], Any], flush: torch.Tensor, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Name and median microseconds of every kernel of a call, in the order in which they run."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(rounds):
                flush.zero_()
                call()
            torch.cuda.synchronize()
    recorded = [
        (e.start_ns(), e.name(), e.duration_ns() / 1e3)
        for e in profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        if e.device_type() == torch.autograd.DeviceType.CUDA and e.duration_ns() > 0
    ]
    recorded.sort()
    flushing, least = recorded[0][1], recorded[0][2] / 2
    runs: list[list[tuple[str, float]]] = []
    for _, name, microseconds in recorded:
        if name == flushing and microseconds > least:
            runs.append([])
        else:
            runs[-1].append((name, microseconds))
    names = statistics.mode([tuple(name for name, _ in run) for run in runs])
    same = [run for run in runs if tuple(name for name, _ in run) == names]
    return [
        {"kernel": name, "us": statistics.median(run[i][1] for run in same)} for i, name in enumerate(names)
    ]


def main() -> int:
    """0 if every call ran, 1 if one did not or there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="calls whose names contain this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels: no GPU was found; nothing was measured", file=sys.stderr)
        return 1
    gpu = torch.cuda.get_device_name()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    rows: list[dict[str, Any]] = []
    failed = 0
    target = gpu_check.results_file(f"{gpu} kernels")
    head = report.header("cuda", " ".join(["gpu_kernels.py", *sys.argv[1:]]))
    for backend in BACKENDS:
        for name, call in calls(backend):
            if options.only not in name:
                continue
            try:
                found = kernels_of(call, flush)
            except Exception as error:
                print(f"{backend} {name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
                failed += 1
                continue
            rows.append({"backend": backend, "call": name, "kernels": found})
            total = sum(kernel["us"] for kernel in found)
            print(f"{backend:7}{name:72}{total:9.2f} us in {len(found)}", flush=True)
            report.write(target, {"gpu": gpu, **head, "cuda": torch.version.cuda, "rows": rows})
    print(f"written: {target.relative_to(gpu_check.ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
