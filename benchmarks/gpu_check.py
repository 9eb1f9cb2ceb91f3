"""Everything that only a GPU can show, in one run: tests, compute-sanitizer, and times, written as JSON named after it.

    python benchmarks/gpu_check.py                # all of it; exit status 1 if anything fails or there is no GPU
    python benchmarks/gpu_check.py --only bench   # one of tests, sanitizer, bench: the others stay in the file
    python benchmarks/gpu_check.py --cases sdan   # minutes instead of an hour: SDAN's own size, without float16

The benchmarks are the cases of `sdan_fast.bench.cases` and the whole network, in inference and in training: every op,
forward and backward, on each of our GPU backends, against eager PyTorch in both layouts, cuDNN in channels_last and
Inductor, without TF32. What Triton and Inductor compile for them is compiled ahead, by a process for each core.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sdan_fast.bench import cases, measuring, model, peers, report, roofline, training
from sdan_fast.commands import machine
from sdan_fast.models.fitted import seeded_sdan

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
STAGES = ("tests", "sanitizer", "bench")
# What runs our kernels on the GPU; the rest of the suite shows the same on any machine.
TESTS = ("tests/ops", "tests/test_gpu.py", "tests/test_gpu_check.py")
WORKERS = min(16, os.cpu_count() or 1)  # each takes half a gigabyte of the GPU for its context
ROUNDS = 50
PEERS = ("eager", "Inductor")
NETWORK_DTYPES = ("float32", "bfloat16")


# --- tests and sanitizer -------------------------------------------------------------------------------------


def run_tests() -> dict[str, Any]:
    """The ops' tests on every backend and what needs a GPU; the closing line is kept."""
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-n", str(WORKERS), *TESTS]
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
    compile_ahead(
        [
            functools.partial(run_small, "cuda", [dtype], [op])
            for dtype in cases.DTYPES
            for op in cases.SUBJECTS
        ]
    )
    # Without PyTorch's cache of memory an overrun leaves its allocation.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(tool: str) -> bool:
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
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"--- compute-sanitizer {' '.join(command[1:])}\n{done.stdout}", flush=True)
        return done.returncode == 0

    with concurrent.futures.ThreadPoolExecutor() as pool:
        tools = dict(zip(SANITIZER_TOOLS, pool.map(run, SANITIZER_TOOLS), strict=True))
    return {"ok": all(tools.values()), "tools": tools}


def small_cases(dtype: str, ops: Sequence[str] = tuple(cases.SUBJECTS)) -> list[cases.Case]:
    """Every op with every usual setting: odd sizes, SDAN's channels in a thin picture, no picture at all."""
    return [
        cases.Case(subject, variant, size, dtype, batch)
        for subject in map(cases.SUBJECTS.__getitem__, ops)
        for variant in subject.variants
        if variant.usual
        for batch, size in ((2, (17, 31)), (1, (8, 64)), (0, (4, 4)))
    ]


def run_small(
    device: str,
    dtypes: Sequence[str] = tuple(cases.DTYPES),
    ops: Sequence[str] = tuple(cases.SUBJECTS),
) -> int:
    """Forward and backward of every small case on each of our backends that can; how many calls that were."""
    calls = 0
    for dtype in dtypes:
        for case in small_cases(dtype, ops):
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


def chosen_cases(which: str) -> list[cases.Case]:
    """ "all": every size and dtype; "sdan": SDAN's own size, float32 and bfloat16."""
    sizes = list(zip(cases.GPU_SIZES, cases.GPU_BATCHES, strict=True))
    dtypes = list(cases.DTYPES)
    if which == "sdan":
        sizes, dtypes = sizes[:1], ["float32", "bfloat16"]
    return [case for size, batch in sizes for case in cases.cases(sizes=[size], dtypes=dtypes, batch=batch)]


