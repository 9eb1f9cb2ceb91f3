"""The four committed tables (benchmarks/inspect in a checkout): brought up to date, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import cuda_counts, cuda_table, triton_counts, triton_table
from .table import Row, Table, compare, differing_tools, read, verdict
from .tools import Unavailable

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "inspect"
TRITON, TRITON_COUNTS = FOLDER / "triton.csv", FOLDER / "triton_counts.csv"
CUDA, CUDA_COUNTS = FOLDER / "cuda.csv", FOLDER / "cuda_counts.csv"
Say = Callable[[str], object]


def quiet(what: str) -> None:
    """Say nothing."""


@dataclass
class Part:
    """One table, as these sources make it. broken: hard limits that it breaks. partial: it lacks some targets."""

    path: Path
    table: Table
    head: Sequence[str]
    computed: int
    command: str
    broken: list[str] = field(default_factory=list)
    partial: bool = False


def load(path: Path, identity: tuple[str, ...]) -> Table | None:
    """A committed table, None if there is none."""
    try:
        return read(path, identity)
    except FileNotFoundError:
        return None


def known(
    path: Path, identity: tuple[str, ...], toolchain: Mapping[str, str], recompute: bool
) -> dict[tuple[str, ...], Row]:
    """The committed rows that a toolchain may take over."""
    table = load(path, identity)
    return {} if table is None or recompute or table.toolchain != toolchain else table.rows


def problem(part: Part) -> str | None:
    """What differs between the committed table and these sources; None if nothing.

    Where tools of other versions are at hand, figures are not comparable: only the hard limits are (`Part.broken`).
    """
    old = load(part.path, part.table.identity)
    if old is None:
        return f"there is no {part.path.name} yet; it is written by: {part.command}"
    if differing_tools(old, part.table.toolchain):
        return None
    return verdict(compare(old, part.table, complete=not part.partial), part.command)


def other_tools(part: Part) -> list[str]:
    """Why a table cannot be compared here, in sentences; empty if it can."""
    old = load(part.path, part.table.identity)
    return [] if old is None else differing_tools(old, part.table.toolchain)


def _broken(rows: Iterable[Row], check: Callable[[Row], str | None]) -> list[str]:
    return [reason for row in rows if (reason := check(row))]


def triton_table_only(jobs: int = 1, *, recompute: bool = False, say: Say = quiet) -> Part:
    """benchmarks/inspect/triton.csv."""
    table, compiled = triton_table.bring_up_to_date(
        load(TRITON, triton_table.IDENTITY), jobs, everything=recompute
    )
    say(f"{compiled} of {len(table.rows)} configurations had to be compiled")
    broken = _broken(table.rows.values(), triton_table.within_limits)
    return Part(TRITON, table, triton_table.HEAD, compiled, "sdan-fast inspect triton --update", broken)


def triton_counts_only(jobs: int = 1, *, recompute: bool = False, say: Say = quiet) -> Table:
    """The counts of the Triton kernels."""
    committed = load(TRITON_COUNTS, triton_counts.IDENTITY)
    return triton_counts.compute(committed, say, everything=recompute, jobs=jobs)[0]


def triton(jobs: int, *, recompute: bool = False, say: Say = quiet) -> Iterator[Part]:
    """Both Triton tables, each when it is ready."""
    compiled = triton_table_only(jobs, recompute=recompute, say=say)
    yield compiled
    table, executed = triton_counts.compute(
        load(TRITON_COUNTS, triton_counts.IDENTITY), say, everything=recompute, jobs=jobs
    )
    say(f"{executed} of {len(table.rows)} launches had to be executed")
    yield Part(TRITON_COUNTS, table, triton_counts.HEAD, executed, compiled.command)


def cuda_table_only(archs: list[str] | None = None, *, say: Say = quiet) -> Table:
    """The figures of the last build's machine code."""
    taken = known(CUDA, cuda_table.IDENTITY, cuda_table.toolchain(), False)
    return cuda_table.compute(archs, say, known=taken)


def cuda_counts_only(*, recompute: bool = False, say: Say = quiet) -> Table:
    """The counts of the CUDA C++ kernels."""
    return cuda_counts.compute(load(CUDA_COUNTS, cuda_counts.IDENTITY), everything=recompute)[0]


def cuda_figures(archs: list[str] | None = None, *, recompute: bool = False, say: Say = quiet) -> Part:
    """benchmarks/inspect/cuda.csv. Rows of architectures that this build has not are kept as they are committed."""
    taken = known(CUDA, cuda_table.IDENTITY, cuda_table.toolchain(), recompute)
    fresh, old = cuda_table.compute(archs, say, known=taken), load(CUDA, cuda_table.IDENTITY)
    computed, broken = len(fresh.rows), _broken(fresh.rows.values(), cuda_table.within_limits)
    if not fresh.rows:
        raise Unavailable("the last build has no machine code for the architectures asked for")
    if old is not None and old.toolchain == fresh.toolchain:
        present = {row["arch"] for row in fresh.rows.values()}
        theirs = {row["of"] for row in fresh.rows.values()}
        # In the committed order, for small diffs.
        merged = Table(fresh.identity, fresh.columns, fresh.toolchain)
        for at, row in old.rows.items():
            if at in fresh.rows or row["arch"] not in present or row["of"] not in theirs:
                merged.add(fresh.rows.pop(at, row))
        for row in fresh.rows.values():
            merged.add(row)
        fresh = merged
    return Part(CUDA, fresh, cuda_table.HEAD, computed, "sdan-fast inspect cuda --update", broken)


def cuda(
    archs: list[str] | None = None, jobs: int = 1, *, recompute: bool = False, say: Say = quiet
) -> Iterator[Part]:
    """Both CUDA tables, each when it is ready."""
    figures = cuda_figures(archs, recompute=recompute, say=say)
    yield figures
    table, executed = cuda_counts.compute(
        load(CUDA_COUNTS, cuda_counts.IDENTITY), everything=recompute, jobs=jobs
    )
    say(f"{executed} launches had to be executed")
    yield Part(CUDA_COUNTS, table, cuda_counts.HEAD, executed, figures.command)
