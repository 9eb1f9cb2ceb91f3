"""Everything that only a GPU can show, in one run: tests, compute-sanitizer, and times, written as JSON named after it.

    python benchmarks/gpu_check.py                # all of it; exit status 1 if anything fails or there is no GPU
    python benchmarks/gpu_check.py --only bench   # one of tests, sanitizer, bench; writes nothing
    python benchmarks/gpu_check.py --rehearse     # the benchmark's own code on the CPU, tiny, writing nothing

A kernel is held against the float64 reference right before it is timed, and a wrong one gets no time. The times of
eager PyTorch, torch.clone and the kernels are taken in turn (A B C A B C ...), with the L2 cache flushed before each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdan_fast
from sdan_fast import functional as F
from sdan_fast import reference
from sdan_fast.commands import machine
from sdan_fast.commands.check import agreement

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
GPU_BACKENDS = ("triton", "cuda")


# --- what is measured ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """One op as it is measured.

    make: arguments (all tensors) for an image shape (N, C, H, W). run: the op through the package. plain: the same in
    plain PyTorch. forward_tensors, backward_tensors: how many image-sized tensors each must move at least.
    """

    name: str
    make: Callable[[Callable[..., Tensor], tuple[int, int, int, int]], list[Tensor]]
    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    forward_tensors: int
    backward_tensors: int


# A row for each op that has GPU kernels.
SUBJECTS = (Subject("star", lambda draw, shape: [draw(*shape), draw(*shape)], F.star, reference.star, 3, 5),)
# SDAN's own size, a large image, and one whose rows start at odd addresses.
SHAPES = ((8, 56, 180, 320), (1, 56, 720, 1280), (4, 28, 341, 511))
REHEARSAL_SHAPES = ((1, 4, 7, 9),)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(
    subject: Subject, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, device: str
) -> list[Tensor]:
    """The tensors of one case: the same numbers on every machine, in one memory layout."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator, dtype=torch.float32).to(device, dtype)
        return (
            x.contiguous(memory_format=torch.channels_last)
            if layout == "channels_last" and x.dim() == 4
            else x
        )

    return subject.make(draw, shape)


def gradients(run: Callable[..., Tensor], args: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in args]
    return torch.autograd.grad(run(*leaves), leaves, grad)


def is_right(subject: Subject, args: Sequence[Tensor], backend: str) -> tuple[bool, float]:
    """Whether forward and backward keep the project's error bound, and the largest share of it that was used."""
    grad = torch.randn_like(args[0])
    with sdan_fast.use_backend(backend):
        got = [subject.run(*args), *gradients(subject.run, args, grad)]
    eager = [subject.plain(*args), *gradients(subject.plain, args, grad)]
    wide = [x.double() for x in args]
    exact = [subject.plain(*wide), *gradients(subject.plain, wide, grad.double())]
    found = [agreement(g, e, x) for g, e, x in zip(got, eager, exact, strict=True)]
    return all(one.ok for one in found), max(one.share for one in found)


# --- the clock -----------------------------------------------------------------------------------------------


