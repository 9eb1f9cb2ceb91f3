"""Executes the PTX of the Triton kernels' launches in SDAN's own calls, and tabulates what they do."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, counts_table, workload
from .counts import Counts, count, interpreter, interpreter_hash
from .counts_table import COLUMNS, IDENTITY, Counted
from .table import Row, Table
from .triton_kernels import Launch, Specialized, compile_specialized, launches_of
from .triton_table import passes_of, toolchain

TARGET = 80  # its tensor cores (mma.sync) are what the interpreter knows; wgmma of sm_90 it does not
HEAD = (
    "What the Triton kernels do in SDAN's own calls: their sm_80 PTX, executed block by block; docs/inspect.md",
    "explains the columns. Times are modelled, not measured. Written by: sdan-fast inspect triton --update",
)


def calls() -> Iterator[workload.Case]:
    """The calls that are counted, forward and backward: a picture in either dtype and layout, patches in bfloat16 NCHW.

    float16 runs bfloat16's kernels and settings with other conversions.
    """
    half, single = torch.bfloat16, torch.float32
    for dtype, layout, size in (
        (half, "nchw", workload.PICTURE),
        (half, "nchw", workload.PATCHES),
        (single, "nchw", workload.PICTURE),
        (half, "nhwc", workload.PICTURE),
        (single, "nhwc", workload.PICTURE),
    ):
        yield from workload.own_cases(dtype, layout, size)


def memory_of(t: Tensor) -> Any:
    """The memory span of a tensor as NumPy bytes, shared with it."""
    whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()
    size = t.element_size()
    start, span = (
        size * t.storage_offset(),
        size * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))),
    )
    return whole[start : start + (span if t.numel() else 0)]


def key_of(launch: Launch, s: Specialized) -> str:
    """A hash of all that a launch's counts depend on: its code, its grid and its arguments but for tensors' values."""
    described = [
        (tuple(v.shape), v.stride(), v.data_ptr() % 32) if isinstance(v, Tensor) else v for v in s.passed
    ]
    return hashlib.sha256(repr((s.key, launch.grid, described, interpreter_hash())).encode()).hexdigest()[:16]


def execute(launch: Launch, s: Specialized, *, whole: bool = False) -> Counts:
    """Run a launch's compiled PTX on its own tensors, set to zero: a launch before it did not fill them.

    What a NaN of unwritten memory becomes depends on the order of operands, so that two warps that write a sum twice
    would look like a race.
    """
    compiled = compile_specialized(s)
    for v in s.passed:
        if isinstance(v, Tensor):
            v.zero_()
    values = [memory_of(v) if isinstance(v, Tensor) else v for v in s.passed]
    sizes = {
        n: float(v.numel() * v.element_size()) for n, v in zip(s.names, s.passed) if isinstance(v, Tensor)
    }
    names = [*s.names]
    for name in ("global_scratch_size", "profile_scratch_size"):
        size = getattr(compiled.metadata, name)
        values.append(
            memory_of(torch.zeros(size * math.prod(launch.grid), dtype=torch.uint8)) if size else None
        )
        names.append(name)
    return count(
        compiled.asm["ptx"], compiled.metadata.name, launch.grid, (32 * compiled.warps, 1, 1), values,
        compiled.shared, names, sizes, whole=whole,
    )  # fmt: skip


def passes() -> Iterator[tuple[workload.Case, str, list[bool] | None, Callable[[], Any]]]:
    """(case, name of the pass, output mask or None, call) of everything that is counted."""
    for case in calls():
        masks = [None, *workload.masks(case.op, case.make()[0])]
        for (name, call), mask in zip(passes_of(case), masks, strict=True):
            yield case, name, mask, call


def kept_passes(
    known: Mapping[tuple[str, ...], Row], only: Callable[[str], bool] = lambda call: True
) -> dict[str, list[Row] | None]:
    """The rows of each pass, or None where one of them is missing or has another key than its launch has now."""
    made: dict[str, list[Row] | None] = {}
    with arguments.blank():
        for case, name, _, call in passes():
            title = f"{case.name} {name}"
            if only(title):
                pairs = _specialized(call)
                old = [known.get((launch.name, title, str(i))) for i, (launch, _) in enumerate(pairs)]
                kept = [r for r, pair in zip(old, pairs) if r is not None and r["key"] == key_of(*pair)]
                made[title] = kept if len(kept) == len(pairs) else None
    return made


def compute(committed: Table | None, on_pass: Callable[[str], object] = lambda name: None, *, everything: bool = False,
            only: Callable[[str], bool] = lambda call: True, jobs: int = 1) -> tuple[Table, int]:  # fmt: skip
    """(the table of these sources, how many launches were executed).

    A pass whose rows are committed with the keys of its launches is taken over; another is executed as a whole, by one
    of `jobs` processes.
    """
    here = toolchain()
    made = kept_passes(
        {} if committed is None or everything or committed.toolchain != here else committed.rows, only
    )
    stale = [title for title, rows in made.items() if rows is None]
    if jobs > 1 and len(stale) > 1:
        interpreter()  # whose exceptions a process may send
        with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(execute_passes, stale[rank::jobs]): rank for rank in range(jobs)}
            for future in concurrent.futures.as_completed(futures):
                made |= future.result()
    else:
        made |= execute_passes(stale, on_pass)
    table = Table(IDENTITY, COLUMNS, here)
    for row in itertools.chain.from_iterable(rows or () for rows in made.values()):
        table.add(row)
    return table, sum(len(made[title] or ()) for title in stale)


def _specialized(call: Callable[[], Any]) -> list[tuple[Launch, Specialized]]:
    return [(launch, launch.specialized(TARGET)) for launch in launches_of(call)]


def execute_passes(
    titles: Sequence[str], on_pass: Callable[[str], object] = lambda name: None
) -> dict[str, list[Row]]:
    """The rows of these passes, every launch executed."""
    made = {}
    with arguments.blank():
        for case, name, mask, call in passes():
            title = f"{case.name} {name}"
            if title not in titles:
                continue
            on_pass(title)
            counted = [Counted(la.name, execute(la, s), key_of(la, s)) for la, s in _specialized(call)]
            needed = counts_table.needed_work(case, mask)
            table = Table(IDENTITY, COLUMNS, {})
            for row in counts_table.rows_of(title, counted, needed):
                table.add(row)
            made[title] = list(table.rows.values())
    return made
