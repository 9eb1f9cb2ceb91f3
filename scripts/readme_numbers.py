"""Write the tables of README.md's "How fast" and docs/performance.md's from the results of `sdan-fast bench`.

python scripts/readme_numbers.py             # from benchmarks/results/cpu-*.json
python scripts/readme_numbers.py --check     # exit status 1 if a page says something else
python scripts/readme_numbers.py --measure   # first measure what this processor can: ten minutes
python scripts/readme_numbers.py --measure cpu-training.json    # only that one
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import generated

README = generated.ROOT / "README.md"
PERFORMANCE = generated.ROOT / "docs" / "performance.md"
RESULTS = generated.ROOT / "benchmarks" / "results"
COMMAND = "python scripts/readme_numbers.py"
_OPS = ("bench", "ops", "--device", "cpu", "--size", "180x320", "--pass", "forward", "--seconds", "40")
_MODEL = ("bench", "model", "--device", "cpu", "--seconds", "30")
# What --measure runs; the files are the source of every number in the tables. A processor measures those of its own
# kind: where it has more, the peers would take it.
MEASURED: dict[str, tuple[str, ...]] = {
    "cpu-model.json": _MODEL,
    "cpu-ops.json": _OPS,
    "cpu-training.json": ("bench", "training", "--device", "cpu", "--seconds", "60"),
    "cpu-model-amx.json": _MODEL,
    "cpu-ops-amx.json": _OPS,
    "cpu-model-avx2.json": _MODEL,
    "cpu-ops-avx2.json": _OPS,
}


def here() -> list[str]:
    """The files that this processor can measure: training with what it has, and inference of its kind."""
    from sdan_fast.backends import kernel_instruction_set  # takes seconds, which --check has no use for

    kinds = {"avx2": "-avx2", "avx512+amx": "-amx"}
    kind = kinds.get(kernel_instruction_set() or "", "")
    return [f"cpu-model{kind}.json", f"cpu-ops{kind}.json", "cpu-training.json"]


def where(result: dict[str, Any]) -> str:
    """Machine, versions and commit in one sentence."""
    machine, versions = result["machine"], result["versions"]
    packages = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    words = ", ".join(f"{name} {versions[key]}" for key, name in packages.items() if versions.get(key))
    commit = (result["commit"] or "unknown")[:10]
    processor = f"{machine['cpu']}, {machine['threads']} threads, {machine['kernel_instruction_set']}"
    return f"{processor}; {words}; {result['when'][:10]}, commit {commit}"


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.{2 if value < 10 else 1}f}"


def who(run: dict[str, Any]) -> str:
    """A contender's name in a table."""
    name = f"sdan_fast, {run['contender']}" if run["ours"] else run["contender"]
    name = "eager PyTorch" if name == "eager" else name
    return f"{name}, {run['layout']}" if run["layout"] else name


def model_tables(result: dict[str, Any], floor_of: str = "multiply-adds at the FMA rate") -> str:
    """One table for each network and dtype."""
    parts = [f"`{result['command']}` ({where(result)}):"]
    for report in result["reports"]:
        n, _, height, width = report["input"]
        model = report["model"]
        parts.append(
            f"SDAN x{model['scale']}, {model['channels']} channels, {model['blocks']} blocks, "
            f"groups={model['groups']}, on {f'{n} x ' if n > 1 else ''}{height} x {width}:"
        )
        lines = [
            "| run | dtype | median ms | best peer / this | x the floor | peak MiB |",
            "|---|---|---|---|---|---|",
        ]
        for dtype, floor in report["floor_seconds"].items():
            for run in report["runs"]:
                if run["dtype"] == dtype:
                    lines.append(_model_line(run))
            lines.append(f"| floor: {floor_of} | {dtype} | {milliseconds(floor)} | | 1.00 | |")
        parts.append("\n".join(lines))
        parts += _psnr(report)
    return "\n\n".join(parts)


def _model_line(run: dict[str, Any]) -> str:
    head = f"| {who(run)} | {run['dtype']} |"
    if "seconds" not in run:
        return f"{head} {_why(run)} | | | |"
    peak = run.get("peak_bytes_of_a_forward")
    cells = [
        milliseconds(run["seconds"]["median"]),
        f"{run['best_peer_over_this']:.2f}",
        f"{run['times_the_floor']:.2f}",
        "" if peak is None else f"{peak / 2**20:.0f}",
    ]
    return f"{head} {' | '.join(cells)} |".replace("|  |", "| |")


