"""`sdan-fast info`: what is installed, what was built, which backends can run here, and what is missing."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import sdan_fast
from sdan_fast import backends

from . import machine, terminal

_REBUILD = "then install again (`make build` in a checkout, `pip install --no-build-isolation .` elsewhere)"


def print_version(wanted: bool) -> None:
    """The callback of `--version`."""
    if wanted:
        print(sdan_fast.__version__)
        raise typer.Exit()


def _hint(name: str, record: dict[str, Any] | None) -> str:
    """What a person can do about a backend that is not available; empty where nothing helps here."""
    entry = (record or {}).get(name) or {}
    built, gpus = entry.get("built"), bool(machine.gpus())
    if "SDAN_FAST_SKIP" in (entry.get("reason") or ""):
        return f"unset SDAN_FAST_SKIP_{name.upper()}, {_REBUILD}"
    if name == "cpu" and not built:
        return f"put a C++20 compiler (g++ 11 or later, clang++ 14 or later) on PATH, {_REBUILD}"
    if name == "cuda" and not built:
        return f"install the CUDA toolkit (nvcc; set CUDA_HOME if it is not found), {_REBUILD}"
    if name in ("cuda", "triton") and not gpus:
        return "run on a machine with a GPU, with a torch built for it"
    if name == "triton":
        return "pip install triton"
    return ""


def collect() -> dict[str, Any]:
    """Everything that `info` prints, ready for JSON."""
    record = machine.build_record()
    return {
        "versions": machine.versions(),
        "machine": machine.describe(),
        "build": record,
        "backend_in_force": backends.current_backend(),
        "backends": [
            {
                "name": line.name,
                "available": line.available,
                "reason": line.reason or None,
                "hint": None if line.available else _hint(line.name, record) or None,
            }
            for line in backends.status()
        ],
    }


def _build_lines(record: dict[str, Any] | None) -> list[tuple[str, str]]:
    if record is None:
        return [("extensions", "no record of a build: setup.py has not run here")]
    lines = []
    for kind in ("cpu", "cuda"):
        entry = record.get(kind)
        if not isinstance(entry, dict):
            continue
        if not entry.get("built"):
            lines.append((f"_C_{kind}", f"not built: {entry.get('reason')}"))
            continue
        what = entry.get("isas") or entry.get("archs") or []
        compilers = [str(entry[key]) for key in ("nvcc", "compiler") if entry.get(key)]
        lines.append((f"_C_{kind}", f"built for {', '.join(map(str, what))} with {' and '.join(compilers)}"))
    return lines


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Say what is installed, what was built, which backends can run here, and how to get what is missing."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    out = terminal.console()
    about = facts["machine"]

    grid = terminal.table("what", "is", title="This installation")
    for name, version in facts["versions"].items():
        grid.add_row(name, version or "not installed")
    for name, text in _build_lines(facts["build"]):
        grid.add_row(name, text)
    out.print(grid)

    grid = terminal.table("what", "is", title="\nThis machine")
    grid.add_row("system", about["system"])
    grid.add_row("processor", about["cpu"])
    kernels, cap = about["kernel_instruction_set"], about["kernel_instruction_set_cap"]
    grid.add_row(
        "instruction set",
        f"{kernels or 'no'} kernels"
        + (f", capped by SDAN_FAST_CPU_ISA={cap}" if cap else "")
        + f"; torch uses {about['cpu_instruction_set']}",
    )
    grid.add_row("threads", f"{about['threads']} of {about['cores']} cores")
    for gpu in about["gpus"]:
        grid.add_row(
            "GPU", f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB"
        )
    if not about["gpus"]:
        grid.add_row("GPU", "none that torch sees")
    out.print(grid)

    grid = terminal.table(
        "backend", "runs here", "why not, and what to do", title="\nBackends, in the order of 'auto'"
    )
    for line in facts["backends"]:
        if line["available"]:
            grid.add_row(line["name"], "yes", "")
        else:
            grid.add_row(
                line["name"], "no", line["reason"] + (f"\n-> {line['hint']}" if line["hint"] else "")
            )
    out.print(grid)
    out.print(f"\nIn force: {facts['backend_in_force']} (use_backend, or the variable SDAN_FAST_BACKEND)")
