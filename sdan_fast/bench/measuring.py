"""Verify, then time: contenders of one case side by side, and what their times mean on this machine.

Nothing wrong is timed. Every contender is held against float64 by the project's error bound first: ours must keep it, a
peer must be within `PEER_SLACK` times of it (another algorithm may round more than eager PyTorch; garbage may not win).
Times are taken in turn, A B C A B C ..., next to `torch.clone` of the same input.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from sdan_fast.commands.check import Agreement, agreement, gradient_agreement, worst
from sdan_fast.ops import OPS

from .cases import Case, tensors
from .peers import Contender, build, calling
from .roofline import LEAST_ROUNDS, Roofline, multiply_adds, tensor_bytes

PEER_SLACK = 10
# Short calls are repeated within one measurement until it takes about this long, so that the clock does not count.
_LEAST_MEASURED = 300e-6


class Clock:
    """Times calls on one device: by the wall on a CPU; with events, and the L2 cache flushed, on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        # Larger than the L2 cache of any GPU. Writing it also keeps the GPU busy while the host queues the call, so
        # that what is timed is the kernel and not the launch.
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device) if self.cuda else None

    def seconds(self, function: Callable[[], object], repeat: int = 1) -> float:
        """Of one call, the mean over `repeat` of them."""
        if self.flush is None:
            began = time.perf_counter()
            for _ in range(repeat):
                function()
            return (time.perf_counter() - began) / repeat
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeat):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeat

    def repeats(self, function: Callable[[], object]) -> int:
        """How often to call it in one measurement: once on a GPU, where the flush is part of it."""
        return 1 if self.cuda else max(1, min(1000, math.ceil(_LEAST_MEASURED / self.seconds(function))))


def race(
    contenders: Sequence[Contender],
    clock: Clock,
    *,
    rounds: int,
    budget: float = math.inf,
    least: int = LEAST_ROUNDS,
    on_call: Callable[[str], object] = lambda name: None,
) -> list[list[float]]:
    """Seconds of every contender in every round, taken in turn.

    Args:
        contenders: who has been called before, so that nothing is compiled here.
        clock: of their device.
        rounds: at most.
        budget: seconds after which no further round begins, once there are `least`.
        least: rounds that are run whatever they take.
        on_call: told the name after each measurement; its time is not counted.
    """
    times: list[list[float]] = [[] for _ in contenders]
    repeats = []
    for contender in contenders:
        with contender.context():
            repeats.append(clock.repeats(contender.call))
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= least and time.perf_counter() - began > budget:
            break
        for contender, repeat, seconds in zip(contenders, repeats, times, strict=True):
            with contender.context():
                seconds.append(clock.seconds(contender.call, repeat))
            on_call(contender.title)
    return times


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, each the value of a round that took place."""
    ordered = sorted(values)
    return {f"p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 50, 80)}


# --- what a case costs at least ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a case cannot avoid: multiply-adds, as PyTorch counts them, and bytes, each tensor once."""

    multiply_adds: int
    bytes: int


def work(case: Case, passes: str) -> Work:
    """Counted on fake tensors: nothing is computed.

    Forward reads the inputs and writes the output; backward reads the inputs and the output's gradient and writes the
    inputs' gradients. A convolution's backward takes twice its forward's multiply-adds, for both gradients. PyTorch's
    own count is not used there: it takes the weight gradient of a depth-wise convolution for that of a dense one.
    """
    training = passes != "forward"
    real = case.arguments()
    with FakeTensorMode() as mode:
        args, kwargs = pytree.tree_map(
            lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, real
        )
        outputs: list[Tensor] = []
        macs = multiply_adds(lambda: outputs.append(case.subject.plain(*args, **kwargs)))
    inputs, output = tensor_bytes(*tensors(real)), tensor_bytes(*outputs)
    return Work(3 * macs if training else macs, inputs + output + (2 * inputs + output if training else 0))


# --- verification ------------------------------------------------------------------------------------------------


def judge(
    case: Case, results: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]
) -> Agreement:
    """Output and gradients against float64, with eager PyTorch as the yardstick; the worst of them.

    The gradients of an op that is several others in a row count as one vector, as in `sdan-fast verify`.
    """
    found = [agreement(results[0], eager[0], exact[0])]
    if len(results) > 1:
        if OPS[case.subject.op].composed:
            found.append(gradient_agreement(results[1:], eager[1:], exact[1:]))
        else:
            found += [agreement(r, e, x) for r, e, x in zip(results[1:], eager[1:], exact[1:], strict=True)]
    return worst(found)


