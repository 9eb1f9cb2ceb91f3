"""The tables of counts: each launch of SDAN's own calls, its PTX executed, with what the model of time makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import workload
from .counts import Counts
from .devices import GPUS
from .modelled_time import EagerStep, eager_seconds, eager_steps, modelled, reference_calls, step_seconds
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


def needed_multiply_adds(case: workload.Case, mask: list[bool] | None) -> int:
    """Multiply-adds of plain PyTorch's sequence for one pass of a call."""
    args, kwargs = case.make()
    return sum(s.multiply_adds for s in eager_steps(reference_calls(case.op, args, kwargs, mask)))


def own_multiply_adds(counts: Counts) -> float:
    """What a launch executes: lanes of FMAs, and tensor cores' products."""
    mmas = counts.instructions.get("mma", 0.0)
    return 32 * (counts.fma - mmas) + counts.mma_flops / 2


def rows_of(call: str, launches: Sequence[Counted], needed: float) -> list[dict[str, object]]:
    """The rows of one pass. The multiply-adds that it needs are split over its launches as they execute theirs."""
    executed = 0.0
    for c in launches:
        if isinstance(c.counts, EagerStep):
            needed -= c.counts.multiply_adds
        else:
            executed += own_multiply_adds(c.counts)
    share = max(0.0, min(1.0, needed / executed if executed else 0.0))
    rows = []
    for i, c in enumerate(launches):
        if isinstance(c.counts, EagerStep):
            rows.append(library_row(call, i, c.kernel, c.counts, c.key))
        else:
            rows.append(row_of(call, i, c.kernel, c.counts, c.key, share * own_multiply_adds(c.counts)))
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


def row_of(
    call: str, number_of: int, kernel: str, c: Counts, key: str, multiply_adds: float
) -> dict[str, object]:
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
        "multiply_adds_M": number(multiply_adds / 1e6, 4),
    }
    for name, gpu in GPUS.items():
        m = modelled(gpu, c, multiply_adds, tensor_cores=c.mma_flops > 0)
        row[f"{name}_us"], row[f"{name}_floor_us"] = number(m.seconds * 1e6, 3), number(m.floor * 1e6, 3)
        row[f"{name}_ratio"], row[f"{name}_bound"] = number(m.ratio, 3), m.bound
    return row


def eager_microseconds(case: workload.Case, mask: list[bool] | None) -> dict[str, float]:
    """The modelled time of plain PyTorch's unfused sequence on each GPU, and how many kernels it is."""
    args, kwargs = case.make()
    steps = eager_steps(reference_calls(case.op, args, kwargs, mask))
    return {name: 1e6 * eager_seconds(gpu, steps) for name, gpu in GPUS.items()} | {"kernels": len(steps)}
