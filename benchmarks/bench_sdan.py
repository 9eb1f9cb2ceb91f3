"""The whole network against eager PyTorch, Inductor, ONNX Runtime and OpenVINO, with the peak memory of a forward."""

from __future__ import annotations

from typing import Any

import pytest

from sdan_fast.bench import cases, model, peers
from suite import REPLAY, replay, report_of


def contenders() -> list[tuple[str, str, str]]:
    """(dtype, contender, layout) of everyone who may appear."""
    ours = [(name, layout) for name in peers.backends_of("cpu") for layout in cases.LAYOUTS]
    eager = [("eager", layout) for layout in cases.LAYOUTS]
    compiled = [("Inductor", "NCHW"), ("Inductor, freezing", "NCHW")]
    engines = [("ONNX Runtime", ""), ("OpenVINO", "")]
    return [(dtype, *pair) for dtype in ("float32", "bfloat16") for pair in ours + eager + compiled + engines]


@pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
@pytest.mark.parametrize(("dtype", "contender", "layout"), contenders())
def test_sdan(dtype: str, contender: str, layout: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    report = report_of("180x320", pytestconfig)
    found = zip(report.runs, report.record()["runs"], strict=True)
    run, record = next(
        (
            (run, record)
            for run, record in found
            if (run.dtype, run.contender, run.layout) == (dtype, contender, layout)
        ),
        (model.Run(contender, layout, dtype, False, refused="does not compete here"), {}),
    )
    if run.wrong:
        pytest.fail(f"{run.share} times the error bound: not timed")
    if not run.seconds:
        pytest.skip(run.refused)
    rates = {
        "floor_seconds": report.floors[dtype],
        "gigaflops": 2e-9 * report.multiply_adds / run.median,
        "share_of_fma_rate": 2 * report.multiply_adds / run.median / report.limits[dtype].arithmetic_rate,
    }
    replay(benchmark, run.seconds, f"SDAN, {report.configuration.name}, {dtype}", record | rates)
