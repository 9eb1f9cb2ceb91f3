"""The benchmarks' own code is sound, and the GPU check says so and fails where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))

import bench_star  # noqa: E402
import gpu_check  # noqa: E402
import measuring  # noqa: E402


def test_without_a_gpu_it_says_so_and_fails() -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no GPU was found" in done.stderr
    assert done.stdout == ""


def rehearse(subject: measuring.Subject) -> list[dict]:
    return measuring.measure(
        subject, (1, 4, 7, 9), torch.float32, "channels_last",
        device="cpu", backends=("cpu", "reference", "cuda"), clock=measuring.Clock("cpu"), rounds=3,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cuda backend would not refuse here")
def test_every_case_is_timed_or_refused() -> None:
    rows = rehearse(bench_star.SUBJECT)
    json.dumps(rows)
    refused = [row for row in rows if "refused" in row]
    assert [row["backend"] for row in refused] == ["cuda"]
    timed = {(row["direction"], row["backend"]): row for row in rows if "ms" in row}
    for direction, tensors in (("forward", 3), ("backward", 5)):
        for backend in ("eager", "reference"):
            row = timed[direction, backend]
            assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
            assert row["compulsory_bytes"] == tensors * 4 * 4 * 7 * 9
            share = tensors / 2 * row["clone_ms"]["p50"] / row["ms"]["p50"]
            assert row["share_of_clone_bandwidth"] == pytest.approx(share)
    for row in rows:
        assert measuring.line(row).startswith("star")


def test_a_wrong_kernel_gets_no_time() -> None:
    star = bench_star.SUBJECT

    def off(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return star.run(a, b) * (1 + 1e-5)

    rows = rehearse(measuring.Subject("star", star.make, off, star.plain, 3, 5))
    assert [row["backend"] for row in rows if row.get("wrong")] == ["cpu", "reference"] or not has_cpu()
    assert {row["backend"] for row in rows if "ms" in row} == {"eager"}
    assert any("WRONG, not timed" in measuring.line(row) for row in rows)


def has_cpu() -> bool:
    import sdan_fast

    return any(line.name == "cpu" and line.available for line in sdan_fast.status())


def test_every_benchmark_is_part_of_the_check() -> None:
    assert bench_star.SUBJECT in gpu_check.subjects()
    assert len(gpu_check.subjects()) == len(list(SCRIPT.parent.glob("bench_*.py")))


def test_percentiles_are_runs_that_took_place() -> None:
    assert measuring.percentiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"p20": 2.0, "p50": 3.0, "p80": 4.0}
    assert measuring.percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


def test_results_are_named_after_the_gpu() -> None:
    assert gpu_check.results_file("NVIDIA H200").name == "nvidia-h200.json"
    assert (
        gpu_check.results_file("NVIDIA GeForce RTX 4090 (48 GB)").name == "nvidia-geforce-rtx-4090-48-gb.json"
    )
