"""Everything that only a GPU can show, in one run: tests, compute-sanitizer, and times, written as JSON named after it.

    python benchmarks/gpu_check.py                # all of it; exit status 1 if anything fails or there is no GPU
    python benchmarks/gpu_check.py --only bench   # one of tests, sanitizer, bench; writes nothing

The benchmarks are the cases of `sdan_fast.bench.cases` and the whole network: every op, forward and backward, on each
of our GPU backends, against eager PyTorch in both layouts, cuDNN in channels_last and Inductor, without TF32.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdan_fast.bench import cases, measuring, model, peers, report, roofline
from sdan_fast.commands import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


ROUNDS = 50


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


def small_cases(dtype: str) -> list[cases.Case]:
    """Every op with every usual setting: odd sizes, SDAN's channels in a thin picture, no picture at all."""
    return [
        cases.Case(subject, variant, size, dtype, batch)
        for subject in cases.SUBJECTS.values()
        for variant in subject.variants
        if variant.usual
        for batch, size in ((2, (17, 31)), (1, (8, 64)), (0, (4, 4)))
    ]


def run_small(device: str, dtypes: Sequence[str] = tuple(cases.DTYPES)) -> int:
    """Forward and backward of every small case on each of our backends that can; how many calls that were."""
    calls = 0
    for dtype in dtypes:
        for case in small_cases(dtype):
            for who in peers.names(device, list(cases.LAYOUTS), inductor="none"):
                if who[0] not in peers.backends_of(device):
                    continue
                for contender in peers.build(case, "forward+backward", device, [who]):
                    if contender.refused is None:
                        with contender.context():
                            contender.call()
                        calls += 1
    return calls


def workload() -> None:
    """What runs under the sanitizer."""
    calls = run_small("cuda")
    torch.cuda.synchronize()
    print(f"{calls} calls of small cases")


# --- benchmarks ----------------------------------------------------------------------------------------------


def run_benchmarks(
    device: str,
    *,
    rounds: int = ROUNDS,
    chosen: Sequence[cases.Case] | None = None,
    configuration: str = "180x320",
    competing: Sequence[str] = ("eager", "Inductor"),
) -> dict[str, Any]:
    """Every op and the network, printed as they come; `ok` if all of ours that ran are right, and each backend ran."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    inductor = "first" if "Inductor" in competing else "none"
    who = peers.names(device, list(cases.LAYOUTS), inductor=inductor)
    if chosen is None:
        chosen = [
            case
            for size, batch in zip(cases.GPU_SIZES, cases.GPU_BATCHES, strict=True)
            for case in cases.cases(sizes=[size], dtypes=cases.DTYPES, batch=batch)
        ]
    clock = measuring.Clock(device)
    limits = {
        dtype: roofline.measure(device, dtype=cases.DTYPES[dtype])
        for dtype in dict.fromkeys(case.dtype for case in chosen)
    }
    rows: list[measuring.Row] = []
    for case in chosen:
        for passes in cases.PASSES:
            rows += measuring.measure(
                case,
                passes,
                who,
                device=device,
                clock=clock,
                limits=limits[case.dtype],
                rounds=rounds,
                budget=60,
            )
            for row in rows[-len(who) :]:
                print(line(row), flush=True)
    network = model.measure(
        model.CONFIGURATIONS[configuration], device=device, peers=competing, everywhere=True, rounds=rounds
    )
    for cells in report.model_lines(network):
        print("  ".join(f"{cell:>12}" for cell in cells), flush=True)
    ours = [row for row in rows if row.ours] + [run for run in network.runs if run.ours]
    ran = {entry.contender for entry in ours if entry.seconds}
    return {
        "ok": not any(entry.wrong for entry in ours) and ran.issuperset(peers.backends_of(device)),
        "rounds": rounds,
        "limits": {dtype: report.limits_record(found) for dtype, found in limits.items()},
        "rows": [row.record() for row in rows],
        "network": network.record(),
    }


def line(row: measuring.Row) -> str:
    """One contender of one case: p20, p50 and p80 in milliseconds, share of torch.clone, the best peer over it."""
    head = f"{row.case.name}, {row.passes}, {row.contender} {row.layout}: "
    if row.wrong:
        return f"{head}WRONG, not timed: {row.share} times the error bound {row.refused}".rstrip()
    if row.refused:
        return f"{head}refused: {row.refused}"
    ms = {name: 1e3 * seconds for name, seconds in measuring.percentiles(row.seconds).items()}
    times = "  ".join(f"{name} {value:.4f}" for name, value in ms.items())
    found = row.figures or {}
    return (
        f"{head}{times} ms  {found['share_of_clone_bandwidth']:.0%} of clone  "
        f"best peer over it {found['best_peer_over_this']:.2f}"
    )


# --- all of it -----------------------------------------------------------------------------------------------


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
        "--rounds", type=int, default=ROUNDS, help="timed calls of each (default: %(default)s)"
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
        **report.header("cuda", " ".join(["gpu_check.py", *sys.argv[1:]])),
        "cuda": torch.version.cuda,
        "build": machine.build_record(),
    }
    failed = []
    for stage in stages:
        print(f"--- {stage}", flush=True)
        if stage == "tests":
            found[stage] = run_tests()
        elif stage == "sanitizer":
            found[stage] = run_sanitizer()
        else:
            found[stage] = run_benchmarks("cuda", rounds=options.rounds)
        if found[stage]["ok"] is False:
            failed.append(stage)
    if not options.only:
        target = results_file(gpu)
        report.write(target, found)
        print(f"written: {target.relative_to(ROOT)}")
    print(f"gpu-check: {', '.join(failed)} failed" if failed else "gpu-check: every stage that ran passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
