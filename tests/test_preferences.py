"""Triton or CUDA C++: the written rule, the measurement that replaces it, and the script that makes one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sdan_fast
from sdan_fast import backends, preferences
from sdan_fast import functional as F
from sdan_fast.bench import cases, measuring
from sdan_fast.ops import OPS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import preferences as script

GPU = "Imagined GPU 9000 (48 GB)"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As on a machine with that GPU whose two backends take CPU tensors; the folder that its preferences come from."""
    monkeypatch.setitem(backends.BACKENDS, "cpu", backends.Backend("cpu", ("cpu",), DTYPES, "not today"))
    for name in ("triton", "cuda"):
        monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(name, ("cpu",), DTYPES))
    for op in OPS.values():
        monkeypatch.setattr(op, "kernels", {"triton", "cuda"})
        monkeypatch.setattr(op, "supports", {})
    monkeypatch.setattr(preferences, "_gpu_of_device", {-1: GPU})
    monkeypatch.setattr(preferences, "_by_gpu", {})
    monkeypatch.setattr(preferences, "file_of", lambda gpu, folder=tmp_path: folder / "gpu.json")
    yield tmp_path


def entry(op: str, *sizes: tuple[int, str], **traits: str) -> dict[str, Any]:
    found = [{"elements": n, "backend": name, "ratio": 1.5} for n, name in sizes]
    return {"op": op, "kind": "", "layout": "contiguous", "dtype": "float32", **traits, "sizes": found}


def write(folder: Path, *entries: dict[str, Any]) -> None:
    (folder / "gpu.json").write_text(json.dumps({"gpu": GPU, "preferences": entries}))


def star_conv_arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, w, dw = torch.ones(1, 4, 5, 6), torch.ones(4, 4, 1, 1), torch.ones(4, 1, 3, 3)
    return tuple(t.to(dtype) for t in (x, torch.ones(4), torch.ones(4), w, dw, torch.ones(4), w))


def test_the_rule(gpu: Path) -> None:
    a = torch.ones(1, 4, 5, 6)
    assert sdan_fast.explain("star", a, a).backend == "triton"
    for dtype, expected in ((torch.float32, "cuda"), (torch.bfloat16, "triton"), (torch.float16, "triton")):
        explanation = sdan_fast.explain("star_conv", *star_conv_arguments(dtype))
        assert explanation.backend == expected
        other = "triton" if expected == "cuda" else "cuda"
        assert explanation.reasons[other].startswith(f"'{expected}' comes first: its ")
        assert explanation.reasons["reference"] == f"'{expected}' comes first"
        assert explanation.reasons["cpu"] == "not today"


def test_every_rule_names_an_op_and_says_why() -> None:
    for rule in preferences.RULES:
        assert rule.op in OPS and rule.reason
        assert set(rule.dtypes) <= {"float32", "bfloat16", "float16"}
        assert set(rule.layouts) <= {"contiguous", "channels_last"}


def test_a_measurement_replaces_the_rule(gpu: Path) -> None:
    write(gpu, entry("star", (1000, "cuda")), entry("star_conv", (1000, "triton")))
    a = torch.ones(1, 4, 5, 6)
    explanation = sdan_fast.explain("star", a, a)
    assert explanation.backend == "cuda"
    assert explanation.reasons["triton"] == f"'cuda' comes first: measured on {GPU}: 1.50 times as fast"
    assert sdan_fast.explain("star_conv", *star_conv_arguments(torch.float32)).backend == "triton"
    # What was not measured stays with the rule: another dtype, another layout, another op.
    assert sdan_fast.explain("star", a.half(), a.half()).backend == "triton"
    last = a.contiguous(memory_format=torch.channels_last)
    assert sdan_fast.explain("star", last, last).backend == "triton"
    gate = (a, a, torch.ones(4, 4, 1, 1))
    assert sdan_fast.explain("pointwise_gate", *gate).backend == "cuda"


def test_sizes(gpu: Path) -> None:
    write(gpu, entry("star", (100, "cuda"), (1000, "triton"), (5000, "cuda")))
    for shape, expected in (
        ((1, 100), "cuda"),
        ((1, 101), "triton"),
        ((5, 1000), "cuda"),
        ((9, 999), "cuda"),
    ):
        a = torch.ones(shape)
        assert sdan_fast.explain("star", a, a).backend == expected


def test_kinds_of_taps(gpu: Path) -> None:
    name = "depthwise_conv2d"
    write(gpu, entry(name, (10**6, "cuda"), kind="row"), entry(name, (10**6, "triton")))
    x = torch.ones(1, 4, 9, 9)
    for taps, kind, expected in (
        ((1, 3), "row", "cuda"),
        ((3, 1), "column", "triton"),
        ((3, 3), "square", "triton"),
    ):
        weight = torch.ones(4, 1, *taps)
        assert preferences.kind_of(name, (x, weight)) == kind
        assert sdan_fast.explain(name, x, weight).backend == expected


def test_a_backend_that_cannot_is_not_preferred(gpu: Path) -> None:
    write(gpu, entry("star", (1000, "cuda")))
    OPS["star"].supports["cuda"] = lambda *_, **__: "not these"
    a = torch.ones(1, 4, 5, 6)
    explanation = sdan_fast.explain("star", a, a)
    assert explanation.backend == "triton" and explanation.reasons["cuda"] == "not these"
    OPS["star_conv"].supports["triton"] = lambda *_, **__: "nor those"
    assert sdan_fast.explain("star_conv", *star_conv_arguments(torch.float16)).backend == "cuda"


