"""The benchmarks: their registry, their verification and arithmetic, what they print, and what README.md quotes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from sdan_fast import functional
from sdan_fast.bench import cases, engines, measuring, memory, model, peers, plain, report, roofline
from sdan_fast.cli import app
from sdan_fast.models import SDAN
from sdan_fast.models.fitted import seeded_sdan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import cli_reference  # noqa: E402
import readme_numbers  # noqa: E402

import generated  # noqa: E402

LIMITS = roofline.Roofline(clone_bandwidth=1e10, gemm_rate=1e11, fma_rate=2e11)
EAGER = [("eager", "NCHW"), ("eager", "channels_last")]


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", lambda *_, **__: LIMITS)


# --- the registry ------------------------------------------------------------------------------------------------


def test_every_op_has_cases_and_a_file() -> None:
    covered = set(cases.SUBJECTS) | {"separable_conv2d"}  # the chain of one stage, and the same op
    assert covered == set(functional.__all__)
    for op in cases.SUBJECTS:
        assert f'benchmark_of("{op}")' in (ROOT / "benchmarks" / f"bench_{op}.py").read_text()
        assert cases.cases(ops=[op])


def test_the_full_set_is_what_was_promised() -> None:
    full = cases.cases(full=True, dtypes=["float32"])
    convolutions = [c.variant.options for c in full if c.subject.op == "depthwise_conv2d"]
    assert {max(o["kernel"]) for o in convolutions} >= {3, 35}
    assert {o["dilation"] for o in convolutions} == {1, 2, 3, 4, 5, 6}
    assert {(16, 16), (1080, 1920)} <= {c.size for c in full}
    assert {c.variant.name for c in full if c.subject.op == "mm_lka"} == {f"groups={g}" for g in (1, 2, 3, 4)}
    assert len({c.name for c in full}) == len(full)
    assert {c.name for c in cases.cases()} <= {c.name for c in full}
    with pytest.raises(ValueError, match=r"must be one of .*, and it is 'softmax'"):
        cases.cases(ops=["softmax"])


def test_arguments_are_the_same_numbers_in_every_layout() -> None:
    case = cases.cases(ops=["mm_lka"], sizes=[(5, 6)])[0]
    one, other = (cases.tensors(case.arguments(layout)) for layout in cases.LAYOUTS)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    assert other[0].is_contiguous(memory_format=torch.channels_last)


def test_backward_is_measured_where_it_is_short() -> None:
    jobs = cases.jobs(cases.cases(sizes=[(8, 8), (16, 16)]))
    backward = [case for case, passes in jobs if passes == "forward+backward"]
    assert {case.size for case in backward} == {(8, 8)}
    assert {case.subject.op for case in backward} == set(cases.SUBJECTS) - {"sdm", "rsdam"}
    assert {passes for _, passes in cases.jobs(cases.cases(), "forward")} == {"forward"}


# --- arithmetic --------------------------------------------------------------------------------------------------


def test_work_of_a_case() -> None:
    case = cases.cases(ops=["depthwise_conv2d"], sizes=[(8, 9)])[0]
    image, parameters = 4 * 28 * 8 * 9, 4 * (28 * 9 + 28)
    work = measuring.work(case, "forward")
    assert work == measuring.Work(28 * 8 * 9 * 9, 2 * image + parameters)
    both = measuring.work(case, "forward+backward")
    assert both.bytes == 5 * image + 3 * parameters
    assert both.multiply_adds == 3 * work.multiply_adds
    star = cases.cases(ops=["star"], sizes=[(8, 9)])[0]
    assert measuring.work(star, "forward").bytes == 3 * 4 * 56 * 8 * 9


def test_figures() -> None:
    found = measuring.figures(0.5, measuring.Work(10**10, 10**9), 0.1, 10**9, LIMITS, best_peer=0.75)
    assert found["gigabytes_per_second"] == pytest.approx(2)
    assert found["gigaflops"] == pytest.approx(40)
    assert found["share_of_clone_bandwidth"] == pytest.approx(0.2)
    assert found["share_of_fma_rate"] == pytest.approx(0.2)
    assert found["floor_seconds"] == pytest.approx(0.1)
    assert found["times_the_floor"] == pytest.approx(5)
    assert found["best_peer_over_this"] == pytest.approx(1.5)


def test_percentiles_are_rounds_that_took_place() -> None:
    assert measuring.percentiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"p20": 2.0, "p50": 3.0, "p80": 4.0}
    assert measuring.percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.2, "1.20 s"), (0.0129, "12.9 ms"), (345e-6, "345 us"), (4e-8, "0.04 us")]
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def contender(name: str) -> peers.Contender:
        return peers.Contender(name, "NCHW", False, lambda: calls.append(name) or ())  # type: ignore[func-returns-value]

    class Once(measuring.Clock):
        def repeats(self, function: Callable[[], object]) -> int:
            return 1

    times = measuring.race([contender(name) for name in "ABC"], Once("cpu"), rounds=4)
    assert "".join(calls) == "ABC" * 4
    assert [len(seconds) for seconds in times] == [4, 4, 4]
    calls.clear()
    measuring.race([contender("A")], Once("cpu"), rounds=100, budget=0)
    assert len(calls) == roofline.LEAST_ROUNDS


def test_the_fma_rate_is_no_less_than_a_product_of_matrices() -> None:
    rate = roofline.fma_rate(rounds=3, loops=20_000)
    from sdan_fast import backends

    if backends.kernel_instruction_set() is None:
        assert rate == 0
        return
    assert 1e9 < rate < 1e14
    from sdan_fast import _C_cpu

    assert _C_cpu.fma_loop(10) == 10 * _C_cpu.fma_loop(1) > 0
    with pytest.raises(ValueError, match="must not be negative"):
        _C_cpu.fma_loop(-1)
    assert roofline.Roofline(1.0, 2.0, 3.0).arithmetic_rate == 3.0
    assert roofline.Roofline(1.0, 2.0).arithmetic_rate == 2.0


# --- verification ------------------------------------------------------------------------------------------------


def measured(case: cases.Case, passes: str = "forward", who: list[tuple[str, str]] | None = None) -> list:
    who = who or [("cpu", "NCHW"), *EAGER]
    return measuring.measure(
        case, passes, who, device="cpu", clock=measuring.Clock("cpu"), limits=LIMITS, rounds=3
    )


def broken(op: str, how: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(functional, op)
    monkeypatch.setattr(functional, op, lambda *args, **kwargs: how(right(*args, **kwargs)))


@pytest.mark.parametrize("passes", cases.PASSES)
def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch, passes: str) -> None:
    case = cases.cases(ops=["star"], sizes=[(7, 9)])[0]
    broken("star", lambda y: y * (1 + 1e-5), monkeypatch)
    ours, *eager = measured(case, passes)
    if ours.refused:
        pytest.skip(ours.refused)
    assert ours.wrong and not ours.seconds and ours.share > 1
    assert "seconds" not in ours.record() and ours.record()["wrong"]
    assert all(row.seconds for row in eager)
    assert any("WRONG, not timed" in cell for line in report.ops_lines([ours, *eager]) for cell in line)


def test_a_wrong_gradient_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.cases(ops=["layer_norm2d"], sizes=[(7, 9)])[0]

    def skewed(y: torch.Tensor) -> torch.Tensor:
        if y.requires_grad:
            y.register_hook(lambda grad: grad * (1 + 1e-4))
        return y

    broken("layer_norm2d", skewed, monkeypatch)
    assert not measured(case)[0].wrong
    ours = measured(case, "forward+backward")[0]
    assert ours.wrong or ours.refused


def test_a_kernel_that_raises_is_wrong_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("illegal instruction\nand more")

    case = cases.cases(ops=["star"], sizes=[(7, 9)])[0]
    broken("star", fail, monkeypatch)
    ours = measured(case)[0]
    if "illegal" not in ours.refused:
        pytest.skip(ours.refused)
    assert ours.wrong
    assert ours.refused == "RuntimeError: illegal instruction"


def test_a_backend_that_cannot_run_is_refused_with_its_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    case = cases.cases(ops=["star"], sizes=[(7, 9)])[0]
    row = measured(case, who=[("cuda", "NCHW"), *EAGER])[0]
    assert row.refused and not row.wrong and not row.seconds
    assert row.record()["refused"] == row.refused


@pytest.mark.parametrize("op", sorted(cases.SUBJECTS))
def test_every_op_verifies_small(op: str) -> None:
    case = cases.Case(cases.SUBJECTS[op], cases.SUBJECTS[op].variants[-1], (6, 7))
    for row in measured(case, who=[("cpu", "NCHW"), ("cpu", "channels_last"), *EAGER]):
        assert row.refused or (row.share <= (1 if row.ours else measuring.PEER_SLACK) and row.seconds), row


# --- the network -------------------------------------------------------------------------------------------------

TINY = model.Configuration("tiny", 12, 14, channels=8, blocks=1, scale=2)


def test_the_plain_network_is_the_network() -> None:
    from sdan_fast import use_backend

    for groups in (1, 2, 4):
        network = seeded_sdan(2, 8, 2, groups)
        x = torch.rand(2, 3, 9, 11)
        with torch.no_grad(), use_backend("reference"):
            assert torch.equal(plain.PlainSDAN(network)(x), network(x))


def test_configurations() -> None:
    names = set(model.CONFIGURATIONS)
    assert names == {"180x320", "64x64", "256x256", "1080x1920", "batch-8", "channels-48", "groups-4"}
    assert model.CONFIGURATIONS["batch-8"].shape == (8, 3, 64, 64)
    default = model.CONFIGURATIONS["180x320"]
    macs = model.cost(seeded_sdan(**default.model_settings), torch.empty(default.shape))
    assert macs == pytest.approx(23.8e9, rel=0.01)
    assert model.CONFIGURATIONS["1080x1920"].large and not default.large


def test_windows_find_what_is_wrong_anywhere() -> None:
    network = seeded_sdan(2, 8, 1)
    x = torch.rand(1, 3, 150, 160)
    with torch.no_grad():
        eager = plain.PlainSDAN(network)(x)
        whole, windows = (model.Truth(network, x, windows=w) for w in (False, True))
    assert len(windows.regions) == 2
    rows, columns, exact = windows.regions[1]
    assert torch.allclose(exact, whole.regions[0][2][:, :, rows, columns], atol=1e-12)
    for truth in (whole, windows):
        assert truth.judge(eager, eager).ok
        for place in ((0, 0), (-1, -1), (150, 160)):
            wrong = eager.clone()
            wrong[0, 0, place[0], place[1]] += 1e-3
            assert not truth.judge(wrong, eager).ok


def test_psnr() -> None:
    a = torch.rand(1, 3, 8, 8)
    assert model.psnr(a, a) == math.inf
    assert model.psnr(a + 0.1, a) == pytest.approx(20, abs=1e-3)


@pytest.fixture(scope="module")
def engine_input() -> tuple[plain.PlainSDAN, torch.Tensor, bytes]:
    pytest.importorskip("onnx")
    network = plain.PlainSDAN(seeded_sdan(**TINY.model_settings)).eval()
    x = torch.rand(TINY.shape)
    return network, x, engines.to_onnx(network, x)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_compute_the_network(
    name: str, engine_input: tuple[plain.PlainSDAN, torch.Tensor, bytes]
) -> None:
    pytest.importorskip(name)
    network, x, onnx = engine_input
    prepare = engines.prepare_onnx_runtime if name == "onnxruntime" else engines.prepare_openvino
    with torch.no_grad():
        assert abs(prepare(onnx, "float32")(x.numpy()) - network(x).numpy()).max() < 1e-5


def test_an_absent_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    for prepare in (engines.prepare_onnx_runtime, engines.prepare_openvino):
        with pytest.raises(engines.Absent, match=r"is not installed: pip install 'sdan-fast\[peers\]'"):
            prepare(b"", "float32")
    found = model.contenders(
        TINY, seeded_sdan(**TINY.model_settings), torch.rand(TINY.shape), "float32", "cpu",
        peers=("eager", "ONNX Runtime", "OpenVINO"), everywhere=False, on_step=lambda _: None,
    )  # fmt: skip
    refused = {r.contender: r.refused for r in found if not r.ours and r.refused}
    assert set(refused) == {"ONNX Runtime", "OpenVINO"}
    assert all("is not installed" in why for why in refused.values())


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is Linux's")
def test_peak_memory_grows_with_the_picture() -> None:
    settings = {"model": {"scale": 2, "channels": 16, "blocks": 1, "groups": 2}, "ours": False}
    small, large = (memory.peak(shape=[1, 3, side, side], **settings) for side in (64, 512))
    tensor = 4 * 16 * 512 * 512
    assert large > 2 * tensor > small


# --- the commands ------------------------------------------------------------------------------------------------


def test_bench_ops(tmp_path: Path, quick_limits: None) -> None:
    out = tmp_path / "new" / "ops.json"
    result = run("ops", "--op", "star", "--size", "6x7", "--no-inductor", "--seconds", 0, "--json", out)
    assert result.exit_code == 0, result.output
    assert "star gelu" in result.output and "forward+backward" in result.stderr
    assert "[1/2] star gelu, 1x56x6x7, float32, forward" in result.stderr
    record = json.loads(out.read_text())
    assert {"commit", "versions", "machine", "when", "command", "limits", "rows"} <= set(record)
    assert {row["contender"] for row in record["rows"]} == {"cpu", "eager"}
    assert "\x1b" not in result.output


@pytest.mark.slow
def test_bench_ops_with_inductor_keeps_compiling_out_of_the_times(tmp_path: Path, quick_limits: None) -> None:
    out = tmp_path / "ops.json"
    command = ("ops", "--op", "star", "--size", "6x7", "--pass", "forward", "--seconds", 0, "--json", out)
    assert run(*command).exit_code == 0
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    if "refused" in rows["Inductor"]:
        pytest.skip(rows["Inductor"]["refused"])
    assert rows["Inductor"]["seconds"]["p80"] < 0.5  # compiling takes seconds


def test_bench_ops_fails_for_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, quick_limits: None) -> None:
    broken("star", lambda y: y + 1e-3, monkeypatch)
    result = run("ops", "--op", "star", "--size", "6x7", "--no-inductor", "--pass", "forward", "--seconds", 0)
    if "not run" in result.output:
        pytest.skip("no kernel here")
    assert result.exit_code == 1
    assert "WRONG, not timed" in result.stdout
    assert "2 results are not within the bound of float64" in result.stderr


def test_bench_model(tmp_path: Path, quick_limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.CONFIGURATIONS, "64x64", TINY)
    out = tmp_path / "model.json"
    result = run("model", "--quick", "--json", out)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(out.read_text())["reports"]
    assert found["input"] == [1, 3, 12, 14]
    for entry in found["runs"]:
        if "refused" not in entry:
            assert entry["times_the_floor"] > 0 and entry["best_peer_over_this"] > 0
    by_name = {(r["contender"], r["layout"], r["dtype"]): r for r in found["runs"]}
    assert by_name["eager", "NCHW", "bfloat16"]["psnr_to_float32_db"] > 20
    assert "floor of this machine" in result.stdout
    assert "best peer" in result.stdout


def test_bench_training(tmp_path: Path, quick_limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.CONFIGURATIONS, "batch-8", TINY)
    out = tmp_path / "training.json"
    result = run("training", "--seconds", 0, "--dtype", "float32", "--dtype", "bfloat16", "--json", out)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(out.read_text())["reports"]
    for entry in found["runs"]:
        if "refused" not in entry:
            assert entry["times_the_floor"] > 0 and entry["best_peer_over_this"] > 0
            assert entry["share_of_error_bound"] <= (1 if entry["ours"] else 10)
    refused = {(r["contender"], r["layout"], r["dtype"]) for r in found["runs"] if "refused" in r}
    assert {("eager", "channels_last", "bfloat16")} == {r for r in refused if r[0] == "eager"}
    assert "A training step of SDAN" in result.stdout and "a step." in result.stdout


def test_bench_training_fails_for_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, quick_limits: None
) -> None:
    right = SDAN.forward
    monkeypatch.setattr(SDAN, "forward", lambda model, x: 1.01 * right(model, x))
    result = run("training", "--quick", "--seconds", 0)
    if "not run" in result.output:
        pytest.skip("no kernel here")
    assert result.exit_code == 1
    assert "not within the bound of float64: cpu, NCHW float32" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("ops", "--op", "softmax"),
        ("ops", "--size", "64"),
        ("ops", "--dtype", "int8"),
        ("ops", "--layout", "NCWH"),
        ("ops", "--pass", "sideways"),
        ("ops", "--device", "tpu"),
        ("ops", "--seconds", "-1"),
        ("model", "--config", "8k"),
        ("model", "--peer", "TensorRT"),
        ("model", "--dtype", "fp8"),
        ("training", "--config", "8k"),
        ("training", "--dtype", "int8"),
        ("ops", "--json", "/proc/nowhere/x.json"),
    ],
)
def test_bench_refuses(options: tuple[str, ...]) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert options[-1].lstrip("-") in result.stderr or options[-1].startswith("-")
    assert "Traceback" not in result.output


# --- what is written by commands ---------------------------------------------------------------------------------


def test_the_readme_says_what_the_committed_results_say() -> None:
    """If this fails: python scripts/readme_numbers.py"""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_numbers.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_another_number_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = readme_numbers.README.read_text(encoding="utf-8")
    assert readme_numbers.page(readme_numbers.README, text) == text
    typed = re.sub(r"(\| eager PyTorch, NCHW \| float32 \| )\d+", r"\g<1>12345", text)
    assert typed != text
    assert readme_numbers.page(readme_numbers.README, typed) == text
    load = readme_numbers.load

    def slower(name: str) -> dict[str, Any]:
        result = load(name)
        for run in result["reports"][0]["runs"] if "reports" in result else result["rows"]:
            if "seconds" in run:
                run["seconds"]["median"] *= 1.5
        return result

    monkeypatch.setattr(readme_numbers, "load", slower)
    for path in (readme_numbers.README, readme_numbers.PERFORMANCE):
        text = path.read_text(encoding="utf-8")
        assert readme_numbers.page(path, text) != text


def test_committed_results_say_where_they_come_from() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        record = json.loads(path.read_text())
        assert record["commit"] and record["versions"]["torch"] and record["machine"]["cpu"], path.name


def test_the_command_line_reference_is_up_to_date() -> None:
    """If this fails: python scripts/cli_reference.py"""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "cli_reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_reference_follows_the_commands() -> None:
    import typer

    other = typer.Typer()
    other.command("upscale")(lambda: None)

    @other.command("new", short_help="Does something new.")
    def new(level: int = typer.Option(3, "--level", metavar="N", help="How much | how far.")) -> None:
        pass

    root = typer.main.get_command(other)
    text = "<!-- begin commands: by x -->\n<!-- end commands -->\n"
    page = cli_reference.page(text, root)
    assert "| `sdan-fast new` | Does something new |" in page
    assert "## new" in page and "| `--level N` | How much \\| how far. | `3` |" in page
    assert cli_reference.page(page, root) == page
    with pytest.raises(ValueError, match="there is no such command"):
        cli_reference.page(page + "\n<!-- begin gone: by x -->\n<!-- end gone -->\n", root)


def test_blocks() -> None:
    text = "a\n<!-- begin x y: by c -->\nold\n<!-- end x y -->\nb\n"
    assert generated.names(text) == ["x y"]
    assert generated.replace(text, "x y", "new", "c") == (
        "a\n<!-- begin x y: by c -->\n\nnew\n\n<!-- end x y -->\nb\n"
    )
    for name in ("x", "z"):
        with pytest.raises(ValueError, match="there 0 times"):
            generated.replace(text, name, "new", "c")


# --- the suite under pytest-benchmark ----------------------------------------------------------------------------


def suite(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/bench_star.py",
        "--bench-no-inductor",
        "--bench-size",
        "4x4",
    ]
    # In a worker of pytest-xdist: pytest-benchmark would see its variables and time nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, "--bench-seconds", "0", "-q", "-p", "no:cacheprovider", *options],
        cwd=ROOT, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_suite_writes_json_and_fails_on_a_regression(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    first = tmp_path / "first.json"
    done = suite(tmp_path, f"--benchmark-json={first}")
    assert done.returncode == 0, done.stdout
    results = json.loads(first.read_text())
    assert {entry["group"].split(", ")[-1] for entry in results["benchmarks"]} == set(cases.PASSES)
    for entry in results["benchmarks"]:
        extra = entry["extra_info"]
        assert entry["stats"]["median"] == pytest.approx(extra["seconds"]["median"])
        assert {"gigabytes_per_second", "gigaflops", "share_of_clone_bandwidth", "share_of_fma_rate"} <= set(
            extra
        )
    for entry in results["benchmarks"]:
        for key in ("min", "max", "mean", "median"):
            entry["stats"][key] /= 1000  # as if the first run had been a thousand times faster
    first.write_text(json.dumps(results))
    done = suite(tmp_path, f"--benchmark-compare={first}", "--benchmark-compare-fail=median:50%")
    assert done.returncode != 0
    assert "Performance has regressed" in done.stdout + done.stderr
