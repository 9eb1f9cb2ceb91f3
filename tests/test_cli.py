"""The command line: info, verify, demo, and how it behaves without its extras, without a terminal, without colour."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

import typer
from typer.testing import CliRunner

import sdan_fast
from sdan_fast import backends, functional
from sdan_fast.bench import roofline
from sdan_fast.cli import app
from sdan_fast.commands import check, pictures
from sdan_fast.models import SDAN
from sdan_fast.models.fitted import fit_upsampler, seeded_sdan


def run(*arguments: object, **kwargs: object) -> object:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, **kwargs)


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd=Path(sdan_fast.__file__).parents[1],
    )


# --- the whole ---------------------------------------------------------------------------------------------------


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("info", "verify", "demo", "bench", "upscale"):
        assert re.search(rf"^ +{command} ", result.output, re.MULTILINE), command
    assert "Exit codes" in result.output


def commands(group: object = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command."""
    group = group or typer.main.get_command(app)
    children = getattr(group, "commands", None)
    if children is None:
        return [path]
    return [words for name, child in children.items() for words in commands(child, (*path, name))]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_of_each_command(words: tuple[str, ...]) -> None:
    """It reads as sentences: every option is explained, and no Python type shows."""
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    for leaked in (":param", "<str>", "<list", "Args:", "Optional["):
        assert leaked not in result.output
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    assert (command.help or "").strip().splitlines()[0].endswith(".")
    for parameter in command.params:
        assert parameter.help and parameter.help.endswith((".", "?")), parameter.name
    assert result.output.splitlines() == [line[:80] for line in result.output.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    """The script that --show-completion prints, and what it gets when it asks."""
    # Otherwise typer asks which shell the process was started from, and a test may be started from none.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = python("-m", "sdan_fast", "--show-completion", shell, **named)
    assert shown.returncode == 0, shown.stderr
    assert "_COMPLETE" in shown.stdout
    asked = {
        "bash": {"COMP_WORDS": "sdan-fast up", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "sdan-fast up"},
        "fish": {"_TYPER_COMPLETE_ARGS": "sdan-fast up", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = python(
        "-c",
        "from sdan_fast.cli import app; app(prog_name='sdan-fast')",
        _SDAN_FAST_COMPLETE=f"complete_{shell}",
        **asked,
    )
    assert "upscale" in done.stdout, done.stderr
    assert "verify" not in done.stdout


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.output.strip()) == (0, sdan_fast.__version__)


def test_unknown_commands_and_options() -> None:
    assert run("frobnicate").exit_code == 2
    assert run("info", "--frobnicate").exit_code == 2
    assert run().exit_code in (0, 2)  # the help; the code differs between typer's versions


def test_python_m() -> None:
    done = python("-m", "sdan_fast", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, sdan_fast.__version__), done.stderr
    assert "python -m sdan_fast" in python("-m", "sdan_fast", "--help").stdout


@pytest.mark.parametrize("missing", ["typer", "rich", "PIL"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from sdan_fast.cli import app; app()"
    done = python("-c", code)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert f"needs {missing}" in lines[0]
    assert "pip install 'sdan-fast[cli]'" in lines[0]


def test_the_package_imports_neither_the_commands_nor_dynamo() -> None:
    """Dynamo takes several times as long as this package."""
    extras = "typer", "rich", "PIL", "skimage", "torch._dynamo"
    code = f"import sys, sdan_fast, sdan_fast.models; print([m for m in {extras} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


# --- info --------------------------------------------------------------------------------------------------------


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    for word in (sdan_fast.__version__, torch.__version__.split("+")[0], "threads", *backends.ORDER):
        assert word in result.output, word


def test_info_json() -> None:
    result = run("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert facts["versions"]["sdan_fast"] == sdan_fast.__version__
    assert [line["name"] for line in facts["backends"]] == [line.name for line in backends.status()]
    for line in facts["backends"]:
        assert line["available"] == (line["reason"] is None)
    assert facts["machine"]["threads"] == torch.get_num_threads()


def test_info_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.BACKENDS["cpu"], "missing", "sdan_fast._C_cpu is not available: no compiler")
    monkeypatch.setattr("sdan_fast.commands.machine.build_record", lambda: None)
    result = run("info")
    assert "no compiler" in result.output
    assert "C++20 compiler" in result.output
    skipped = {"cpu": {"built": False, "reason": "SDAN_FAST_SKIP_CPU was set when the package was installed"}}
    monkeypatch.setattr("sdan_fast.commands.machine.build_record", lambda: skipped)
    assert "-> unset SDAN_FAST_SKIP_CPU" in run("info").output


def test_no_colour_and_no_bars_where_nobody_looks() -> None:
    done = python("-m", "sdan_fast", "info")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    forced = python("-m", "sdan_fast", "info", FORCE_COLOR="1")
    assert "\x1b[" in forced.stdout
    plain = python("-m", "sdan_fast", "info", FORCE_COLOR="1", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain.stdout)


def test_errors_are_one_plain_line_without_colour() -> None:
    """What a script sees on stderr, whatever the width of the terminal."""
    for env in ({}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"COLUMNS": "20"}):
        done = python("-m", "sdan_fast", "demo", "--weights", "/nowhere/" + "w" * 150 + ".safetensors", **env)
        assert done.returncode == 2
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", done.stderr)
        (line,) = done.stderr.strip().splitlines()
        assert re.sub(r"\x1b\[[0-9;]*m", "", line).startswith("error: there is no file /nowhere/www")


# --- verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["star", "layer_norm2d"])
def test_verify_one_op(op: str) -> None:
    result = run("verify", "--op", op, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    rows = table["checks"]
    available = {line.name for line in backends.status() if line.available}
    assert {row["backend"] for row in rows} == available
    assert set(table["not_checked"]) == {line.name for line in backends.status()} - available
    for row in rows:
        assert row["function"] == op
        assert row["ok"]
        if row["forward"] is not None:
            assert 0 <= row["forward"]["error"] <= row["forward"]["bound"]
            assert 0 <= row["gradients"]["error"] <= row["gradients"]["bound"]
            assert row["forward"]["bound"] > 0
    assert any(row["forward"] is not None for row in rows)


def test_verify_covers_every_public_op() -> None:
    from sdan_fast.commands.verify import CASES

    assert set(CASES) == set(functional.__all__)


@pytest.mark.parametrize("fault", ["scaled", "nan", "shape"])
def test_verify_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = functional.star

    def wrong(a: torch.Tensor, b: torch.Tensor, **kwargs: str) -> torch.Tensor:
        y = right(a, b, **kwargs)
        if fault == "scaled":
            return y * (1 + 1e-4)
        if fault == "nan":
            return y + torch.where(y == y.detach().max(), torch.nan, 0.0)
        return y[..., :1] + 0 * y

    monkeypatch.setattr(functional, "star", wrong)
    result = run("verify", "--op", "star", "--dtype", "float32", "--backend", "reference")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "1 of 1 checks failed" in result.stderr


def test_verify_refuses_what_it_does_not_know() -> None:
    for option in (("--op", "softmax"), ("--dtype", "int8"), ("--backend", "tpu")):
        result = run("verify", *option)
        assert result.exit_code == 2
        assert option[1] in result.output
    if not torch.cuda.is_available():
        result = run("verify", "--backend", "cuda")
        assert result.exit_code == 2
        assert "cannot run here" in result.stderr


def test_verify_the_model() -> None:
    result = run("verify", "--op", "model", "--dtype", "float32", "--backend", "reference")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"SDAN, groups=[1-4]", result.output)) == 4


def test_the_bound() -> None:
    reference = torch.tensor([1.0, -4.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -4.0]) + torch.tensor([0.0, 1e-5])
    bound = 2 * float((eager.double() - reference).abs().max()) + 2 * 2**-23 * 4
    for shift, ok in (
        (0.0, True),
        (0.99 * bound, True),
        (1.2 * bound, False),
        (torch.nan, False),
        (torch.inf, False),
    ):
        result = check.agreement(torch.tensor([1.0 + shift, -4.0]), eager, reference)
        assert result.bound == pytest.approx(bound)
        assert result.ok is ok
    good, bad = check.Agreement(0.5, 1.0), check.Agreement(torch.nan, 1.0)
    assert check.worst([good, bad, good]) is bad
    assert not check.agreement(torch.ones(1), torch.full((1,), torch.nan), torch.ones(1).double()).ok


def test_the_bound_of_a_gradient() -> None:
    exact = [torch.randn(100, dtype=torch.float64), 1e-6 * torch.randn(4, dtype=torch.float64)]
    eager = [e.float() * (1 + 1e-5) for e in exact]
    assert check.gradient_agreement(eager, eager, exact).share == pytest.approx(0.5, abs=0.02)
    assert check.gradient_agreement([e.float() for e in exact], eager, exact).ok
    wrong = [exact[0].float(), 0.9 * exact[1].float()]  # a small tensor is not hidden by a large one
    assert not check.gradient_agreement(wrong, eager, exact).ok
    assert not check.gradient_agreement([exact[0].float(), exact[1].float() * torch.nan], eager, exact).ok
    assert not check.gradient_agreement([exact[0].float(), exact[1][:3].float()], eager, exact).ok


# --- demo --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    pytest.importorskip("skimage")
    out = tmp_path_factory.mktemp("demo") / "deep" / "folder"
    result = run("demo", "--size", "24x32", "--blocks", 1, "--seconds", 0, "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_demo_writes_pictures_and_a_record(demonstrated: tuple[Path, str]) -> None:
    from PIL import Image

    out, _ = demonstrated
    record = json.loads((out / "demo.json").read_text())
    assert record["input"] == [24, 32]
    assert record["model"] == {
        "scale": 4,
        "channels": 56,
        "blocks": 1,
        "groups": 2,
        "weights": "seed 0, last layer fitted",
    }
    assert {"eager PyTorch, NCHW", "eager PyTorch, channels_last", "auto, NCHW"} <= {
        r["name"] for r in record["runs"]
    }
    for entry in record["runs"]:
        assert entry["ok"]
        assert len(entry["seconds"]) == roofline.LEAST_ROUNDS
        assert Image.open(out / entry["picture"]).size == (128, 96)
    assert Image.open(out / "input.png").size == (32, 24)
    assert record["clone_bandwidth_bytes_per_second"] > 0
    assert record["gemm_operations_per_second"] > 0
    rate = max(record["gemm_operations_per_second"], record["fma_operations_per_second"])
    assert record["floor_seconds"] >= 2 * record["multiply_adds"] / rate
    assert record["versions"]["torch"]
    available = {line.name for line in backends.status() if line.available and line.name != "reference"}
    ran = {entry["backend"] for entry in record["runs"]}
    assert available <= ran | set(record["not_run"])


def test_demo_pictures_are_the_photograph(demonstrated: tuple[Path, str]) -> None:
    """The last layer is fitted, so that the result is near its input, and the backends' results near each other."""
    from PIL import Image

    out, _ = demonstrated
    small = torch.tensor(list(Image.open(out / "input.png").tobytes()), dtype=torch.float64)
    results = []
    for path in sorted(out.glob("sdan_*.png")):
        image = Image.open(path)
        results.append(torch.tensor(list(image.tobytes()), dtype=torch.float64))
        back = torch.tensor(list(image.resize((32, 24), Image.Resampling.BOX).tobytes()), dtype=torch.float64)
        assert (back - small).abs().mean() < 16
    assert all((result - results[0]).abs().max() <= 1 for result in results)


def test_demo_says_what_it_did(demonstrated: tuple[Path, str]) -> None:
    _, output = demonstrated
    for words in (
        "No trained weights are public",
        "Who runs what",
        "star_conv",
        "mm_lka",
        "floor of this machine",
        "interleaved",
    ):
        assert words in output, words


def test_demo_with_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    seeded_sdan(2, 8, 1).save_checkpoint(tmp_path / "w.safetensors")
    result = run(
        "demo",
        "-w",
        tmp_path / "w.safetensors",
        "--size",
        "8x9",
        "--seconds",
        0,
        "--device",
        "cpu",
        "-o",
        tmp_path / "out",
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["model"]["scale"] == 2


def test_demo_prints_no_time_for_a_wrong_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    right = SDAN.forward

    def wrong(model: SDAN, x: torch.Tensor) -> torch.Tensor:
        y = right(model, x)
        return y if backends.current_backend() == "reference" else y * 1.001

    monkeypatch.setattr(SDAN, "forward", wrong)
    result = run("demo", "--size", "8x9", "--blocks", 1, "--seconds", 0, "--device", "cpu", "-o", tmp_path)
    assert result.exit_code == 1
    assert re.search(r"auto, NCHW +\S +- +\S +- .*WRONG, not timed", result.output)
    assert "not within the bound of float64: " in result.stderr
    runs = {entry["name"]: entry for entry in json.loads((tmp_path / "demo.json").read_text())["runs"]}
    assert runs["auto, NCHW"]["seconds"] is None
    assert not runs["auto, NCHW"]["ok"]
    assert runs["eager PyTorch, NCHW"]["seconds"]


@pytest.mark.parametrize(
    "options",
    [
        ("--size", "180"),
        ("--size", "0x5"),
        ("--size", "axb"),
        ("--photograph", "lenna"),
        ("--blocks", "0"),
        ("--device", "tpu"),
        ("--weights", "/nowhere.safetensors"),
    ],
)
def test_demo_refuses(tmp_path: Path, options: tuple[str, str]) -> None:
    result = run("demo", "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "demo.json").exists()


def test_demo_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("demo", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "cannot make the folder" in result.stderr


# --- what the demo measures with ---------------------------------------------------------------------------------


def test_interleaved_order_and_counts() -> None:
    calls: list[str] = []
    told: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    timings = roofline.interleaved(functions, rounds=4, warmup=2, on_call=told.append)
    assert "".join(calls) == "ABC" * 6
    assert told == calls
    assert all(len(t.seconds) == 4 and t.best <= t.median for t in timings.values())


def test_interleaved_stops_at_its_budget() -> None:
    calls: list[int] = []
    timings = roofline.interleaved({"a": lambda: calls.append(1)}, rounds=1000, warmup=0, budget=0)
    assert len(timings["a"].seconds) == len(calls) == roofline.LEAST_ROUNDS
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        roofline.interleaved({}, rounds=0)


def test_roofline_of_this_machine() -> None:
    measured = roofline.Roofline(
        roofline.clone_bandwidth(megabytes=16, rounds=2), roofline.gemm_rate(size=256, rounds=3)
    )
    assert 1e8 < measured.clone_bandwidth < 1e14
    assert 1e8 < measured.gemm_rate < 1e16
    limits = roofline.Roofline(clone_bandwidth=10.0, gemm_rate=100.0)
    assert limits.floor(multiply_adds=500, bytes_moved=20) == pytest.approx(10.0)
    assert limits.floor(multiply_adds=5, bytes_moved=20) == pytest.approx(2.0)


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux does")
def test_freed_memory_is_kept_for_the_next_call() -> None:
    resource = pytest.importorskip("resource")
    if not roofline.keep_freed_memory():
        pytest.skip("this C library cannot be told to keep freed memory")
    torch.ones(160 * 2**18)  # 160 MiB that have been written once
    x = torch.ones(48 * 2**18)  # 48 MiB: beyond glibc's largest threshold for what it maps apart
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        x.clone()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # one new clone: 12,288 pages


def test_multiply_adds_counts_one_for_two_operations() -> None:
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert roofline.multiply_adds(lambda: a @ b) == 3 * 5 * 7


def test_the_fit_is_least_squares() -> None:
    """Where the model can be exact, the fit finds it; elsewhere it beats what was there."""
    model = seeded_sdan(2, 8, 1).double()
    low = torch.rand(1, 3, 20, 22, dtype=torch.float64)
    with torch.no_grad():
        high = model(low)
        wanted = model.up.weight.clone()
        model.up.weight.zero_()
        fit_upsampler(model, low, high, ridge=1e-14)
        assert (model(low) - high).abs().max() < 1e-5
        assert wanted.abs().max() > 0
        smooth = pictures.resize(torch.rand(1, 3, 5, 6), 40, 44).double()
        before = (model(low) - smooth).square().mean()
        fit_upsampler(model, low, smooth)
        assert (model(low) - smooth).square().mean() < before


def test_photographs_are_there_and_fit_any_size() -> None:
    pytest.importorskip("skimage")
    for name in pictures.PHOTOGRAPHS:
        picture = pictures.photograph(name)
        assert picture.shape[:2] == (1, 3)
        assert 0 <= picture.min() < 0.2 < 0.8 < picture.max() <= 1
        for size in ((1, 1), (37, 5), (600, 41)):
            assert pictures.cover(picture, *size).shape == (1, 3, *size)