def exact_results(case: Case, passes: str, device: str) -> Sequence[Tensor]:
    """Plain PyTorch in float64 on the same numbers."""

    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) else leaf

    arguments = pytree.tree_map(widen, case.arguments("NCHW", device))
    return calling(case.subject.plain, arguments, passes != "forward")()


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One contender of one case, as it goes into a table and into JSON."""

    case: Case
    passes: str
    contender: str
    layout: str
    ours: bool
    share: float | None = None  # the error as a share of the bound
    refused: str = ""  # why it did not take part
    wrong: bool = False  # verified, and not within its bound: no time
    seconds: Sequence[float] = ()
    figures: dict[str, float] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {
            "op": self.case.subject.op,
            "variant": self.case.variant.name,
            "shape": list(self.case.shape),
            "dtype": self.case.dtype,
            "pass": self.passes,
            "contender": self.contender,
            "layout": self.layout,
            "ours": self.ours,
        }
        if self.share is not None:
            found["share_of_error_bound"] = self.share
        if self.refused:
            found["refused"] = self.refused
        if self.wrong:
            found["wrong"] = True
        if self.seconds:
            found["seconds"] = percentiles(self.seconds) | {
                "median": self.median,
                "rounds": len(self.seconds),
            }
        return found | (self.figures or {})


def figures(
    seconds: float, cost: Work, clone_seconds: float, clone_bytes: int, limits: Roofline, best_peer: float
) -> dict[str, float]:
    """What a time means: rates, shares of this machine's limits, the floor, and the best peer over it.

    The bandwidth is that of `torch.clone` of the case's own input, taken in the same rounds (a tensor that the cache
    holds has another one than a large tensor).
    """
    bandwidth = clone_bytes / clone_seconds
    floor = max(2 * cost.multiply_adds / limits.arithmetic_rate, cost.bytes / bandwidth)
    return {
        "gigabytes_per_second": cost.bytes / seconds / 1e9,
        "gigaflops": 2 * cost.multiply_adds / seconds / 1e9,
        "share_of_clone_bandwidth": cost.bytes / seconds / bandwidth,
        "share_of_fma_rate": 2 * cost.multiply_adds / seconds / limits.arithmetic_rate,
        "floor_seconds": floor,
        "times_the_floor": seconds / floor,
        "clone_seconds": clone_seconds,
        "best_peer_over_this": best_peer / seconds,
    }


def measure(
    case: Case,
    passes: str,
    who: Sequence[tuple[str, str]],
    *,
    device: str,
    clock: Clock,
    limits: Roofline,
    rounds: int = 50,
    budget: float = math.inf,
    on_step: Callable[[str], object] = lambda step: None,
) -> list[Row]:
    """One case in one direction: every contender verified, then the right ones timed in turn.

    Args:
        case: what to compute.
        passes: one of `cases.PASSES`.
        who: (name, layout) of the contenders, as `peers.names` gives them.
        device: "cpu" or "cuda".
        clock: of that device.
        limits: of that device, measured in this run.
        rounds: at most.
        budget: seconds for the timing, verification apart.
        on_step: told what is being done, for a progress bar.

    Returns:
        A row for each of `who`, in that order.
    """
    torch._dynamo.reset()  # Inductor compiles for this case alone; no limit of recompilations is reached
    contenders = build(case, passes, device, who)
    on_step("float64")
    exact = exact_results(case, passes, device)
    rows, right = [], []
    yardsticks: dict[str, Sequence[Tensor]] = {}
    for contender in sorted(contenders, key=lambda c: c.name != "eager"):  # the yardsticks come first
        on_step(f"checking {contender.title}")
        row = Row(case, passes, contender.name, contender.layout, contender.ours)
        rows.append(row)
        if contender.refused:
            row.refused = contender.refused
            continue
        try:
            with contender.context():
                results = contender.call()
        except Exception as error:
            row.wrong = contender.ours
            row.refused = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            continue
        if contender.name == "eager":
            yardsticks[contender.layout] = results
        eager = yardsticks.get(contender.layout) or next(iter(yardsticks.values()))
        row.share = judge(case, results, eager, exact).share
        row.wrong = not row.share <= (1 if contender.ours else PEER_SLACK)
        if not row.wrong:
            right.append((row, contender))
    del exact, yardsticks

    source = case.arguments(who[0][1], device)[0][0]
    clone = Contender("clone", who[0][1], False, lambda: (source.clone(),))
    on_step("timing")
    with torch.no_grad() if passes == "forward" else contextlib.nullcontext():
        times = race([clone, *(contender for _, contender in right)], clock, rounds=rounds, budget=budget)
    for (row, _), seconds in zip(right, times[1:], strict=True):
        row.seconds = seconds
    best = min((row.median for row, _ in right if not row.ours), default=math.nan)
    cost = work(case, passes)
    for row, _ in right:
        row.figures = figures(
            row.median, cost, statistics.median(times[0]), 2 * tensor_bytes(source), limits, best
        )
    order = {pair: i for i, pair in enumerate(who)}
    return sorted(rows, key=lambda row: order[row.contender, row.layout])
