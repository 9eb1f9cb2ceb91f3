"""What the benchmarks have in common: an op's description, the verification before any timing, and the table.

A kernel is held against the float64 reference right before it is timed, and a wrong one gets no time. The times of
torch.clone, eager PyTorch and the kernels are taken in turn (A B C A B C ...); on a GPU the L2 cache is flushed before
each. Machines are noisy: quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdan_fast
from sdan_fast.commands import machine
from sdan_fast.commands.check import agreement


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


# SDAN's own size, a large image, and one whose rows start at odd addresses; on a CPU, what a cache could hold too.
SHAPES = {
    "cuda": ((8, 56, 180, 320), (1, 56, 720, 1280), (4, 28, 341, 511)),
    "cpu": ((1, 56, 180, 320), (1, 28, 64, 64), (1, 28, 341, 511)),
}
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
ROUNDS = {"cuda": 50, "cpu": 15}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last")


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
    subjects: Sequence[Subject],
    device: str,
    rounds: int,
    shapes: Sequence[tuple[int, int, int, int]] | None = None,
) -> list[dict[str, Any]]:
    """Every subject in every shape, dtype and layout on one device, printed as it goes."""
    clock = Clock(device)
    rows: list[dict[str, Any]] = []
    print(
        f"{'op':18} {'shape':>16} {'dtype':9} {'layout':13} {'pass':9} {'who':8} "
        f"{'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'of clone':>9} {'vs eager':>9}"
    )
    for subject in subjects:
        for shape in shapes or SHAPES[device]:
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    made = measure(
                        subject, shape, dtype, layout,
                        device=device, backends=BACKENDS[device], clock=clock, rounds=rounds,
                    )  # fmt: skip
                    for row in made:
                        print(line(row), flush=True)
                    rows += made
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    shape = "x".join(map(str, row["shape"]))
    head = f"{row['op']:18} {shape:>16} {row['dtype']:9} {row['layout']:13} "
    head += f"{row.get('direction', ''):9} {row['backend']:8} "
    if "refused" in row:
        return head + f"refused: {row['refused']}"
    if "wrong" in row:
        return head + f"WRONG, not timed: {row['share_of_error_bound']:.3g} times the error bound"
    ms = row["ms"]
    return head + (
        f"{ms['p20']:9.4f} {ms['p50']:9.4f} {ms['p80']:9.4f} "
        f"{row['share_of_clone_bandwidth']:8.0%} {row['speedup_over_eager']:8.2f}x"
    )


def describe() -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "date": machine.now(),
        "versions": machine.versions(),
        "cuda": torch.version.cuda,
        "machine": machine.describe(),
        "build": machine.build_record(),
    }


def main_for(subject: Subject) -> int:
    """The command line of one benchmarks/bench_<op>.py: 0 if every kernel was right, else 1."""
    parser = argparse.ArgumentParser(
        description=f"Verify and time {subject.name} on every backend of one device."
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here, help="default here: %(default)s")
    parser.add_argument("--rounds", type=int, help=f"timed calls of each function (default: {ROUNDS})")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU was found")
    rows = benchmark([subject], options.device, options.rounds or ROUNDS[options.device])
    if options.json:
        options.json.write_text(json.dumps({**describe(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if any("wrong" in row for row in rows) else 0
