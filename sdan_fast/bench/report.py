"""Results as tables for people and as JSON: where, with which versions and from which commit they were measured."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdan_fast.commands import machine
from sdan_fast.models.files import replacing

from .measuring import Row
from .model import Report, Run
from .roofline import Roofline


def header(device: str, command: str) -> dict[str, Any]:
    """What every result file begins with."""
    return {
        "format": 1,
        "command": command,
        "when": machine.now(),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "machine": machine.describe(),
        "device": device,
    }


def limits_record(limits: Roofline) -> dict[str, float]:
    return {
        "clone_bytes_per_second": limits.clone_bandwidth,
        "gemm_operations_per_second": limits.gemm_rate,
        "fma_operations_per_second": limits.fma_rate,
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all.

    Raises:
        OSError: if that is not possible.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Without NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def duration(seconds: float) -> str:
    """With three digits: "12.9 us", "3.40 ms", "1.20 s"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise AssertionError


# --- ops ---------------------------------------------------------------------------------------------------------

OPS_COLUMNS = (
    "case",
    "size",
    "pass",
    "ours",
    "median",
    "best peer",
    "its median",
    "peer/ours",
    "of clone",
    "of FMA",
    "x floor",
    "err/bound",
)
OPS_NUMBERS = ("median", "its median", "peer/ours", "of clone", "of FMA", "x floor", "err/bound")


def ops_lines(rows: Sequence[Row]) -> Iterable[list[str]]:
    """The table's lines for the rows of one case and direction: one for each of our backends and layouts."""
    peers = [row for row in rows if not row.ours and row.seconds]
    best = min(peers, key=lambda row: row.median, default=None)
    for row in rows:
        if not row.ours:
            continue
        case = row.case
        size = "x".join(map(str, case.shape))
        what = [case.title, size, _PASS[row.passes], f"{row.contender} {row.layout}"]
        if row.refused or row.wrong:
            why = f"not run: {row.refused}" if row.refused else "WRONG, not timed"
            share = "" if row.share is None else f"{row.share:.2f}"
            yield [*what, "-", why, *[""] * 5, share]
            continue
        f = row.figures or {}
        yield [
            *what,
            duration(row.median),
            f"{best.contender} {best.layout}" if best else "-",
            duration(best.median) if best else "-",
            f"{f['best_peer_over_this']:.2f}" if best else "-",
            f"{f['share_of_clone_bandwidth']:.0%}",
            f"{f['share_of_fma_rate']:.0%}",
            f"{f['times_the_floor']:.2f}",
            f"{row.share or 0.0:.2f}",
        ]


_PASS = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def peers_line(rows: Sequence[Row]) -> str:
    """Every peer's time in one line."""
    parts = [
        f"{row.contender} {row.layout} "
        + (
            duration(row.median)
            if row.seconds
            else f"not run ({row.refused})"
            if row.refused
            else "WRONG, not timed"
        )
        for row in rows
        if not row.ours
    ]
    return "; ".join(parts)


def losses(rows: Sequence[Row]) -> list[Row]:
    """Ours that are slower than the best peer of their case."""
    return [row for row in rows if row.ours and row.figures and row.figures.get("best_peer_over_this", 9) < 1]


def by_case(rows: Sequence[Row]) -> Iterable[list[Row]]:
    """Rows that were measured together."""
    for _, group in itertools.groupby(rows, key=lambda row: (row.case, row.passes)):
        yield list(group)


# --- the model ---------------------------------------------------------------------------------------------------

MODEL_COLUMNS = (
    "run",
    "dtype",
    "median",
    "best peer / this",
    "x floor",
    "peak MiB",
    "PSNR dB",
    "err/bound",
    "",
)
MODEL_NUMBERS = ("median", "best peer / this", "x floor", "peak MiB", "PSNR dB", "err/bound")


def model_lines(report: Report) -> Iterable[list[str]]:
    """The table's lines: every run, dtype by dtype, then the floor of each dtype."""
    for dtype, floor in report.floors.items():
        best = report.best_peer(dtype)
        for run in report.runs:
            if run.dtype == dtype:
                yield _model_line(run, best, floor)
        ratio = f"{best.median / floor:.2f}" if best else "-"
        yield ["floor of this machine", dtype, duration(floor), ratio, "1.00", "", "", "", ""]


def _model_line(run: Run, best: Run | None, floor: float) -> list[str]:
    name = f"sdan_fast {run.title}" if run.ours else run.title
    share = "-" if run.share is None else f"{run.share:.2f}"
    if not run.seconds:
        why = f"not run: {run.refused}" if run.refused else "WRONG, not timed"
        return [name, run.dtype, "-", "-", "-", "", "", share, why]
    return [
        name,
        run.dtype,
        duration(run.median),
        f"{best.median / run.median:.2f}" if best else "-",
        f"{run.median / floor:.2f}",
        "" if run.peak_bytes is None else f"{run.peak_bytes / 2**20:.0f}",
        "" if run.psnr is None else f"{run.psnr:.1f}",
        share,
        "best peer" if run is best else "",
    ]