def test_a_named_backend_is_taken_all_the_same(gpu: Path) -> None:
    write(gpu, entry("star", (1000, "cuda")))
    a = torch.ones(1, 4, 5, 6)
    with sdan_fast.use_backend("triton"):
        assert sdan_fast.explain("star", a, a).backend == "triton"


def test_calls_and_compiled_functions_follow(gpu: Path) -> None:
    """The choice itself, and in one graph for all sizes: a compiled function asks for no size."""
    write(gpu, entry("star", (100, "triton"), (1000, "cuda")))
    small, large = torch.ones(5, 5), torch.ones(20, 40)
    assert backends.choose(OPS["star"], (small, small), {}) == "triton"
    assert backends.choose(OPS["star"], (large, large), {}) == "cuda"
    targets: list[set[str]] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.append({str(node.target) for node in graph.graph.nodes})
        return lambda *inputs: (next(t for t in inputs if isinstance(t, Tensor)),)

    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: F.star(a, b), backend=record, fullgraph=True)
    with torch.no_grad():
        for size in ((5, 5), (20, 40), (7, 11)):
            a, b = torch.ones(size), torch.ones(size)
            for t in (a, b):
                torch._dynamo.mark_dynamic(t, [0, 1])
            compiled(a, b)
    torch._dynamo.reset()
    assert len(targets) == 1 and any("star.cuda" in target for target in targets[0])


def test_files_are_named_after_the_gpu() -> None:
    assert preferences.file_of(GPU).name == "imagined-gpu-9000-48-gb.json"
    assert preferences.file_of(GPU).parent == Path(sdan_fast.__file__).parent / "preferences"


def test_shipped_files_can_be_read() -> None:
    for path in preferences.FOLDER.glob("*.json"):
        assert preferences.load(path)


@pytest.mark.parametrize(
    "wrong",
    [
        "{",
        "{}",
        json.dumps({"gpu": GPU, "preferences": [entry("star")]}),
        json.dumps({"gpu": GPU, "preferences": [entry("star", (1000, "cpu"))]}),
        json.dumps({"gpu": GPU, "preferences": [entry("star", (1000, "cuda"), (10, "triton"))]}),
        json.dumps({"gpu": GPU, "preferences": [{"op": "star"}]}),
    ],
)
def test_a_wrong_file_is_an_error(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(wrong)
    with pytest.raises(ValueError, match="is not a file of preferences"):
        preferences.load(path)


def row(
    contender: str, seconds: float, *, op: str = "star", size: tuple[int, int] = (5, 6), dtype: str = "float32",
    passes: str = "forward",
) -> dict[str, Any]:  # fmt: skip
    """A row of what the GPU check writes, made as it makes them."""
    subject = cases.SUBJECTS[op]
    case = cases.Case(subject, subject.variants[0], size, dtype)
    times = (0.9 * seconds, seconds, 1.1 * seconds) if seconds else ()
    return measuring.Row(case, passes, contender, "NCHW", True, wrong=not seconds, seconds=times).record()


def test_the_script_decides_by_all_directions_that_both_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = "forward+backward"
    rows = [
        row("triton", 1.0), row("cuda", 1.2),
        row("triton", 3.0, passes=both), row("cuda", 2.0, passes=both),
        row("eager", 9.0), row("cuda", 1.0, dtype="float16"), row("cuda", 0.0, size=(9, 9)),
        row("triton", 1.0, size=(3, 4)), row("cuda", 2.0, size=(3, 4)),
        row("triton", 4.0, op="depthwise_conv2d"), row("cuda", 1.0, op="depthwise_conv2d"),
    ]  # fmt: skip
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"gpu": GPU, "bench": {"commit": "c", "ok": True, "rows": rows}}))
    assert script.main([str(results), "--to", str(tmp_path)]) == 0
    path = preferences.file_of(GPU, tmp_path)
    assert str(path) in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["measured"]["commit"] == "c"
    depthwise, star = found["preferences"]
    kh, kw = cases.SUBJECTS["depthwise_conv2d"].variants[0].options["kernel"]
    assert depthwise["kind"] == preferences.kind_of_taps(kh, kw) != ""
    elements = {op: cases.SUBJECTS[op].channels for op in ("star", "depthwise_conv2d")}
    assert depthwise["sizes"] == [
        {"elements": 30 * elements["depthwise_conv2d"], "backend": "cuda", "ratio": 4.0}
    ]
    assert star["sizes"] == [
        {"elements": 12 * elements["star"], "backend": "triton", "ratio": 2.0},
        {"elements": 30 * elements["star"], "backend": "cuda", "ratio": 1.25},
    ]
    assert set(preferences.load(path)) == {
        ("star", "", "contiguous", "float32"),
        ("depthwise_conv2d", depthwise["kind"], "contiguous", "float32"),
    }


def test_the_script_refuses_what_decides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    for bench, message in (
        ({"ok": False, "rows": [row("cuda", 1.0), row("triton", 1.0)]}, "did not pass"),
        ({"ok": True, "rows": [row("cuda", 1.0)]}, "no case was timed with both"),
    ):
        results.write_text(json.dumps({"gpu": GPU, "bench": bench}))
        assert script.main([str(results), "--to", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.glob("*.json")) == [results]
