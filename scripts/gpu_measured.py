"""Write docs/gpu-measured.md's tables: kernels' measured times on GPUs beside the modelled ones.

    python scripts/gpu_measured.py            # write
    python scripts/gpu_measured.py --check    # exit status 1 if the page is out of date

From benchmarks/results/*-kernels.json (`python benchmarks/gpu_kernels.py` on a GPU) and the committed counts. The prose
of the page is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from typing import Any

import generated
from sdan_fast.inspecting import committed, cuda_counts, triton_counts
from sdan_fast.inspecting.devices import GPUS

PAGE = generated.ROOT / "docs" / "gpu-measured.md"
RESULTS = generated.ROOT / "benchmarks" / "results"
COMMAND = "python scripts/gpu_measured.py"
BACKENDS = {"triton": "Triton", "cuda": "CUDA C++"}


def modelled(gpu: str) -> dict[tuple[str, str], float]:
    """Microseconds by (backend, call), where the GPU is one of those that are modelled."""
    name = next((name for name in GPUS if name in gpu), None)
    tables = {
        "triton": committed.load(committed.TRITON_COUNTS, triton_counts.IDENTITY),
        "cuda": committed.load(committed.CUDA_COUNTS, cuda_counts.IDENTITY),
    }
    found: dict[tuple[str, str], float] = defaultdict(float)
    for backend, table in tables.items():
        for row in table.rows.values() if table is not None and name is not None else ():
            found[backend, row["call"]] += float(row[f"{name}_us"])
    return dict(found)


def calls(record: dict[str, Any]) -> str:
    """A line for each call: measured and modelled, on each backend."""
    model = modelled(record["gpu"])
    measured: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for row in record["rows"]:
        measured[row["call"]][row["backend"]] = [kernel["us"] for kernel in row["kernels"]]
    head = ["call"]
    for title in BACKENDS.values():
        head += [f"{title}: kernels", "us", "modelled"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for call, by_backend in measured.items():
        cells = [call]
        for backend in BACKENDS:
            times, expected = by_backend.get(backend), model.get((backend, call))
            cells += [str(len(times)), f"{sum(times):.1f}"] if times else ["-", "-"]
            cells.append(f"{expected:.1f}" if times and expected else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernels(record: dict[str, Any]) -> str:
    """Each kernel's own time, call by call, of the calls that take more than one."""
    lines = ["| call | backend | kernels, us |", "|---|---|---|"]
    for row in record["rows"]:
        if len(row["kernels"]) > 1:
            found = "; ".join(f"`{_short(k['kernel'])}` {k['us']:.1f}" for k in row["kernels"])
            lines.append(f"| {row['call']} | {BACKENDS[row['backend']]} | {found} |")
    return "\n".join(lines)


def _short(name: str) -> str:
    """A kernel's name without its namespaces and parameters."""
    name = name.removeprefix("void ")
    name = re.sub(r"(sdan_fast::cuda|at::native|\(anonymous namespace\))::", "", name)
    head = re.match(r"[\w:]+(<[\w, :<>]*?>(?=\())?", name)
    return (head.group(0) if head else name)[:70]


def page(text: str) -> str:
    """The page with its tables anew."""
    for path in sorted(RESULTS.glob("*-kernels.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        gpu = path.name.removesuffix("-kernels.json")
        versions = record["versions"]
        where = (
            f"{record['gpu']}, PyTorch {versions['torch']}, Triton {versions['triton']}, {record['when'][:10]}, "
            f"commit {record['commit'][:10]}:\n\n"
        )
        text = generated.replace(text, f"{gpu} calls", where + calls(record), COMMAND)
        text = generated.replace(text, f"{gpu} kernels", kernels(record), COMMAND)
    return text


def main() -> int:
    """0 if the page is up to date or was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail if the page is out of date"
    )
    options = parser.parse_args()
    return generated.update(
        PAGE, page(PAGE.read_text(encoding="utf-8")), check=options.check, command=COMMAND
    )


if __name__ == "__main__":
    sys.exit(main())
