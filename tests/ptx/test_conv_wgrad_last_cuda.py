"""Rung 5: the PTX that nvcc makes of wgrad_mma_last, executed: values, faults, races, sectors."""

from __future__ import annotations

import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run, weight_sums
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
CONV = OPS["depthwise_conv2d"]
MANGLED = {torch.bfloat16: "8bfloat16", torch.float16: "7float16"}
CASES = [(5, 3), (7, 1), (7, 4), (9, 5)]  # K, D; the taps of the last take two turns


@pytest.fixture(scope="module")
def text():
    return ptx(
        "conv_wgrad_mma_last.cuh",
        tuple(
            f"void wgrad_mma_last_kernel<{t}, {k}, {d}>"
            f"(const {t}*, const {t}*, float*, const GradProductParams)"
            for t in ("bfloat16", "float16")
            for k, d in CASES
        ),
    )


def up(x, n):
    return -(-x // n) * n


def launch(text, k, d, g, x, partial, *, tile, lanes):
    n, c, h, w = x.shape
    rows, halo = -(-h // d), k // 2 * d
    margin, (th, tw) = up(halo, 4), tile
    down, across, splits = -(-rows // th), -(-w // tw), -(-c // lanes)
    lanes = up(-(-c // splits), 4)
    pitches = [up(m - 8, 16) + 8 for m in (tw + 2 * margin, tw)]
    planes = [up(m * pitch - 8, 16) + 8 for m, pitch in zip((th, th + k - 1), pitches, strict=True)]
    shared = 2 * lanes * sum(planes)
    products = -(-(16 + (k - 1) * d + margin - halo) // 8)
    at_once = k if k * products <= 36 else (k + 1) // 2  # rows of taps
    scratch = 8 * up(3 * (up(at_once * k - 8, 32) + 8) + at_once * k + 6, 4)  # bytes of a warp
    apart = at_once < k or 2 * min(planes) < scratch // 2
    p = struct.pack(
        "<14i", c, h, w, lanes, th, tw, down, across, n * d * down * across, pitches[0], planes[0], pitches[1],
        planes[1], apart * shared,
    )  # fmt: skip
    name = entry(text, "wgrad_mma_last_kernel", MANGLED[x.dtype], f"Li{k}ELi{d}E")
    shared += apart * lanes // 4 * scratch
    grid = (partial.shape[0], splits)
    return run(text, name, grid, 8 * lanes, [g, x, partial, p], shared_bytes=shared)


def gradients(text, k, d, dtype, shape, blocks, **kwargs):
    """One launch and the sums of what it leaves, held against the reference."""
    c = shape[1]
    x, g = (random(*shape, dtype=dtype, seed=s).contiguous(memory_format=torch.channels_last) for s in (0, 1))
    weight, bias = random(c, 1, k, k, dtype=dtype, seed=2), random(c, dtype=dtype, seed=3)
    partial = torch.full((blocks, c, k * k + 1), float("nan"))
    st = launch(text, k, d, g, x, partial, **kwargs)
    gw, gb = torch.full_like(weight, float("nan")), torch.full_like(bias, float("nan"))
    weight_sums(partial, gw, gb, c, k * k, 1, blocks, (0, 1, c))
    args, mask = (g, x, weight, bias), [False, True, True]
    eager = CONV.reference_backward(*args, dilation=[d, d], output_mask=mask)
    exact = CONV.reference_backward(*[t.double() for t in args], dilation=[d, d], output_mask=mask)
    assert_bound(gw, eager[-2], exact[-2], "weight")
    assert_bound(gb, eager[-1], exact[-1], "bias")
    return st


@pytest.mark.parametrize("dtype", MANGLED, ids=str)
@pytest.mark.parametrize(("k", "d"), CASES)
def test_values(text, k, d, dtype):
    # Several tiles for a block, some of them of rows that an image does not have.
    gradients(text, k, d, dtype, (1, 20, 23, 35), 2, tile=(16, 16), lanes=16)


def test_sectors(text):
    """28 channels, 1.75 sectors."""
    st = gradients(text, 7, 1, torch.bfloat16, (1, 28, 32, 40), 4, tile=(16, 32), lanes=32)
    assert st.load_efficiency >= 0.85, st.report()
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts, st.report()
