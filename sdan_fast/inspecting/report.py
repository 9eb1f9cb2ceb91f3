"""docs/gpu-model.md: the modelled times of SDAN's ops, from the committed counts, beside PyTorch's unfused sequence."""

from __future__ import annotations

from collections.abc import Iterable

from . import arguments, committed, counts_table, cuda_counts, triton_counts, workload
from .devices import GPUS, ROUND_TRIPS
from .modelled_time import SECTOR_PATH
from .table import Row, Table, number
from .tools import Unavailable

_INTRODUCTION = """\
# Modelled times

**Every time on this page is modelled, not measured**; [gpu-measured.md](gpu-measured.md) has measured ones of an H100,
which are 1.4 to 8 times as long: a launch costs 2.7 us beside its bytes there, which the model lacks. The page is
written by `sdan-fast inspect model --out docs/gpu-model.md` from the committed tables
`benchmarks/inspect/*_counts.csv`, and a test fails where it is not what that command writes.

## The model

The compiled PTX of every launch is executed by the interpreter of `tests/ptxrun` on the call's real grid and
arguments (of a large grid, some blocks: the tables say how many). A launch then takes as long as its busiest
resource:

| resource | what is counted | rate |
|---|---|---|
| DRAM | bytes of each block's distinct 32-byte sectors, summed; tensors under 256 KiB once | bandwidth |
| FMA units | float32 and packed 16-bit warp instructions x 32 | lanes x clock |
| tensor cores | multiply-adds of `mma` | dense 16-bit rate |
| special functions | `ex2`, `rcp`, `rsqrt`, divisions x 32 | 16 lanes an SM |
| integer units | integer, predicate and conversion instructions x 32 | 64 lanes an SM |
| issue slots | all warp instructions but moves | 4 an SM and clock |
| shared memory and L1 | wavefronts, and sectors / {path} bytes | 1 an SM and clock |

Blocks go evenly to the SMs, and the SM with the most of them decides. No launch takes less than one round trip to
DRAM (its latency below), since what it writes depends on what it reads. The floor of a launch is the largest of this
round trip, its compulsory bytes (every tensor that it reads or writes, once) over the bandwidth, and the multiply-adds
that the op's definition needs of it over the rate of the unit that does them: depth-wise weight gradients belong to
the kernels named `wgrad`, 1x1 products to PyTorch's kernels and to those that use tensor cores, the rest to the
others, each kind split as the launches execute theirs. The ratio of the two is the kernel's gap. The round trip is a
limit and not a term of a sum: added to time and floor alike, it would only make all ratios look better.

What the model leaves out: other latencies and occupancy (the compiled tables have the latter), launch overhead, caches
shared by blocks (the L2 holds whole tensors of these sizes, so real traffic can be less), ptxas's scheduling and its
merging of instructions (counts are of PTX). Both GPUs are modelled with the counts of one PTX: sm_80's for Triton,
since the interpreter knows its tensor-core instructions and not sm_90's, and the one of the build for CUDA C++.

PyTorch's column is the same model of the unfused sequence of the op's definition: each of its kernels at its own
floor, all tensors moved once. That is kinder to PyTorch than to us, whose own counts are used.

The GPUs, from public data sheets:

{gpus}
"""


def page() -> str:
    """The whole page."""
    gpus = "\n".join(
        f"* **{name}**, {gpu.name}: {gpu.source}; a round trip to DRAM takes {gpu.round_trip} clocks, "
        f"{gpu.latency * 1e6:.2f} us ({ROUND_TRIPS})."
        for name, gpu in GPUS.items()
    )
    parts = [_INTRODUCTION.format(path=SECTOR_PATH, gpus=gpus)]
    tables = {
        "Triton": committed.load(committed.TRITON_COUNTS, triton_counts.IDENTITY),
        "CUDA C++": committed.load(committed.CUDA_COUNTS, cuda_counts.IDENTITY),
    }
    present = {name: table for name, table in tables.items() if table is not None}
    if not present:
        raise Unavailable("there are no committed counts; sdan-fast inspect triton --update writes them")
    parts.append(_summary(present))
    for name, table in present.items():
        parts.append(_launches(name, table))
    return "\n".join(parts)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _passes(table: Table) -> dict[str, list[Row]]:
    passes: dict[str, list[Row]] = {}
    for row in table.rows.values():
        passes.setdefault(row["call"], []).append(row)
    return passes


def _summary(tables: dict[str, Table]) -> str:
    """Op by op: microseconds of all launches, of their floors, and of PyTorch's sequence."""
    columns = ["call", "PyTorch: kernels", *(f"{g}, us" for g in GPUS)]
    for name in tables:
        columns += [f"{name}: launches", *(f"{g}, us (floor)" for g in GPUS)]
    lines = [
        "## Op by op",
        "",
        "Microseconds, modelled. A dash: no kernel, or its counts are not taken (docs/inspect.md).",
        "",
        _line(columns),
        _line("-" * len(columns)),
    ]
    passes = {name: _passes(table) for name, table in tables.items()}
    with arguments.blank():
        for case in triton_counts.calls():  # among which are those of CUDA C++
            names = ("forward", "backward", "backward of x")
            for title, mask in zip(names, [None, *workload.masks(case.op, case.make()[0])]):
                call = f"{case.name} {title}"
                if not any(call in p for p in passes.values()):
                    continue
                eager = counts_table.eager_microseconds(case, mask)
                cells: list[object] = [call, eager["kernels"], *(number(eager[g], 3) for g in GPUS)]
                for name in tables:
                    cells += _sums(passes[name].get(call))
                lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _sums(rows: list[Row] | None) -> list[str]:
    if not rows:
        return ["-"] * (1 + len(GPUS))
    cells = [str(len(rows))]
    for gpu in GPUS:
        took, floor = (sum(float(r[f"{gpu}_{what}"]) for r in rows) for what in ("us", "floor_us"))
        cells.append(f"{number(took, 3)} ({number(floor, 3)})")
    return cells


def _launches(name: str, table: Table) -> str:
    """Launch by launch: time, floor, ratio, what binds."""
    columns = ["call", "launch", *(f"{g}: us, floor, ratio, bound by" for g in GPUS), "FMA", "traffic"]
    lines = [f"## {name}, launch by launch", "", _line(columns), _line("-" * len(columns))]
    for row in table.rows.values():
        cells = [row["call"], f"{row['launch']}: `{row['kernel']}`"]
        for gpu in GPUS:
            cells.append(", ".join(row[f"{gpu}_{what}"] for what in ("us", "floor_us", "ratio", "bound")))
        fma = f"{float(row['executed_fma']):.0%}" if row["executed_fma"] else "-"
        lines.append(_line([*cells, fma, row["traffic"] or "-"]))
    return "\n".join(lines) + "\n"
