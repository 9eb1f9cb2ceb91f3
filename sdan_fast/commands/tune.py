"""`sdan-fast tune`: times the Triton kernels' candidate settings on this GPU and writes the best to a JSON file."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sdan_fast
from sdan_fast import functional as F

from . import terminal

Candidate = dict[str, int]
Timer = Callable[[Callable[[], Any]], float]

MARGIN = 0.03  # a candidate has to be this much faster than the default to replace it
ROUNDS = 25


def candidates(choices: dict[str, tuple[int, ...]], defaults: Candidate) -> list[Candidate]:
    """Every combination of the choices that a kernel asked for, the defaults first."""
    names = [name for name in choices if name in defaults]
    combinations = (
        dict(zip(names, values, strict=True)) for values in itertools.product(*(choices[n] for n in names))
    )
    return [dict(defaults), *(c for c in combinations if c != defaults)]


def select(
    tried: Sequence[Candidate],
    prepare: Callable[[Candidate], Callable[[], Any] | None],
    timer: Timer,
    rounds: int = ROUNDS,
    margin: float = MARGIN,
) -> tuple[Candidate, float]:
    """(the best candidate, its time over the default's), by the median of `rounds` rounds in turn (A B C A B C ...).

    The first candidate is the default, which stays unless another is faster by more than the margin. prepare gives
    what to time, or None where a candidate cannot run or is wrong.
    """
    runs = [(c, run) for c in tried if (run := prepare(c)) is not None]
    if not runs or runs[0][0] != tried[0]:
        raise RuntimeError(f"the default settings {tried[0]} do not run here")
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for (_, run), record in zip(runs, times, strict=True):
            record.append(timer(run))
    medians = [statistics.median(record) for record in times]
    best = min(range(len(runs)), key=medians.__getitem__)
    if medians[best] > (1 - margin) * medians[0]:
        best = 0
    return runs[best][0], medians[best] / medians[0]


def tune(
    calls: Iterable[tuple[str, Callable[[], Sequence[Tensor]]]],
    settings: Any,
    timer: Timer,
    report: Callable[[str, str, Candidate, float], None],
    rounds: int = ROUNDS,
) -> dict[str, dict[str, Candidate]]:
    """The settings that beat the defaults, for every kernel and class of calls that the calls ask for.

    Args:
        calls: (name, call) pairs; a call gives its results, which a candidate has to reproduce.
        settings: the module `sdan_fast.kernels.device_settings`.
        timer: the time of a call.
        report: told of every kernel, class, winner and its time over the default's.
    """
    table: dict[str, dict[str, Candidate]] = {}
    seen = set()
    for _, call in calls:
        with settings.in_force({}), settings.recorded() as asked:
            expected = [t.clone() for t in call()]
        for (kernel, name), defaults in asked.items():
            if (kernel, name) in seen:
                continue
            seen.add((kernel, name))

            def force(
                candidate: Candidate, kernel: str = kernel, name: str = name
            ) -> AbstractContextManager[None]:
                # What was found so far stays in force, so that the kernels of one call are tuned one after the other.
                found = {k: dict(v) for k, v in table.items()}
                found.setdefault(kernel, {})[name] = candidate
                context: AbstractContextManager[None] = settings.in_force(found)
                return context

            def prepare(
                candidate: Candidate, call: Any = call, force: Any = force, expected: Any = expected
            ) -> Callable[[], Any] | None:
                def run() -> Any:
                    with force(candidate):
                        return call()

                try:
                    got = run()
                except Exception:  # out of registers or of shared memory on this device
                    return None
                if not all(_same(a, b) for a, b in zip(got, expected, strict=True)):
                    return None
                return run

            best, ratio = select(candidates(settings.CHOICES[kernel], defaults), prepare, timer, rounds)
            report(kernel, name, best, ratio)
            if best != defaults:
                table.setdefault(kernel, {})[name] = best
    return table


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by the order of their sums at most."""
    if a.shape != b.shape:
        return False
    eps = torch.finfo(a.dtype).eps
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool((a.double() - b.double()).abs().max() <= 64 * eps * scale) if b.numel() else True


OPS = ("star", "layer_norm2d", "pointwise_gate", "star_conv", "depthwise_conv2d")


def sdan_calls(device: str) -> Iterable[tuple[str, Callable[[], Sequence[Tensor]]]]:
    """Forward and backward of every op at SDAN's shapes, both layouts, float32 and bfloat16."""

    def draw(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    def trained(op: Callable[..., Tensor], *args: Tensor, **kwargs: Any) -> Callable[[], Sequence[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in args]

        def call() -> Sequence[Tensor]:
            with sdan_fast.use_backend("triton"):
                y = op(*leaves, **kwargs)
                return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

        return call

    for dtype in (torch.float32, torch.bfloat16):
        for fmt in (torch.contiguous_format, torch.channels_last):
            for n, h, w in ((1, 180, 320), (8, 64, 64)):

                def image(
                    c: int, n: int = n, h: int = h, w: int = w, dtype: Any = dtype, fmt: Any = fmt
                ) -> Tensor:
                    return draw(n, c, h, w, dtype=dtype).contiguous(memory_format=fmt)

                x = image(56)
                vector = draw(56, dtype=dtype)
                yield "star", trained(F.star, x, x.clone())
                yield "layer_norm2d", trained(F.layer_norm2d, x, vector, vector.clone())
                square = draw(56, 56, 1, 1, dtype=dtype) / 8
                yield "pointwise_gate", trained(F.pointwise_gate, x, x.clone(), square, vector)
                half = draw(28, 56, 1, 1, dtype=dtype) / 8
                for weight in (square, half):
                    dw = draw(weight.shape[0], 1, 3, 3, dtype=dtype) / 3
                    yield (
                        "star_conv",
                        trained(
                            F.star_conv, x, vector, vector.clone(), weight, dw, dw[:, 0, 0, 0], weight.clone()
                        ),
                    )
                for kh, kw, dilation in (
                    (1, 11, 1),
                    (1, 11, 6),
                    (11, 1, 1),
                    (11, 1, 6),
                    (7, 7, 1),
                    (7, 7, 4),
                ):
                    filters = draw(28, 1, kh, kw, dtype=dtype) / (kh * kw) ** 0.5
                    yield (
                        "depthwise_conv2d",
                        trained(F.depthwise_conv2d, image(28), filters, vector[:28], dilation=dilation),
                    )


def gpu_timer() -> Timer:
    """Times a call on the GPU in milliseconds, with an L2 cache that holds nothing of it."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def timer(run: Callable[[], Any]) -> float:
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return timer


def tune_command(
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The folder to write <device>.json to. Default: $SDAN_FAST_SETTINGS, else this one.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, metavar="N", help="Measurements of each candidate.")] = ROUNDS,
    op: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only these ops (may be repeated).")
    ] = None,
) -> None:
    """Time the Triton kernels' settings on this GPU, at SDAN's shapes, and write those that beat the defaults.

    The file is used by processes that start later and find it: in the folder that SDAN_FAST_SETTINGS names, or
    beside the package's kernels. Nothing is tuned anywhere else, least of all at a first call.
    """
    if unknown := sorted(set(op or ()) - set(OPS)):
        terminal.fail(f"no such op: {', '.join(unknown)} (there are {', '.join(OPS)})")
    if not torch.cuda.is_available():
        terminal.fail(
            "tune needs a GPU: it times the Triton kernels, and torch sees none on this machine; nothing was written"
        )
    from sdan_fast.kernels import device_settings as settings

    device = torch.cuda.get_device_name()
    folder = output or Path(os.environ.get(settings.VARIABLE) or ".")
    out = terminal.console()

    def report(kernel: str, calls: str, best: Candidate, ratio: float) -> None:
        chosen = ", ".join(f"{k} {v}" for k, v in best.items())
        out.print(
            f"{kernel:22} {calls:40} {chosen}"
            + (f"  ({ratio:.2f} of the default's time)" if ratio < 1 else "")
        )

    wanted = ((name, call) for name, call in sdan_calls("cuda") if not op or name in op)
    found = tune(wanted, settings, gpu_timer(), report, rounds)
    target = folder / settings.file_name(device)
    settings.write(target, device, found)
    out.print(f"\nwrote {target}")
    if str(folder) != os.environ.get(settings.VARIABLE):
        out.print(f"to use it: {settings.VARIABLE}={folder.resolve()}")
