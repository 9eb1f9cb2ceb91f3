"""`sdan-fast inspect`: what the GPU kernels are made of and how long they should take, without a GPU."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import terminal

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="The GPU kernels without a GPU: registers, occupancy, machine code, executed PTX, modelled times.",
)

Arch = Annotated[
    list[str] | None, typer.Option("--arch", metavar="NAME", help="Only these architectures (sm_90, gfx942).")
]
Kernel = Annotated[
    str, typer.Option("--kernel", metavar="TEXT", help="Only kernels whose name has this in it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")]
Counts = Annotated[
    bool, typer.Option("--counts", help="Show what executing the PTX counted, and modelled times.")
]
Update = Annotated[bool, typer.Option("--update", help="Rewrite the committed tables, and say what changed.")]
Check = Annotated[bool, typer.Option("--check", help="Compare the committed tables with these sources.")]
Accept = Annotated[bool, typer.Option("--accept", help="With --update: write regressions too.")]
Everything = Annotated[
    bool, typer.Option("--recompute", help="Trust no committed row: compute each one anew.")
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, metavar="N", help="Compiler processes.")]

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
_HIDDEN = ("configuration", "key", "launched_by")  # too wide for a terminal; JSON and CSV have them


def _show(rows: Iterable[dict[str, str]], as_json: bool, as_csv: bool, title: str) -> None:
    rows = list(rows)
    if as_json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        terminal.error("no row matches")
        raise typer.Exit(terminal.MISUSE)
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        columns = [c for c in rows[0] if c not in _HIDDEN]
        numeric = tuple(c for c in columns if all(_is_number(r[c]) for r in rows))
        out = terminal.table(*columns, title=title, right=numeric)
        for row in rows:
            out.add_row(*(row[c] for c in columns))
        terminal.console().print(out)


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def _chosen(
    rows: Iterable[dict[str, str]], arch: list[str] | None, kernel: str, column: str
) -> list[dict[str, str]]:
    return [r for r in rows if kernel in r["kernel"] and (not arch or r.get(column, arch[0]) in arch)]


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _finish(parts: Iterable[Any], update: bool, accept: bool) -> None:
    """Write or compare the committed tables, and exit with 1 where something is not as it should be."""
    from sdan_fast.inspecting import committed

    failed = False
    for part in parts:
        problem = committed.problem(part)
        for line in part.broken:
            terminal.error(line)
        if problem:
            print(problem)
        if not update:
            failed = failed or bool(problem or part.broken)
            if not problem and not part.broken:
                rows = f"{len(part.table.rows)} rows, {part.computed} computed now"
                print(f"{part.path.name} is of these sources ({rows})")
            continue
        if part.broken or (problem is not None and "regression" in problem and not accept):
            failed = True
            terminal.error(
                f"{part.path.name} is left as it was" + ("" if part.broken else "; --accept writes it")
            )
            continue
        part.table.write(part.path, part.head)
        print(f"{part.path}: {len(part.table.rows)} rows, {part.computed} of them computed now")
    if failed:
        raise typer.Exit(terminal.FAILED)


def _guarded(function: Callable[[], Any]) -> Any:
    from sdan_fast.inspecting.tools import Unavailable

    try:
        return function()
    except Unavailable as reason:
        terminal.error(str(reason))
        raise typer.Exit(terminal.MISUSE) from None


@app.command("triton", short_help="The Triton kernels, compiled ahead of time.")
def inspect_triton(
    arch: Arch = None,
    kernel: Kernel = "",
    counts: Counts = False,
    as_json: Json = False,
    as_csv: Csv = False,
    update: Update = False,
    check: Check = False,
    accept: Accept = False,
    recompute: Everything = False,
    jobs: Jobs = _CORES,
) -> None:
    """Registers, spills, shared memory, occupancy, width of loads, FMA share: each configuration, each target.

    Rows whose kernels did not change since the committed table are taken from it, others are compiled (a second each).
    --counts, --update and --check also need the PTX interpreter of a checkout.
    """
    from sdan_fast.inspecting import committed, triton_table

    if update or check:
        _guarded(lambda: _finish(committed.triton(jobs, recompute=recompute, say=_say), update, accept))
        return
    if counts:
        table = _guarded(lambda: committed.triton_counts_only(jobs, recompute=recompute, say=_say))
        _show(
            _chosen(table.rows.values(), None, kernel, "target"),
            as_json,
            as_csv,
            "Triton, PTX executed; times modelled",
        )
        return

    def rows() -> list[dict[str, str]]:
        wanted = [
            w for w in triton_table.wanted_rows()
            if kernel in w.identity[0] and (not arch or w.identity[3] in arch)
        ]  # fmt: skip
        known = committed.known(committed.TRITON, triton_table.IDENTITY, triton_table.toolchain(), recompute)
        stale = [w for w in wanted if known.get(w.identity, {}).get("key") != w.specialized.key]
        if stale:
            _say(f"compiling {len(stale)} of {len(wanted)} configurations")
        made = triton_table.compute_in_parallel(stale, jobs).rows
        return [made.get(w.identity) or known[w.identity] for w in wanted]

    _show(_guarded(rows), as_json, as_csv, "Triton kernels, compiled ahead of time")


@app.command("cuda", short_help="The CUDA C++ kernels of the last build.")
def inspect_cuda(
    arch: Arch = None,
    kernel: Kernel = "",
    counts: Counts = False,
    as_json: Json = False,
    as_csv: Csv = False,
    update: Update = False,
    check: Check = False,
    accept: Accept = False,
    recompute: Everything = False,
    jobs: Jobs = _CORES,
) -> None:
    """Registers, spills, shared memory, occupancy, width of loads, FMA share of the hot loop, and PyTorch's own beside.

    Reads the machine code of the last build, so it shows the architectures that were built. --counts shows what
    executing the PTX of every launch counted, with the modelled time and its ratio to the floor.
    """
    from sdan_fast.inspecting import committed

    if update or check:
        _guarded(lambda: _finish(committed.cuda(arch, jobs, recompute=recompute, say=_say), update, accept))
        return
    if counts:
        table = _guarded(lambda: committed.cuda_counts_only(recompute=recompute, say=_say))
        _show(
            _chosen(table.rows.values(), None, kernel, "arch"),
            as_json,
            as_csv,
            "CUDA, PTX executed; times modelled",
        )
        return
    table = _guarded(lambda: committed.cuda_table_only(arch, say=_say))
    _show(
        _chosen(table.rows.values(), arch, kernel, "arch"),
        as_json,
        as_csv,
        "CUDA C++ kernels of the last build",
    )


@app.command("model", short_help="The modelled times of SDAN's ops beside PyTorch's unfused sequence.")
def inspect_model(
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the page here (docs/gpu-model.md) instead."),
    ] = None,
) -> None:
    """A Markdown page made of the committed tables: modelled, not measured."""
    from sdan_fast.inspecting import report

    text = _guarded(report.page)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
