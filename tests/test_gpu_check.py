"""The GPU check covers every op and the network, and says so and fails where there is no GPU."""

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

import gpu_check  # noqa: E402
from sdan_fast import functional  # noqa: E402
from sdan_fast.bench import cases, measuring, peers, report  # noqa: E402


@pytest.mark.parametrize("script", ["gpu_check.py", "gpu_kernels.py"])
def test_without_a_gpu_it_says_so_and_fails(script: str) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name(script))], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no GPU was found" in done.stderr
    assert done.stdout == ""


def test_the_sanitizer_sees_every_op_in_every_layout() -> None:
    """The same calls on this machine's own backend: nothing refuses them."""
    assert {case.subject.op for case in gpu_check.small_cases("float32")} == set(cases.SUBJECTS)
    ours = [who for who in peers.names("cpu", list(cases.LAYOUTS), inductor="none") if who[0] == "cpu"]
    expected = len(gpu_check.small_cases("float32")) * len(ours)
    if not has_cpu():
        expected = 0
    assert gpu_check.run_small("cpu", ["float32"]) == expected


def has_cpu() -> bool:
    import sdan_fast

    return any(line.name == "cpu" and line.available for line in sdan_fast.status())


def test_on_a_gpu_everything_competes() -> None:
    who = peers.names("cuda", list(cases.LAYOUTS))
    assert {name for name, _ in who} == {"triton", "cuda", "eager", "cuDNN", "Inductor"}
    assert {layout for name, layout in who if name == "eager"} == set(cases.LAYOUTS)
    assert ("cuDNN", "channels_last") in who
    covered = set(cases.SUBJECTS) | {"separable_conv2d"}  # the chain of one stage, and the same op
    assert covered == set(functional.__all__)


@pytest.mark.slow
def test_a_rehearsal_of_the_benchmarks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of the stage, on a CPU: every op small, the network small, each row timed with percentiles."""
    from sdan_fast.bench import model, roofline

    monkeypatch.setattr(roofline, "measure", lambda *_, **__: roofline.Roofline(1e10, 1e11))
    tiny = model.Configuration("tiny", 9, 11, channels=8, blocks=1, scale=2)
    monkeypatch.setitem(model.CONFIGURATIONS, "tiny", tiny)
    chosen = [cases.Case(subject, subject.variants[0], (7, 9)) for subject in cases.SUBJECTS.values()]
    found = gpu_check.run_benchmarks(
        "cpu", rounds=3, chosen=chosen, configuration="tiny", step="tiny", competing=["eager"]
    )
    report.write(tmp_path / "out.json", found)
    found = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert found["ok"] == has_cpu()
    rows = found["rows"]
    assert {(row["op"], row["pass"]) for row in rows} == {
        (op, passes) for op in cases.SUBJECTS for passes in cases.PASSES
    }
    for row in rows:
        if "refused" in row:
            assert row["refused"] in printed
            continue
        assert row["share_of_error_bound"] <= 1 or not row["ours"]
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"]
        assert row["share_of_clone_bandwidth"] > 0
        assert row["best_peer_over_this"] > 0
    assert {run["contender"] for run in found["network"]["runs"]} == {"cpu", "eager"}
    assert "WRONG" not in printed
    steps = found["training"]["runs"]
    assert {(s["contender"], s["layout"], s["dtype"]) for s in steps} == {
        (who, layout, dtype)
        for who in ("eager", "cpu")
        for layout in cases.LAYOUTS
        for dtype in ("float32", "bfloat16")
    }
    for step in steps:
        if "refused" in step:
            assert step["contender"] == "eager" and step["layout"] == "channels_last", step
        else:
            assert step["share_of_error_bound"] <= 1 and step["seconds"]["p50"] > 0


def test_results_are_named_after_the_gpu() -> None:
    assert gpu_check.results_file("NVIDIA H200").name == "nvidia-h200.json"
    assert (
        gpu_check.results_file("NVIDIA GeForce RTX 4090 (48 GB)").name == "nvidia-geforce-rtx-4090-48-gb.json"
    )


def test_a_line_for_each_outcome() -> None:
    case = cases.cases(ops=["star"], sizes=[(4, 4)])[0]
    row = measuring.Row(case, "forward", "cuda", "NCHW", True, share=2.5, wrong=True)
    assert "WRONG, not timed: 2.5 times the error bound" in gpu_check.line(row)
    row = measuring.Row(case, "forward", "cuda", "NCHW", True, refused="no kernel")
    assert gpu_check.line(row).endswith("refused: no kernel")


def test_cases_of_the_short_check() -> None:
    short, whole = (gpu_check.chosen_cases(which) for which in ("sdan", "all"))
    assert {case.name for case in short} < {case.name for case in whole}
    assert {case.subject.op for case in short} == set(cases.SUBJECTS)
    assert {(case.batch, *case.size) for case in short} == {(8, 180, 320)}


def test_time_that_is_up_leaves_cases_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cases: the network and its training, which come first, are measured in the rehearsal."""
    from sdan_fast.bench import model, roofline, training

    monkeypatch.setattr(roofline, "measure", lambda *_, **__: roofline.Roofline(1e10, 1e11))
    tiny = model.Configuration("tiny", 5, 6, channels=4, blocks=1, scale=1)
    monkeypatch.setitem(model.CONFIGURATIONS, "tiny", tiny)
    for measured in (model, training):
        monkeypatch.setattr(measured, "measure", lambda *_, **__: model.Report(tiny, 1, {}, {}, [], False))
    case = cases.Case(cases.SUBJECTS["star"], cases.SUBJECTS["star"].variants[0], (3, 4))
    found = gpu_check.run_benchmarks(
        "cpu", rounds=1, chosen=[case], configuration="tiny", step="tiny", competing=["eager"], seconds=-1
    )
    assert found["rows"] == []
    assert found["left_out"] == [f"{case.name}, {passes}" for passes in cases.PASSES]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_of_a_gpu() -> None:
    x = torch.ones(2**20, device="cuda")
    assert 0 < measuring.Clock("cuda").seconds(x.clone) < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_a_call() -> None:
    import gpu_kernels

    x = torch.ones(2**20, device="cuda")
    flush = torch.empty(gpu_kernels.FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    found = gpu_kernels.kernels_of(lambda: x.exp().log(), flush)
    assert len(found) == 2 and all(0 < kernel["us"] < 1e4 for kernel in found)