def run_benchmarks(
    device: str,
    *,
    rounds: int = ROUNDS,
    chosen: Sequence[cases.Case] | None = None,
    configuration: str = "180x320",
    step: str = "batch-8",
    competing: Sequence[str] = PEERS,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """The network and every op, printed as they come; `ok` if all of ours that ran are right, and each backend ran.

    No case is begun after so many seconds; "left_out" names those that were not.
    """
    no_tf32()
    until = time.monotonic() + seconds
    inductor = "first" if "Inductor" in competing else "none"
    who = peers.names(device, list(cases.LAYOUTS), inductor=inductor)
    chosen = chosen_cases("all") if chosen is None else chosen
    jobs: list[Callable[[], object]] = [
        functools.partial(call_once, case, passes, device, who) for case in chosen for passes in cases.PASSES
    ]
    if device == "cuda":
        if inductor != "none":
            jobs[:0] = [functools.partial(run_network, configuration, dtype) for dtype in NETWORK_DTYPES]
        compile_ahead(jobs)
    clock = measuring.Clock(device)
    limits = {
        dtype: roofline.measure(device, dtype=cases.DTYPES[dtype])
        for dtype in dict.fromkeys(case.dtype for case in chosen)
    }
    network = model.measure(
        model.CONFIGURATIONS[configuration],
        dtypes=NETWORK_DTYPES,
        device=device,
        peers=competing,
        everywhere=True,
        rounds=rounds,
    )
    for cells in report.model_lines(network):
        print("  ".join(f"{cell:>12}" for cell in cells), flush=True)
    steps = training.measure(
        model.CONFIGURATIONS[step], dtypes=NETWORK_DTYPES, device=device, peers=["eager"], rounds=rounds
    )
    for cells in report.model_lines(steps):
        print("  ".join(f"{cell:>12}" for cell in cells), flush=True)
    rows: list[measuring.Row] = []
    left_out: list[str] = []
    for case in chosen:
        for passes in cases.PASSES:
            if time.monotonic() > until:
                left_out.append(f"{case.name}, {passes}")
                continue
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
    ours = [row for row in rows if row.ours] + [run for run in network.runs + steps.runs if run.ours]
    ran = {entry.contender for entry in ours if entry.seconds}
    right = not any(entry.wrong for entry in ours)
    return {
        "ok": right and ran.issuperset(peers.backends_of(device)),
        "rounds": rounds,
        "limits": {dtype: report.limits_record(found) for dtype, found in limits.items()},
        "left_out": left_out,
        "rows": [row.record() for row in rows],
        "network": network.record(),
        "training": steps.record(),
    }


def no_tf32() -> None:
    """float32 is float32, for everyone."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def call_once(case: cases.Case, passes: str, device: str, who: Sequence[tuple[str, str]]) -> None:
    """Have every contender of a case compile what it compiles; what fails here fails again where it is measured."""
    for contender in peers.build(case, passes, device, who):
        if contender.refused is None and contender.name != "eager":
            with contextlib.suppress(Exception), contender.context():
                contender.call()


def run_network(configuration: str, dtype: str) -> None:
    """Inductor takes a minute over the network."""
    c = model.CONFIGURATIONS[configuration]
    network = model.Network(seeded_sdan(**c.model_settings), model.picture(c), dtype, "cuda")
    with torch.no_grad():
        network.contender("Inductor", "NCHW", ours=False).call()


def compile_ahead(jobs: Sequence[Callable[[], object]]) -> None:
    """Run the jobs in processes of their own: Triton and Inductor find in their caches on disk what those compiled."""
    print(f"compiling ahead for {len(jobs)} cases in {WORKERS} processes", flush=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_alone) as pool:
        done = [pool.submit(job) for job in jobs]
        for i, future in enumerate(concurrent.futures.as_completed(done), 1):
            if future.exception() is not None:
                print(f"  compiled when it is measured: {future.exception()}", flush=True)
            if i % 10 == 0 or i == len(jobs):
                print(f"  {i} of {len(jobs)}", flush=True)


def _alone() -> None:
    """One of many processes on this machine."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)
    no_tf32()


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
    parser.add_argument("--only", choices=STAGES, help="run one stage; the file keeps the others")
    parser.add_argument(
        "--cases", choices=("all", "sdan"), default="all", help="what to time (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="timed calls of each (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no further case after so many (default: no limit)",
    )
    parser.add_argument("--without-inductor", action="store_true", help="which takes most of the time")
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
    target = results_file(gpu)
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    found["gpu"] = gpu
    failed = []
    for stage in [options.only] if options.only else STAGES:
        print(f"--- {stage}", flush=True)
        where = report.header("cuda", " ".join(["gpu_check.py", *sys.argv[1:]]))
        if stage == "tests":
            result = run_tests()
        elif stage == "sanitizer":
            result = run_sanitizer()
        else:
            result = run_benchmarks(
                "cuda",
                rounds=options.rounds,
                chosen=chosen_cases(options.cases),
                competing=PEERS[:1] if options.without_inductor else PEERS,
                seconds=60 * options.minutes,
            )
        found[stage] = {**where, "cuda": torch.version.cuda, "build": machine.build_record(), **result}
        report.write(target, found)
        if result["ok"] is False:
            failed.append(stage)
    print(f"written: {target.relative_to(ROOT)}")
    print(f"gpu-check: {', '.join(failed)} failed" if failed else "gpu-check: every stage that ran passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
