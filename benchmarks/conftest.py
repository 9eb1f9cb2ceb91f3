"""Options of the suite, and what each benchmark of an op is run with: the cells of `sdan_fast.bench.cases`."""

from __future__ import annotations

import pytest
import torch

import suite
from sdan_fast.bench import cases, peers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sdan_fast")
    group.addoption("--bench-full", action="store_true", help="every kernel size and dilation: hours")
    group.addoption("--bench-size", action="append", help="HEIGHTxWIDTH, may be given several times")
    group.addoption("--bench-dtype", action="append", help="float32 (default), bfloat16, float16")
    group.addoption(
        "--bench-no-inductor", action="store_true", help="without Inductor, which compiles each case"
    )
    group.addoption(
        "--bench-seconds", type=float, default=1.0, help="timing of one case, all contenders (default: 1)"
    )
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark of an op for each case, direction and contender."""
    op = getattr(metafunc.function, "op", None)
    if op is None:
        return
    option = metafunc.config.getoption
    sizes = [tuple(int(side) for side in text.split("x")) for text in option("--bench-size") or ()]
    chosen = cases.cases(
        ops=[op],
        sizes=sizes or None,  # type: ignore[arg-type]
        dtypes=option("--bench-dtype") or ["float32"],
        full=option("--bench-full"),
    )
    who = peers.names(
        option("--bench-device"),
        list(cases.LAYOUTS),
        inductor="none" if option("--bench-no-inductor") else "first",
    )
    cells = {
        f"{case.name}, {passes}: {' '.join(pair)}": (case, passes, pair)
        for case, passes in cases.jobs(chosen)
        for pair in who
    }
    suite.CELLS.update(cells)
    metafunc.parametrize("cell", list(cells))
