"""The model of time on launches small enough to work out by hand, and the counting of PyTorch's own steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sdan_fast.inspecting.counts import Counts, from_json, sample
from sdan_fast.inspecting.counts_table import Counted, rows_of
from sdan_fast.inspecting.devices import GPUS
from sdan_fast.inspecting.modelled_time import EagerStep, eager_steps, modelled

H100 = GPUS["H100"]
MB = 1e6


def launch(**values):
    """132 blocks, one an SM, that read a tensor of 4 MB one and a quarter times and write one."""
    known = dict(
        blocks=132,
        grid=132,
        threads=128,
        shared=0,
        tensors={"x": (4 * MB, 5 * MB, 0), "y": (4 * MB, 0, 4 * MB)},
    )
    return Counts(**known | values)


def test_memory_binds():
    m = modelled(H100, launch(instructions={"fp32": 1000.0}, fma=1000.0), 32e3, tensor_cores=False)
    assert m.bound == "DRAM" and m.seconds == pytest.approx(9e6 / 3.35e12)
    assert m.floor == pytest.approx(8e6 / 3.35e12) and m.ratio == pytest.approx(9 / 8)


def test_arithmetic_binds():
    """132 M warp-wide FMAs: a million an SM, 4 of them each clock; half as many integers at twice the cost."""
    counts = launch(instructions={"fp32": 132e6}, fma=132e6)
    m = modelled(H100, counts, 132e6 * 32, tensor_cores=False)
    assert m.bound in ("FMA units", "issue slots") and m.seconds == pytest.approx(1e6 / 4 / 1.98e9)
    assert m.ratio == pytest.approx(1.0)
    m = modelled(
        H100, launch(instructions={"fp32": 132e6, "int": 132e6}, fma=132e6), 132e6 * 32, tensor_cores=False
    )
    assert m.bound in ("integer units", "issue slots") and m.ratio == pytest.approx(2.0)


def test_the_fullest_sm_decides():
    """133 blocks on 132 SMs take as long as 264."""
    few, many = (launch(grid=n, instructions={"fp32": 1e6 * n}) for n in (132, 133))
    seconds = [modelled(H100, c, 0, False).resources["FMA units"] for c in (few, many)]
    assert seconds[1] == pytest.approx(2 * seconds[0])


def test_traffic_counts():
    """Parameters are cached, and what a block writes and reads back is its own."""
    counts = launch(
        tensors={"x": (4 * MB, 5 * MB, 0), "w": (1000, 132e3, 0), "y": (4 * MB, 4.2 * MB, 4 * MB)}
    )
    assert counts.compulsory == 8 * MB + 1000 and counts.moved == pytest.approx(9.2 * MB + 1000)
    assert from_json(counts.as_json()) == counts


def test_multiply_adds_are_split_over_launches_as_they_execute_them():
    """A pass that needs 96: two of our launches execute 64 and 32, and a product left to PyTorch takes 0."""
    ours = [Counted("k", launch(instructions={"fp32": n}, fma=n), "") for n in (2.0, 1.0)]
    rows = rows_of("call", [*ours, Counted("mm", EagerStep("mm", 100, 24, False), "")], 72.0)
    assert [float(r["multiply_adds_M"]) * 1e6 for r in rows] == pytest.approx([32, 16, 24], rel=1e-3)
    assert rows[2]["H100_us"] == rows[2]["H100_floor_us"]


@pytest.mark.parametrize(("blocks", "threads"), [(1, 128), (100, 128), (128, 128), (5000, 128), (5000, 1024)])
def test_samples_are_spread_over_the_grid(blocks, threads):
    chosen = sample(blocks, threads)
    assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < blocks
    if len(chosen) < blocks:
        assert len(chosen) == max(8, 8192 // threads)
        gaps = [b - a for a, b in pairwise(chosen)]
        assert max(gaps) <= 4 * blocks / len(chosen)
        assert sum(chosen) / len(chosen) == pytest.approx(blocks / 2, rel=0.2)


def test_steps_of_plain_pytorch():
    """Views are free, each kernel moves its tensors, and a depth-wise weight gradient is not counted as a dense one."""
    x = torch.empty(2, 8, 16, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    w = torch.empty(8, 1, 3, 3, device="meta", dtype=torch.bfloat16, requires_grad=True)
    v = torch.empty(4, 8, 1, 1, device="meta", dtype=torch.bfloat16)
    steps = eager_steps(lambda: F.conv2d(F.gelu(F.conv2d(x, w, padding=1, groups=8)), v).transpose(1, 2))
    assert [s.name for s in steps] == ["convolution", "gelu", "convolution"]
    assert [s.multiply_adds for s in steps] == [4096 * 9, 0, 2048 * 8]
    assert [s.dense for s in steps] == [False, False, True]
    assert steps[1].bytes == 2 * 4096 * 2 and steps[0].bytes == (2 * 4096 + 72) * 2
    y = F.conv2d(x, w, padding=1, groups=8)
    (back,) = [
        s
        for s in eager_steps(lambda: torch.autograd.grad(y, [x, w], torch.empty_like(y)))
        if s.name == "convolution_backward"
    ]
    assert back.multiply_adds == 2 * 4096 * 9 and not back.dense