def _why(run: dict[str, Any]) -> str:
    if run.get("wrong"):
        return f"not within the error bound ({run.get('share_of_error_bound', float('nan')):.2f} of it), not timed"
    return f"not run: {run.get('refused', 'for an unknown reason')}"


def _psnr(report: dict[str, Any]) -> list[str]:
    found = [(who(run), run["psnr_to_float32_db"]) for run in report["runs"] if "psnr_to_float32_db" in run]
    if not found:
        return []
    values = "; ".join(f"{name} {value:.1f} dB" for name, value in found)
    return [f"bfloat16 against float32 on three photographs (peak 1): {values}."]


def ops_table(result: dict[str, Any]) -> str:
    """One line for each case, direction and layout of ours."""
    columns = [
        *("op", "input", "pass", "ours", "median ms", "best peer", "its median", "best peer / ours"),
        *("of clone", "of FMA", "x the floor"),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows = result["rows"]
    slower = total = 0
    for row in rows:
        if not row["ours"]:
            continue
        peers = [r for r in rows if not r["ours"] and _case(r) == _case(row) and "seconds" in r]
        best = min(peers, key=lambda r: r["seconds"]["median"], default=None)
        shape = "x".join(map(str, row["shape"]))
        words = f"{row['op']} {row['variant']}".rstrip(), f"{shape} {row['dtype']}", row["pass"]
        head = f"| {' | '.join(words)} | {row['contender']} {row['layout']} |"
        if "seconds" not in row or best is None:
            lines.append(f"{head} {_why(row)} | | | | | | |")
            continue
        total += 1
        slower += row["best_peer_over_this"] < 1
        cells = [
            milliseconds(row["seconds"]["median"]),
            f"{best['contender']} {best['layout']}",
            milliseconds(best["seconds"]["median"]),
            f"{row['best_peer_over_this']:.2f}",
            f"{row['share_of_clone_bandwidth']:.0%}",
            f"{row['share_of_fma_rate']:.0%}",
            f"{row['times_the_floor']:.2f}",
        ]
        lines.append(f"{head} {' | '.join(cells)} |")
    table = "\n".join(lines)
    return (
        f"`{result['command']}` ({where(result)}): {total - slower} of {total} runs at least as fast as their best "
        f"peer (eager PyTorch in both layouts, Inductor).\n\n{table}"
    )


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["variant"], tuple(row["shape"]), row["dtype"], row["pass"]


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def blocks() -> list[tuple[Path, str, str]]:
    """The pages' generated blocks: where, their names and what they say."""
    steps = "three times a forward's multiply-adds at the FMA rate"
    return [
        (README, "model numbers", model_tables(load("cpu-model.json"))),
        (README, "AMX model numbers", model_tables(load("cpu-model-amx.json"))),
        (README, "AVX2 model numbers", model_tables(load("cpu-model-avx2.json"))),
        (README, "training numbers", model_tables(load("cpu-training.json"), steps)),
        (README, "op numbers", ops_table(load("cpu-ops.json"))),
        (PERFORMANCE, "AMX op numbers", ops_table(load("cpu-ops-amx.json"))),
        (PERFORMANCE, "AVX2 op numbers", ops_table(load("cpu-ops-avx2.json"))),
    ]


def page(path: Path, text: str) -> str:
    """README.md or docs/performance.md with its numbers."""
    for of, name, content in blocks():
        if of == path:
            text = generated.replace(text, name, content, COMMAND)
    return text


def measure(command: Sequence[str], target: Path) -> int:
    """Run one benchmark into its file; its exit status."""
    print(f"==> sdan-fast {' '.join(command)} --json {target.relative_to(generated.ROOT)}", flush=True)
    arguments = [*command, "--json", str(target.relative_to(generated.ROOT))]
    return subprocess.run([sys.executable, "-m", "sdan_fast", *arguments], cwd=generated.ROOT).returncode


def main() -> int:
    """0 if the pages are, or now are, what the results say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 if a page differs"
    )
    parser.add_argument(
        "--measure", nargs="*", metavar="FILE", choices=list(MEASURED), help="measure again before writing"
    )
    options = parser.parse_args()
    status = 0
    if options.measure is not None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name in options.measure or here():
            status |= measure(MEASURED[name], RESULTS / name)
    try:
        new = {path: page(path, path.read_text(encoding="utf-8")) for path in (README, PERFORMANCE)}
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in new.items():
        status |= generated.update(path, text, check=options.check, command=COMMAND)
    return status


if __name__ == "__main__":
    sys.exit(main())