class Clock:
    """Times single calls on one device: with events and a flushed L2 cache on a GPU, by the wall on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        # Larger than the L2 cache of any GPU. Writing it also keeps the GPU busy while the host queues the call, so
        # that what is timed is the kernel and not the launch.
        self.flush = torch.empty(2**28 if self.cuda else 2**10, dtype=torch.int8, device=device)

    def milliseconds(self, function: Callable[[], object]) -> float:
        self.flush.zero_()
        if not self.cuda:
            began = time.perf_counter()
            function()
            return (time.perf_counter() - began) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, each the value of a run that took place."""
    ordered = sorted(values)
    return {f"p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 50, 80)}


def in_turn(
    clock: Clock, functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 5
) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds of functions that are called A B C A B C ..."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            elapsed = clock.milliseconds(function)
            if number >= warmup:
                times[name].append(elapsed)
    return {name: percentiles(values) for name, values in times.items()}


def backward_call(run: Callable[..., Tensor], args: Sequence[Tensor], backend: str) -> Callable[[], object]:
    """A function that runs the backward of one recorded call, as often as it is called."""
    leaves = [x.detach().requires_grad_() for x in args]
    with sdan_fast.use_backend(backend):
        y = run(*leaves)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def forward_call(run: Callable[..., Tensor], args: Sequence[Tensor], backend: str) -> Callable[[], object]:
    def call() -> object:
        with sdan_fast.use_backend(backend), torch.no_grad():
            return run(*args)

    return call


def measure(
    subject: Subject, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str,
    *, device: str, backends: Sequence[str], clock: Clock, rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One case: verify every backend, then time the right ones against eager and clone, forward and backward."""
    args = arguments(subject, shape, dtype, layout, device)
    case = {
        "op": subject.name,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
    }
    rows: list[dict[str, Any]] = []
    right: list[str] = []
    for backend in backends:
        refusal = sdan_fast.explain(subject.name, *args).reasons.get(backend)
        if refusal is not None and "comes first" not in refusal:
            rows.append({**case, "backend": backend, "refused": refusal})
            continue
        ok, share = is_right(subject, args, backend)
        if ok:
            right.append(backend)
        else:
            rows.append({**case, "backend": backend, "wrong": True, "share_of_error_bound": share})
    size = args[0].numel() * args[0].element_size()
    for direction, tensors in (("forward", subject.forward_tensors), ("backward", subject.backward_tensors)):
        call = forward_call if direction == "forward" else backward_call
        functions = {"clone": lambda: args[0].clone(), "eager": call(subject.plain, args, "reference")}
        functions |= {backend: call(subject.run, args, backend) for backend in right}
        times = in_turn(clock, functions, rounds)
        bandwidth = {name: tensors * size / (t["p50"] * 1e-3) for name, t in times.items()}
        bandwidth["clone"] = 2 * size / (times["clone"]["p50"] * 1e-3)
        for name in ("eager", *right):
            rows.append({
                **case, "direction": direction, "backend": name, "ms": times[name], "clone_ms": times["clone"],
                "compulsory_bytes": tensors * size,
                "share_of_clone_bandwidth": bandwidth[name] / bandwidth["clone"],
                "speedup_over_eager": times["eager"]["p50"] / times[name]["p50"],
            })  # fmt: skip
    return rows


def benchmark(
    device: str, backends: Sequence[str], shapes: Sequence[Any], rounds: int
) -> list[dict[str, Any]]:
    """Every subject, shape, dtype and layout, printed as it goes."""
    clock = Clock(device)
    rows: list[dict[str, Any]] = []
    print(f"{'op':6} {'shape':>18} {'dtype':9} {'layout':13} {'pass':9} {'who':8} "
          f"{'p20 ms':>8} {'p50 ms':>8} {'p80 ms':>8} {'of clone':>9} {'vs eager':>9}")  # fmt: skip
    for subject in SUBJECTS:
        for shape in shapes:
            for dtype in DTYPES:
                for layout in ("contiguous", "channels_last"):
                    made = measure(subject, shape, dtype, layout, device=device, backends=backends, clock=clock,
                                   rounds=rounds)  # fmt: skip
                    for row in made:
                        print(line(row), flush=True)
                    rows += made
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    shape = "x".join(map(str, row["shape"]))
    head = f"{row['op']:6} {shape:>18} {row['dtype']:9} {row['layout']:13} "
    head += f"{row.get('direction', ''):9} {row['backend']:8} "
    if "refused" in row:
        return head + f"refused: {row['refused']}"
    if "wrong" in row:
        return head + f"WRONG, not timed: {row['share_of_error_bound']:.3g} times the error bound"
    ms = row["ms"]
    return head + (
        f"{ms['p20']:8.4f} {ms['p50']:8.4f} {ms['p80']:8.4f} "
        f"{row['share_of_clone_bandwidth']:8.0%} {row['speedup_over_eager']:8.2f}x"
    )


# --- tests and sanitizer -------------------------------------------------------------------------------------


def run_tests() -> dict[str, Any]:
    """The whole test suite on this machine; its closing line is kept."""
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "tests"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for text in process.stdout:
            print(text, end="", flush=True)
            last = text.strip() or last
    return {"ok": process.returncode == 0, "exit_status": process.returncode, "summary": last.strip("= ")}


def find_sanitizer() -> str | None:
    """compute-sanitizer: on PATH, or in the toolkit that the extension was built with, or in /usr/local/cuda."""
    record = machine.build_record() or {}
    roots = [record.get("cuda", {}).get("cuda_root"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(root) / folder for root in roots if root for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next(
        (found for place in places if (found := shutil.which("compute-sanitizer", path=str(place)))), None
    )


def run_sanitizer() -> dict[str, Any]:
    """Small calls of every subject under each tool; `ok` is None where compute-sanitizer is not installed."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "compute-sanitizer was not found, so no kernel was run under it (it comes with the CUDA toolkit)"
        )
        return {"ok": None, "reason": "compute-sanitizer was not found"}
    tools: dict[str, bool] = {}
    for tool in SANITIZER_TOOLS:
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "86",
            sys.executable,
            __file__,
            "--workload",
        ]
        env = {
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }  # so that an overrun leaves its allocation
        print(f"compute-sanitizer --tool {tool}", flush=True)
        tools[tool] = subprocess.run(command, env=env).returncode == 0
    return {"ok": all(tools.values()), "tools": tools}


