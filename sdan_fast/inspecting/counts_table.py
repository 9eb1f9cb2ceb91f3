"""The tables of counts: each launch of SDAN's own calls, its PTX executed, with what the model of time makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import workload
from .counts import Counts
from .devices import GPUS
from .modelled_time import (
    EagerStep,
    Needed,
    Work,
    eager_seconds,
    eager_steps,
    modelled,
    reference_calls,
    step_seconds,
)
from .table import number

IDENTITY = ("kernel", "call", "launch")
COLUMNS = (
    "kernel", "call", "launch", "grid", "threads", "executed_blocks", "executed_fma", "load_sectors", "best_load",
    "store_sectors", "traffic", "bank_conflicts", "compulsory_MB", "multiply_adds_M",
    *(f"{gpu}_{what}" for gpu in GPUS for what in ("us", "floor_us", "ratio", "bound")), "key",
)  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """One launch of a pass: our own kernel's counts, or a step that is left to PyTorch's kernels (matrix products)."""

    kernel: str
    counts: Counts | EagerStep
    key: str


def needed_work(case: workload.Case, mask: list[bool] | None) -> Work:
    """Multiply-adds of plain PyTorch's sequence for one pass of a call, of the kernels that its results depend on."""
    args, kwargs = case.make()
    steps = eager_steps(reference_calls(case.op, args, kwargs, mask), needed=True)
    return sum((s.work for s in steps), Work())


def executed_lanes(counts: Counts) -> float:
    """Multiply-adds that a launch executes on float32 lanes."""
    return 32 * (counts.fma - counts.instructions.get("mma", 0.0))


def split_work(launches: Sequence[Counted], work: Work) -> list[Needed]:
    """What each launch of a pass needs of the pass's multiply-adds, kind by kind.

    Depth-wise weight gradients belong to the launches of `wgrad_*`, matrix products to PyTorch's and to those that use
    tensor cores, and the rest, which is convolutions and their input gradients, to the float32 lanes of all others.
    Among the launches of a kind the multiply-adds are split as these execute theirs, and none needs more than it
    executes. So a kernel that computes four fifths in vain on tensor cores leaves the others what is theirs. Where no
    launch is of a kind, what is of it (a weight gradient made beside others, products without tensor cores) counts as
    the rest.
    """
    product = work.product - sum(c.counts.work.product for c in launches if isinstance(c.counts, EagerStep))
    ours = [c.counts if isinstance(c.counts, Counts) else None for c in launches]
    weights = [c is not None and launch.kernel.startswith("wgrad") for launch, c in zip(launches, ours)]
    tensor = [0.0 if c is None else c.mma_flops / 2 for c in ours]
    lanes = [0.0 if c is None else executed_lanes(c) for c in ours]
    # A weight gradient's lanes beside tensor cores only prepare and finish what these do.
    of_weights = [(m or f) if w else 0.0 for m, f, w in zip(tensor, lanes, weights)]
    of_products = [0.0 if w else m for m, w in zip(tensor, weights)]
    of_rest = [0.0 if w else f for f, w in zip(lanes, weights)]
    rest = work.stencil
    if not any(of_weights):
        rest += work.weights
    if not any(of_products):
        rest, product = rest + max(0.0, product), 0.0

    def split(total: float, executed: list[float]) -> list[float]:
        share = min(1.0, max(0.0, total) / sum(executed)) if any(executed) else 0.0
        return [share * e for e in executed]

    parts = zip(tensor, split(work.weights, of_weights), split(product, of_products), split(rest, of_rest))
    return [Needed(r + (0.0 if m else w), p + (w if m else 0.0)) for m, w, p, r in parts]


def rows_of(call: str, launches: Sequence[Counted], work: Work) -> list[dict[str, object]]:
    """The rows of one pass, which needs `work`."""
    rows = []
    for i, (c, needed) in enumerate(zip(launches, split_work(launches, work))):
        if isinstance(c.counts, EagerStep):
            rows.append(library_row(call, i, c.kernel, c.counts, c.key))
        else:
            rows.append(row_of(call, i, c.kernel, c.counts, c.key, needed))
    return rows


def library_row(call: str, number_of: int, kernel: str, step: EagerStep, key: str) -> dict[str, object]:
    """A launch of PyTorch's, modelled at its own floor."""
    row: dict[str, object] = {"kernel": kernel, "call": call, "launch": number_of, "key": key}
    row |= {
        "compulsory_MB": number(step.bytes / 1e6, 4),
        "multiply_adds_M": number(step.multiply_adds / 1e6, 4),
    }
    for name, gpu in GPUS.items():
        us = number(step_seconds(gpu, step) * 1e6, 3)
        row |= {
            f"{name}_us": us,
            f"{name}_floor_us": us,
            f"{name}_ratio": 1,
            f"{name}_bound": "PyTorch's, at its floor",
        }
    return row


def row_of(call: str, number_of: int, kernel: str, c: Counts, key: str, needed: Needed) -> dict[str, object]:
    """One launch's row."""
    row: dict[str, object] = {"kernel": kernel, "call": call, "launch": number_of, "key": key}
    row |= {"grid": c.grid, "threads": c.threads, "executed_blocks": c.blocks}
    row |= {
        "executed_fma": number(c.fma_share, 3),
        "load_sectors": number(c.load_efficiency, 3),
        "best_load": number(c.best_load, 3),
        "store_sectors": number(c.store_efficiency, 3),
        "traffic": number(c.traffic, 4),
        "bank_conflicts": number(c.conflict_share, 3),
        "compulsory_MB": number(c.compulsory / 1e6, 4),
        "multiply_adds_M": number((needed.lanes + needed.tensor) / 1e6, 4),
    }
    for name, gpu in GPUS.items():
        m = modelled(gpu, c, needed)
        row[f"{name}_us"], row[f"{name}_floor_us"] = number(m.seconds * 1e6, 3), number(m.floor * 1e6, 3)
        row[f"{name}_ratio"], row[f"{name}_bound"] = number(m.ratio, 3), m.bound
    return row


def eager_microseconds(case: workload.Case, mask: list[bool] | None) -> dict[str, float]:
    """The modelled time of plain PyTorch's unfused sequence on each GPU, and how many kernels it is."""
    args, kwargs = case.make()
    steps = eager_steps(reference_calls(case.op, args, kwargs, mask))
    return {name: 1e6 * eager_seconds(gpu, steps) for name, gpu in GPUS.items()} | {"kernels": len(steps)}
