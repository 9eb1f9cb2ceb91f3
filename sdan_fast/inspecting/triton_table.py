"""The table of the Triton kernels: each configuration that the heuristics emit, compiled ahead of time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import arguments, workload
from .devices import ARCHITECTURES
from .occupancy import occupancy
from .table import Row, Table, number
from .tools import version_of
from .triton_kernels import Compiled, Specialized, compile_specialized, launches_of, shared_limit
from .triton_scope import scope

IDENTITY = ("kernel", "call", "launch", "target")
COLUMNS = (
    "kernel", "call", "launch", "target", "warps", "registers", "spills", "shared", "occupancy", "load_bits",
    "store_bits", "wide_loads", "hot", "hot_instructions", "hot_fma", "configuration", "key",
)  # fmt: skip
HEAD = (
    "The Triton kernels, compiled ahead of time for SDAN's shapes and other models' filters; docs/inspect.md explains",
    "the columns. Written by: sdan-fast inspect triton --update",
)


def toolchain() -> dict[str, str]:
    """The versions that the table's numbers depend on."""
    import triton

    return {
        "triton": triton.__version__,
        "cuobjdump": version_of("cuobjdump"),
        "nvdisasm": version_of("nvdisasm"),
        "ptxas": version_of("ptxas"),
    }


def passes_of(case: workload.Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """("forward", call), ("backward", call) and, where it takes another path, ("backward of x", call) of a case."""
    module = importlib.import_module(f"sdan_fast.kernels.{case.op}")
    args, kwargs = case.make()
    y: Any = None

    def forward() -> Any:
        nonlocal y
        y = module.forward(*args, **kwargs)
        return y

    yield "forward", forward
    if y is None:  # nobody has called it
        launches_of(forward)
    gradient = torch.zeros_like(y)
    for name, mask in zip(("backward", "backward of x"), workload.masks(case.op, args)):
        yield name, functools.partial(module.backward, gradient, *args, **kwargs, output_mask=mask)


@dataclass(frozen=True)
class Wanted:
    """One row to be: a launch of a call, for one target."""

    call: str
    number: int
    target: int | str
    specialized: Specialized

    @property
    def identity(self) -> tuple[str, ...]:
        return self.specialized.kernel.fn.__name__, self.call, str(self.number), target_name(self.target)


def target_name(target: int | str) -> str:
    return target if isinstance(target, str) else f"sm_{target}"


def wanted_rows() -> list[Wanted]:
    """All rows, one for each configuration and target: the first call that leads to it names it."""
    rows: dict[str, Wanted] = {}
    with arguments.blank():
        for cases, targets, backward in scope():
            for case in cases:
                for name, call in passes_of(case):
                    if name != "forward" and backward is None:
                        continue
                    for i, launch in enumerate(launches_of(call)):
                        if name != "forward" and not launch.name.startswith(backward or ""):
                            continue
                        for target in targets:
                            s = dataclasses.replace(launch.specialized(target), passed=[])  # frees tensors
                            rows.setdefault(s.key, Wanted(f"{case.name} {name}", i, target, s))
    return list(rows.values())


def row_of(wanted: Wanted, compiled: Compiled) -> dict[str, object]:
    """The figures of one compiled kernel."""
    row: dict[str, object] = dict(zip(IDENTITY, wanted.identity, strict=True))
    constants = {k: v for k, v in sorted(compiled.constexprs.items()) if v is not None}
    row |= {"warps": compiled.warps, "shared": compiled.shared, "key": compiled.key}
    row["configuration"] = json.dumps(constants, default=str).replace('"', "").strip("{}")
    if isinstance(compiled.target, str):
        amd = compiled.amd_resources
        spills = amd.get("vgpr_spill_count", 0) + amd.get("sgpr_spill_count", 0)
        return row | {"registers": amd.get("vgpr_count", 0), "spills": spills}
    used, code = compiled.resources, compiled.code
    kind, body = code.hot_loop
    fit = occupancy(ARCHITECTURES[compiled.target], 32 * compiled.warps, used["reg"], compiled.shared)
    return row | {
        "registers": used["reg"],
        "spills": used["stack"] + used["local"],
        "occupancy": number(fit.share),
        "load_bits": code.widest("LDG"),
        "store_bits": code.widest("STG"),
        "wide_loads": number(code.share_of_width("LDG", 128), 3),
        "hot": kind,
        "hot_instructions": len(body),
        "hot_fma": number(code.hot_fma_share, 3),
    }


def within_limits(row: Row) -> str | None:
    """Why a row breaks a hard limit that no toolchain excuses; None if it does not."""
    target: int | str = int(row["target"][3:]) if row["target"].startswith("sm_") else row["target"]
    if row["spills"] != "0":
        return f"{row['kernel']} ({row['call']}) for {row['target']} spills {row['spills']} bytes"
    if int(row["shared"]) > shared_limit(target):
        return f"{row['kernel']} ({row['call']}) for {row['target']} takes {row['shared']} bytes of shared memory"
    return None


def compute(wanted: Iterable[Wanted], on_row: Callable[[], object] = lambda: None) -> Table:
    """Compile rows in this process."""
    table = Table(IDENTITY, COLUMNS, toolchain())
    for w in wanted:
        table.add(row_of(w, compile_specialized(w.specialized)))
        on_row()
    return table


def _share(keys: frozenset[str], rank: int, of: int) -> list[Row]:
    chosen = [w for w in wanted_rows() if w.specialized.key in keys]
    return list(compute(chosen[rank::of]).rows.values())


def compute_in_parallel(wanted: list[Wanted], jobs: int) -> Table:
    """Compile rows in `jobs` processes, which find the launches for themselves (kernels cannot be sent)."""
    if jobs == 1 or len(wanted) < 8:
        return compute(wanted)
    keys = frozenset(w.specialized.key for w in wanted)
    table = Table(IDENTITY, COLUMNS, toolchain())
    made: dict[tuple[str, ...], Row] = {}
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(_share, [keys] * jobs, range(jobs), [jobs] * jobs):
            made |= {tuple(row[c] for c in IDENTITY): row for row in rows}
    for w in wanted:
        table.add(made[w.identity])
    return table


def bring_up_to_date(committed: Table | None, jobs: int, *, everything: bool = False) -> tuple[Table, int]:
    """(the table of these sources, how many rows had to be compiled).

    A row whose key and toolchain are the committed ones is taken from there: the same source compiles to the same code.
    """
    wanted, here = wanted_rows(), toolchain()
    known = {} if committed is None or everything or committed.toolchain != here else committed.rows
    stale = [w for w in wanted if known.get(w.identity, {}).get("key") != w.specialized.key]
    fresh = compute_in_parallel(stale, jobs) if stale else Table(IDENTITY, COLUMNS, here)
    table = Table(IDENTITY, COLUMNS, here)
    for w in wanted:
        table.add(fresh.rows.get(w.identity) or known[w.identity])
    return table, len(stale)
