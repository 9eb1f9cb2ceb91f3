"""Every op of one convolution or less on this CPU over kernels, dilations and sizes: the tables of docs/performance.md.

    python scripts/sweep_cpu.py [--backend cpu] [--op OP ...] [--dtype DTYPE ...] [--size HxW ...]
        [--channels N] [--losses]

Each cell is verified, then timed in turn with eager PyTorch in both memory formats and with `torch.clone`. A line
of a group of cells says how many reach the aim of 70 % of `clone`'s bandwidth or 60 % of the rate of multiply-adds,
how many are no slower than the best peer, and the worst of them. `--losses` lists the slower cells; with
`--backend cpu` the kernels run everywhere, also where "auto" leaves a call to PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sdan_fast.bench import roofline
from sdan_fast.bench.cases import DTYPES, LAYOUTS, SUBJECTS, Case, Size, Subject, Variant
from sdan_fast.bench.measuring import Clock, Row, measure

SIZES: tuple[Size, ...] = ((16, 16), (64, 64), (180, 320), (512, 512))
LARGE = 2 << 20  # bytes of traffic from which the aim binds
BANDWIDTH, ARITHMETIC = 0.7, 0.6  # the aim

_SQUARES = (3, 5, 7, 11)
_STRIPS = (3, 5, 7, 11, 21, 35)
_DILATED: tuple[tuple[Size, int], ...] = (
    ((3, 3), 3), ((5, 5), 2), ((7, 7), 4), ((1, 3), 2), ((1, 11), 6), ((11, 1), 6)
)  # fmt: skip


def _kernels() -> Iterator[Variant]:
    undilated = [(k, k) for k in _SQUARES] + [pair for k in _STRIPS for pair in ((1, k), (k, 1))]
    for (kh, kw), dilation in [*((kernel, 1) for kernel in undilated), *_DILATED]:
        name = f"{kh}x{kw}" + (f" d{dilation}" if dilation > 1 else "")
        yield Variant(name, {"kernel": (kh, kw), "dilation": dilation})


def _separable(draw: Any, shape: Any, k: int = 11, dilation: int = 1) -> Any:
    horizontal, vertical = (draw(shape[1], 1, *kernel) / k**0.5 for kernel in ((1, k), (k, 1)))
    return (draw(*shape), horizontal, draw(shape[1]), vertical, draw(shape[1])), {"dilation": dilation}


def _plain(op: str, channels: int, variants: Iterator[Variant] | tuple[Variant, ...]) -> Subject:
    return Subject(op, channels, SUBJECTS[op].make, tuple(variants))


GRID: dict[str, Subject] = {
    subject.op: subject
    for subject in (
        _plain("depthwise_conv2d", 28, _kernels()),
        Subject(
            "separable_conv2d",
            28,
            _separable,
            tuple(
                Variant(f"k{k} d{d}", {"k": k, "dilation": d})
                for k in (3, 5, 7, 11, 21, 35)
                for d in ((1, 6) if k in (3, 11, 35) else (1,))
            ),
        ),
        _plain("strip_conv_chain", 28, tuple(Variant(f"k{k}", {"k": k}) for k in (3, 7, 11, 21))),
        _plain("star", 28, tuple(Variant(name, {"activation": name}) for name in ("gelu", "relu6"))),
        _plain("layer_norm2d", 28, (Variant(""),)),
        _plain("pointwise_conv2d", 28, (Variant(""), Variant("56", channels=56))),
        _plain("pointwise_gate", 28, (Variant(""), Variant("56", channels=56))),
        _plain("star_conv", 28, (Variant("to 56"), Variant("to 28", {"out": 28}))),
        _plain("mm_lka", 56, (Variant("groups=2"),)),
    )
}


def cells(ops: list[str], sizes: list[Size], dtypes: list[str], channels: int | None) -> Iterator[Case]:
    for op in ops:
        subject, variants = GRID[op], GRID[op].variants
        if channels is not None:
            subject = replace(subject, channels=channels)
            variants = tuple(variant for variant in variants if variant.channels is None)
        for variant in variants:
            for size in sizes:
                for dtype in dtypes:
                    yield Case(subject, variant, size, dtype)


def time_cell(case: Case, backend: str, limits: roofline.Roofline, seconds: float) -> list[Row]:
    who = [(name, layout) for name in (backend, "eager") for layout in LAYOUTS]
    rows = measure(
        case, "forward", who, device="cpu", clock=Clock("cpu"), limits=limits, rounds=40, budget=seconds
    )
    for row in rows:
        if row.wrong:
            raise SystemExit(f"wrong: {case.name}, {row.layout}: {row.refused or row.share}")
    return [row for row in rows if row.ours and row.figures is not None]


def reaches(row: Row) -> bool | None:
    """Whether the cell is at the aim; None where the aim does not bind."""
    assert row.figures is not None
    if row.figures["gigabytes_per_second"] * 1e9 * row.median < LARGE:
        return None
    return (
        row.figures["share_of_clone_bandwidth"] >= BANDWIDTH or row.figures["share_of_fma_rate"] >= ARITHMETIC
    )


def summary(op: str, dtype: str, layout: str, rows: list[Row]) -> str:
    binding = [reached for row in rows if (reached := reaches(row)) is not None]
    large = [row for row in rows if reaches(row) is not None]
    shares = [1 / row.figures["times_the_floor"] for row in large if row.figures]
    ratios = [(row.figures["best_peer_over_this"], row) for row in rows if row.figures]
    worst, at = min(ratios, key=lambda pair: pair[0])
    share = f"{statistics.median(shares):.0%}" if shares else "-"
    return (
        f"| `{op}`, {dtype} | {layout} | {sum(binding)} of {len(binding)} | {share} "
        f"| {sum(ratio >= 1 for ratio, _ in ratios)} of {len(rows)} "
        f"| {worst:.2f} ({at.case.variant.name} {'x'.join(map(str, at.case.size))}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--op", action="append", choices=tuple(GRID))
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES))
    parser.add_argument("--size", action="append", metavar="HxW")
    parser.add_argument("--channels", type=int, help="of every cell's first tensor, instead of the network's")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each cell")
    parser.add_argument("--losses", action="store_true", help="list the cells that are slower than a peer")
    options = parser.parse_args()
    sizes: list[Size] = [tuple(map(int, text.split("x"))) for text in options.size or ()] or list(SIZES)  # type: ignore[misc]
    dtypes = options.dtype or ["float32"]
    limits = roofline.measure("cpu", dtype=torch.float32)
    found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for case in cells(options.op or list(GRID), sizes, dtypes, options.channels):
        for row in time_cell(case, options.backend, limits, options.seconds):
            found[case.subject.op, case.dtype, row.layout].append(row)
            ratio = row.figures["best_peer_over_this"] if row.figures else 1.0
            if options.losses and ratio < 1:
                print(f"{ratio:.2f}  {case.name}, {row.layout}: {row.median * 1e6:.1f} us", flush=True)
    print("| op | format | cells at the aim | median share of the floor | no slower than eager | worst |")
    print("|---|---|---|---|---|---|")
    for (op, dtype, layout), rows in found.items():
        print(summary(op, dtype, layout, rows))


if __name__ == "__main__":
    main()
