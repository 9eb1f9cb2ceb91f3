"""Everything that only a GPU can show, in one run: tests, compute-sanitizer, and times, written as JSON named after it.

    python benchmarks/gpu_check.py                # all of it; exit status 1 if anything fails or there is no GPU
    python benchmarks/gpu_check.py --only bench   # one of tests, sanitizer, bench; writes nothing

The benchmarks are those of every bench_<op>.py in this folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import sdan_fast
from measuring import BACKENDS, DTYPES, LAYOUTS, ROUNDS, Subject, arguments, benchmark, describe, gradients
from sdan_fast.commands import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def subjects() -> list[Subject]:
    """What every bench_<op>.py beside this file measures."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return [importlib.import_module(name).SUBJECT for name in names]


# --- tests and sanitizer -------------------------------------------------------------------------------------


def run_tests() -> dict[str, Any]:
    """The whole test suite on this machine; its closing line is kept."""
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "tests"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for text in process.stdout:
            print(text, end="", flush=True)
            last = text.strip() or last
    return {"ok": process.returncode == 0, "exit_status": process.returncode, "summary": last.strip("= ")}


def find_sanitizer() -> str | None:
    """compute-sanitizer: on PATH, or in the toolkit that the extension was built with, or in /usr/local/cuda."""
    record = machine.build_record() or {}
    roots = [record.get("cuda", {}).get("cuda_root"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(root) / folder for root in roots if root for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next(
        (found for place in places if (found := shutil.which("compute-sanitizer", path=str(place)))), None
    )


def run_sanitizer() -> dict[str, Any]:
    """Small calls of every subject under each tool; `ok` is None where compute-sanitizer is not installed."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "compute-sanitizer was not found, so no kernel was run under it (it comes with the CUDA toolkit)"
        )
        return {"ok": None, "reason": "compute-sanitizer was not found"}
    tools: dict[str, bool] = {}
    for tool in SANITIZER_TOOLS:
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "86",
            sys.executable,
            __file__,
            "--workload",
        ]
        env = {
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }  # so that an overrun leaves its allocation
        print(f"compute-sanitizer --tool {tool}", flush=True)
        tools[tool] = subprocess.run(command, env=env).returncode == 0
    return {"ok": all(tools.values()), "tools": tools}


def workload() -> None:
    """What runs under the sanitizer: every subject, dtype and layout, small, on every GPU backend that can."""
    for subject in subjects():
        for shape in ((2, 5, 17, 31), (1, 56, 8, 64), (0, 4, 4, 4)):
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    args = arguments(subject, shape, dtype, layout, "cuda")
                    for backend in BACKENDS["cuda"]:
                        refusal = sdan_fast.explain(subject.name, *args).reasons.get(backend)
                        if refusal is None or "comes first" in refusal:
                            with sdan_fast.use_backend(backend):
                                gradients(subject.run, args, torch.randn_like(args[0]))
    torch.cuda.synchronize()


# --- all of it -----------------------------------------------------------------------------------------------


def commit() -> str | None:
    """The commit of this checkout, with a plus if files differ from it; None outside of git."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    ).stdout.strip()
    return head.stdout.strip() + ("+" if dirty else "")


def results_file(gpu: str) -> Path:
    """benchmarks/results/<gpu>.json, the name in lower case with dashes."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def main() -> int:
    """0 if every stage that ran passed, 1 if one failed or no GPU was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", choices=("tests", "sanitizer", "bench"), help="run one stage, write nothing"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS["cuda"], help="timed calls of each (default: %(default)s)"
    )
    parser.add_argument("--workload", action="store_true", help="only the calls that the sanitizer watches")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no device"
        print(
            f"gpu-check: no GPU was found ({why}; torch {torch.__version__}); nothing was checked",
            file=sys.stderr,
        )
        return 1
    if options.workload:
        workload()
        return 0

    gpu = torch.cuda.get_device_name()
    print(f"gpu-check on {gpu}, torch {torch.__version__}")
    stages = [options.only] if options.only else ["tests", "sanitizer", "bench"]
    found: dict[str, Any] = {
        "gpu": gpu,
        "commit": commit(),
        **describe(),
    }
    failed = []
    for stage in stages:
        print(f"--- {stage}", flush=True)
        if stage == "tests":
            found[stage] = run_tests()
        elif stage == "sanitizer":
            found[stage] = run_sanitizer()
        else:
            rows = benchmark(subjects(), "cuda", options.rounds)
            ran = {row["backend"] for row in rows if "ms" in row}
            ok = not any("wrong" in row for row in rows) and ran.issuperset(BACKENDS["cuda"])
            found[stage] = {"ok": ok, "rounds": options.rounds, "rows": rows}
        if found[stage]["ok"] is False:
            failed.append(stage)
    if not options.only:
        target = results_file(gpu)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written: {target.relative_to(ROOT)}")
    print(f"gpu-check: {', '.join(failed)} failed" if failed else "gpu-check: every stage that ran passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
