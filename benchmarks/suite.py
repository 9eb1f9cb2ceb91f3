"""The sdan_fast benchmarks under pytest-benchmark: cases that were verified and timed in turn, reported one by one.

pytest-benchmark times one function after the other; contenders that are to be compared have to take turns. So a case's
contenders are measured together, by `sdan_fast.bench.measuring`, and each benchmark then replays its own times into
pytest-benchmark, which does the statistics, the JSON and the comparison of runs. A wrong kernel fails and has no times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from sdan_fast.bench import cases, measuring, model, peers, roofline

Cell = tuple[cases.Case, str, tuple[str, str]]


class Replay:
    """A clock that shows recorded durations: pytest-benchmark reads it before and after each call of nothing."""

    __name__ = "replay"

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        def readings() -> Iterator[float]:
            now = 0.0
            for duration in seconds:
                yield now
                now += duration
                yield now

        self._readings = readings()

    def __call__(self) -> float:
        return next(self._readings)


REPLAY = Replay()
CELLS: dict[str, Cell] = {}  # what the parameters of this run's benchmarks stand for
_limits: dict[tuple[str, str], roofline.Roofline] = {}
_measured: dict[tuple[str, str], list[measuring.Row]] = {}
_reports: dict[str, model.Report] = {}


def replay(benchmark: Any, seconds: Sequence[float], group: str, extra: dict[str, Any]) -> None:
    """Hand recorded times to pytest-benchmark."""
    benchmark.group = group
    benchmark.extra_info.update(extra)
    REPLAY.load(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1, warmup_rounds=0)


def limits(device: str, dtype: str) -> roofline.Roofline:
    """Measured once a run."""
    if (device, dtype) not in _limits:
        _limits[device, dtype] = roofline.measure(device, dtype=cases.DTYPES[dtype])
    return _limits[device, dtype]


def rows_of(case: cases.Case, passes: str, config: pytest.Config) -> list[measuring.Row]:
    """All contenders of a case; kept until the next case comes."""
    key = case.name, passes
    if key not in _measured:
        _measured.clear()
        device = config.getoption("--bench-device")
        inductor = "none" if config.getoption("--bench-no-inductor") else "first"
        _measured[key] = measuring.measure(
            case,
            passes,
            peers.names(device, list(cases.LAYOUTS), inductor=inductor),
            device=device,
            clock=measuring.Clock(device),
            limits=limits(device, case.dtype),
            budget=config.getoption("--bench-seconds"),
        )
    return _measured[key]


def benchmark_of(op: str) -> Callable[..., None]:
    """A test function that benchmarks an op; `conftest.py` gives it its cells."""

    @pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
    def test(cell: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
        case, passes, (name, layout) = CELLS[cell]
        rows = rows_of(case, passes, pytestconfig)
        row = next(row for row in rows if (row.contender, row.layout) == (name, layout))
        if row.wrong:
            pytest.fail(f"{row.share} times the error bound: not timed ({row.refused or 'wrong'})")
        if row.refused:
            pytest.skip(row.refused)
        replay(benchmark, row.seconds, f"{case.name}, {passes}", row.record())

    test.op = op  # type: ignore[attr-defined]
    return test


def report_of(configuration: str, config: pytest.Config) -> model.Report:
    """The whole network, measured once a run."""
    if configuration not in _reports:
        device = config.getoption("--bench-device")
        competing = [
            p for p in model.PEERS if p[:8] != "Inductor" or not config.getoption("--bench-no-inductor")
        ]
        _reports[configuration] = model.measure(
            model.CONFIGURATIONS[configuration],
            device=device,
            peers=competing,
            budget=20 * config.getoption("--bench-seconds"),
        )
    return _reports[configuration]