def workload() -> None:
    """What runs under the sanitizer: every subject, dtype and layout, small, on every GPU backend that can."""
    for subject in SUBJECTS:
        for shape in ((2, 5, 17, 31), (1, 56, 8, 64), (0, 4, 4, 4)):
            for dtype in DTYPES:
                for layout in ("contiguous", "channels_last"):
                    args = arguments(subject, shape, dtype, layout, "cuda")
                    for backend in GPU_BACKENDS:
                        refusal = sdan_fast.explain(subject.name, *args).reasons.get(backend)
                        if refusal is None or "comes first" in refusal:
                            with sdan_fast.use_backend(backend):
                                gradients(subject.run, args, torch.randn_like(args[0]))
    torch.cuda.synchronize()


# --- all of it -----------------------------------------------------------------------------------------------


def commit() -> str | None:
    """The commit of this checkout, with a plus if files differ from it; None outside of git."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    ).stdout.strip()
    return head.stdout.strip() + ("+" if dirty else "")


def results_file(gpu: str) -> Path:
    """benchmarks/results/<gpu>.json, the name in lower case with dashes."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def main() -> int:
    """0 if every stage that ran passed, 1 if one failed or no GPU was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", choices=("tests", "sanitizer", "bench"), help="run one stage, write nothing"
    )
    parser.add_argument(
        "--rounds", type=int, default=50, help="timed calls of each function (default: %(default)s)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run the benchmark's code on the CPU, write nothing"
    )
    parser.add_argument("--workload", action="store_true", help="only the calls that the sanitizer watches")
    options = parser.parse_args()
    if options.rehearse:
        rows = benchmark("cpu", ("cpu",), REHEARSAL_SHAPES, rounds=5)
        print("a rehearsal on the CPU: these times mean nothing, and nothing was written")
        return 1 if any("wrong" in row for row in rows) else 0
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no device"
        print(
            f"gpu-check: no GPU was found ({why}; torch {torch.__version__}); nothing was checked",
            file=sys.stderr,
        )
        return 1
    if options.workload:
        workload()
        return 0

    gpu = torch.cuda.get_device_name()
    print(f"gpu-check on {gpu}, torch {torch.__version__}")
    stages = [options.only] if options.only else ["tests", "sanitizer", "bench"]
    found: dict[str, Any] = {
        "gpu": gpu,
        "date": machine.now(),
        "commit": commit(),
        "versions": machine.versions(),
        "cuda": torch.version.cuda,
        "machine": machine.describe(),
        "build": machine.build_record(),
    }
    failed = []
    for stage in stages:
        print(f"--- {stage}", flush=True)
        if stage == "tests":
            found[stage] = run_tests()
        elif stage == "sanitizer":
            found[stage] = run_sanitizer()
        else:
            rows = benchmark("cuda", GPU_BACKENDS, SHAPES, options.rounds)
            ran = {row["backend"] for row in rows if "ms" in row}
            ok = not any("wrong" in row for row in rows) and ran.issuperset(GPU_BACKENDS)
            found[stage] = {"ok": ok, "rounds": options.rounds, "rows": rows}
        if found[stage]["ok"] is False:
            failed.append(stage)
    if not options.only:
        target = results_file(gpu)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written: {target.relative_to(ROOT)}")
    print(f"gpu-check: {', '.join(failed)} failed" if failed else "gpu-check: every stage that ran passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
