"""The model of time on launches small enough to work out by hand, and the counting of PyTorch's own steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sdan_fast.inspecting import arguments, workload
from sdan_fast.inspecting.counts import Counts, from_json, sample
from sdan_fast.inspecting.counts_table import Counted, needed_work, rows_of, split_work
from sdan_fast.inspecting.devices import GPUS
from sdan_fast.inspecting.modelled_time import EagerStep, Needed, Work, eager_steps, modelled, step_seconds

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
    m = modelled(H100, launch(instructions={"fp32": 1000.0}, fma=1000.0), Needed(32e3))
    assert m.bound == "DRAM" and m.seconds == pytest.approx(9e6 / 3.35e12)
    assert m.floor == pytest.approx(8e6 / 3.35e12) and m.ratio == pytest.approx(9 / 8)


def test_arithmetic_binds():
    """132 M warp-wide FMAs: a million an SM, 4 of them each clock; half as many integers at twice the cost."""
    counts = launch(instructions={"fp32": 132e6}, fma=132e6)
    m = modelled(H100, counts, Needed(132e6 * 32))
    assert m.bound in ("FMA units", "issue slots") and m.seconds == pytest.approx(1e6 / 4 / 1.98e9)
    assert m.ratio == pytest.approx(1.0)
    m = modelled(H100, launch(instructions={"fp32": 132e6, "int": 132e6}, fma=132e6), Needed(132e6 * 32))
    assert m.bound in ("integer units", "issue slots") and m.ratio == pytest.approx(2.0)


def test_the_fullest_sm_decides():
    """133 blocks on 132 SMs take as long as 264."""
    few, many = (launch(grid=n, instructions={"fp32": 1e6 * n}) for n in (132, 133))
    seconds = [modelled(H100, c, Needed()).resources["FMA units"] for c in (few, many)]
    assert seconds[1] == pytest.approx(2 * seconds[0])


def test_traffic_counts():
    """Parameters are cached, and what a block writes and reads back is its own."""
    counts = launch(
        tensors={"x": (4 * MB, 5 * MB, 0), "w": (1000, 132e3, 0), "y": (4 * MB, 4.2 * MB, 4 * MB)}
    )
    assert counts.compulsory == 8 * MB + 1000 and counts.moved == pytest.approx(9.2 * MB + 1000)
    assert from_json(counts.as_json()) == counts


def test_no_launch_is_faster_than_a_round_trip_to_dram():
    """A few numbers: neither the time nor the floor is that of their bytes. Beyond it the round trip costs nothing."""
    tiny = launch(grid=1, tensors={"x": (400.0, 400.0, 0), "y": (4.0, 0, 4.0)}, instructions={"fp32": 100.0})
    m = modelled(H100, tiny, Needed())
    assert m.bound == "latency" and m.seconds == m.floor == pytest.approx(700 / 1.98e9)
    assert step_seconds(H100, EagerStep("cat", 400, Work(), False)) == m.floor
    assert modelled(H100, launch(), Needed()).floor == pytest.approx(8e6 / 3.35e12)


def test_multiply_adds_are_split_over_launches_as_they_execute_them():
    """A pass that needs 72, and 24 of a product left to PyTorch: two of our launches execute 64 and 32."""
    ours = [Counted("k", launch(instructions={"fp32": n}, fma=n), "") for n in (2.0, 1.0)]
    product = Counted("mm", EagerStep("mm", 100, Work(product=24), False), "")
    rows = rows_of("call", [*ours, product], Work(stencil=48, product=24))
    assert [float(r["multiply_adds_M"]) * 1e6 for r in rows] == pytest.approx([32, 16, 24], rel=1e-3)
    assert rows[2]["H100_us"] == rows[2]["H100_floor_us"]


def test_tensor_cores_take_no_multiply_adds_of_other_launches():
    """An input gradient that executes a quarter more than it needs, beside a weight gradient that computes 8 x."""
    macs = 64e6
    dgrad = launch(instructions={"fp32": 80e6 / 32}, fma=80e6 / 32)
    mma = launch(instructions={"mma": 1e3, "fp32": 1e3}, fma=2e3, mma_flops=2 * 8 * macs)
    launches = [Counted("conv_square", dgrad, ""), Counted("wgrad_mma", mma, "")]
    assert split_work(launches, Work(macs, macs)) == [Needed(macs, 0.0), Needed(0.0, macs)]
    (needed,) = split_work([Counted("both", dgrad, "")], Work(macs, macs / 2))  # no more than it executes
    assert needed == Needed(80e6, 0.0)
    fused = launch(instructions={"mma": 1e3, "fp32": 3e6}, fma=3e6 + 1e3, mma_flops=2 * 2 * macs)
    (needed,) = split_work([Counted("gate", fused, "")], Work(stencil=macs, product=macs))
    assert needed == Needed(macs, macs)


def test_what_a_pass_needs():
    """Of a backward the forward where a gradient needs it, and of a chain's input gradient nothing but that."""
    cases = workload.own_cases(torch.bfloat16, "nchw", (1, 9, 24))
    with arguments.blank():
        known = {f"{c.op} {c.label}": c for c in cases}
        elements = 28 * 9 * 24
        square, chain = known["depthwise_conv2d 7x7"], known["strip_conv_chain 11, 11 d6"]
        assert needed_work(square, None) == Work(stencil=49 * elements)
        assert needed_work(square, [True] * 3) == Work(49 * elements, 49 * elements)
        everything, of_x = workload.masks(chain.op, chain.make()[0])
        assert needed_work(chain, everything) == Work((3 + 4) * 11 * elements, 4 * 11 * elements)
        assert needed_work(chain, of_x) == Work(stencil=4 * 11 * elements)


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
    assert [s.work for s in steps] == [Work(stencil=4096 * 9), Work(), Work(product=2048 * 8)]
    assert [s.dense for s in steps] == [False, False, True]
    assert steps[1].bytes == 2 * 4096 * 2 and steps[0].bytes == (2 * 4096 + 72) * 2
    y = F.conv2d(x, w, padding=1, groups=8)
    (back,) = [
        s
        for s in eager_steps(lambda: torch.autograd.grad(y, [x, w], torch.empty_like(y)))
        if s.name == "convolution_backward"
    ]
    assert back.work == Work(4096 * 9, 4096 * 9) and not back.dense
