"""Rung 5: the PTX that nvcc makes of conv_mma and conv_mma_last, executed: values, faults, races, traffic."""

from __future__ import annotations

import functools
import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
CONV = OPS["depthwise_conv2d"]
MANGLED = {torch.bfloat16: "8bfloat16", torch.float16: "7float16"}
CASES = [(3, 1, 1), (7, 1, 3), (7, 4, 1), (7, 4, 3), (5, 3, 1), (9, 5, 3)]  # K, D, R
LAST = [(5, 1, 4), (7, 1, 4), (7, 4, 2), (7, 4, 4), (9, 5, 2)]  # K, D, J


@pytest.fixture(scope="module")
def text():
    return ptx(
        "conv_mma.cuh",
        tuple(
            f"void conv_mma_kernel<{t}, {k}, {d}, {r}>"
            f"(const {t}*, const {t}*, const {t}*, {t}*, const ProductParams)"
            for t in ("bfloat16", "float16")
            for k, d, r in CASES
        ),
    )


@pytest.fixture(scope="module")
def last_text():
    return ptx(
        "conv_mma_last.cuh",
        tuple(
            f"void conv_mma_last_kernel<{t}, {k}, {d}, {j}>"
            f"(const {t}*, const {t}*, const {t}*, {t}*, const LastProductParams)"
            for t in ("bfloat16", "float16")
            for k, d, j in LAST
        ),
    )


def up(x, n):
    return -(-x // n) * n


def launch(text, k, d, r, x, weight, bias, y, *, flip=0, tile=None, warps=4, images=1):
    """One launch; tile: its rows and columns, all of the image's if None."""
    n, c, h, w = x.shape
    rows, halo = -(-h // d), k // 2 * d
    margin = up(halo, 4)
    th, tw = tile or (up(rows, 16 * r), up(w, 32 if r == 1 else 16))
    down, across, pitch = -(-rows // th), -(-w // tw), up(tw + 2 * margin - 8, 16) + 8
    steps = -(-(8 + margin + halo) // 16)
    table = 2 * k * (8 * steps + 4)
    p = struct.pack("<11i", c, h, w, flip, int(w % 4 == 0), th, tw, down, across, images, pitch)
    name = entry(text, "conv_mma_kernel", MANGLED[x.dtype], f"Li{k}ELi{d}ELi{r}E")
    shared = 4 * table + 2 * images * (th + k - 1) * pitch
    return run(
        text,
        name,
        n * c * -(-d // images) * down * across,
        32 * warps,
        [x, weight, bias, y, p],
        shared_bytes=shared,
    )


def launch_last(text, k, d, j, x, weight, bias, y, *, flip=0, tile=None, lanes=32):
    """One launch for channels_last tensors; tile: its rows and columns, all of the image's if None."""
    n, c, h, w = x.shape
    rows, margin = -(-h // d), up(k // 2 * d, 4)
    th, tw = tile or (up(rows, 16), up(w, 8 * j))
    down, across = -(-rows // th), -(-w // tw)
    splits = -(-c // lanes)
    lanes = up(-(-c // splits), 4)
    pitch = up(tw + 2 * margin - 8, 16) + 8
    plane, pixel = up((th + k - 1) * pitch - 8, 16) + 8, up(lanes // 2 - 4, 8) + 4
    p = struct.pack("<12i", c, h, w, flip, lanes, th, tw, down, across, pitch, plane, pixel)
    name = entry(text, "conv_mma_last_kernel", MANGLED[x.dtype], f"Li{k}ELi{d}ELi{j}E")
    shared = 2 * lanes * plane + 64 * (16 * pixel + 2) + lanes * k * (k + 1) * (8 if d == 1 else 2)
    return run(
        text, name, (n * d * down * across, splits), 8 * lanes, [x, weight, bias, y, p], shared_bytes=shared
    )  # fmt: skip


def check(launch, shape, k, d, dtype, fmt=torch.contiguous_format):
    """launch(x, weight, bias, y, flip), forward and for the input gradient."""
    x, g = (random(*shape, dtype=dtype, seed=s).contiguous(memory_format=fmt) for s in (0, 1))
    weight = random(shape[1], 1, k, k, dtype=dtype, seed=2, scale=1 / k)
    bias = random(shape[1], dtype=dtype, seed=3)
    y, gx = (torch.full_like(x, float("nan")) for _ in range(2))
    launch(x, weight, bias, y, 0)
    launch(g, weight, None, gx, 1)
    kwargs, exact = {"dilation": [d, d]}, [t.double() for t in (x, weight, bias)]
    assert_bound(y, CONV.reference(x, weight, bias, **kwargs), CONV.reference(*exact, **kwargs))
    mask = [True, False, False]
    eager = CONV.reference_backward(g, x, weight, bias, **kwargs, output_mask=mask)[0]
    want = CONV.reference_backward(g.double(), *exact, **kwargs, output_mask=mask)[0]
    assert_bound(gx, eager, want)


@pytest.mark.parametrize("dtype", MANGLED, ids=str)
@pytest.mark.parametrize(("k", "d", "r"), CASES)
def test_values(text, k, d, r, dtype):
    def run(tile, x, weight, bias, y, flip):
        images = 1 if bias is None else min(d, 3)
        launch(text, k, d, r, x, weight, bias, y, flip=flip, tile=tile, images=images)

    for width, tile in ((48, None), (19, None), (48, (16 * r, 32))):
        check(functools.partial(run, tile), (1, 2, 21, width), k, d, dtype)


@pytest.mark.parametrize("dtype", MANGLED, ids=str)
@pytest.mark.parametrize(("k", "d", "j"), LAST)
def test_values_in_channels_last(last_text, k, d, j, dtype):
    def run(x, weight, bias, y, flip):
        launch_last(last_text, k, d, j, x, weight, bias, y, flip=flip, tile=(16, 8 * j), lanes=16)

    check(run, (1, 20, 21, 19), k, d, dtype, torch.channels_last)


@pytest.mark.parametrize(("k", "d", "j"), LAST[1:2])
def test_sectors_in_channels_last(last_text, k, d, j):
    """28 channels, 1.75 sectors: neighbouring threads have neighbouring pixels."""
    x = random(1, 28, 32, 40, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = random(28, 1, k, k, dtype=torch.bfloat16, seed=2)
    y = torch.full_like(x, float("nan"))
    st = launch_last(last_text, k, d, j, x, weight, None, y, tile=(16, 32))
    assert st.load_efficiency >= 0.85 and st.store_efficiency >= 0.85, st.report()
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts, st.report()


@pytest.mark.parametrize(("k", "d", "r"), CASES)
def test_traffic(text, k, d, r):
    """At rows of SDAN's: whole sectors, no bank conflicts, no halo of rows but an image's own."""
    x = random(1, 1, 48, 320, dtype=torch.bfloat16)
    weight = random(1, 1, k, k, dtype=torch.bfloat16, seed=2)
    y = torch.full_like(x, float("nan"))
    st = launch(text, k, d, r, x, weight, None, y, tile=None if d > 1 else (48, 160))
    size = x.numel() * 2
    loads = [s for s in st.sites if s.space == "global" and s.kind == "cp.async" and s.requests]
    assert loads and min(s.efficiency for s in loads) >= 0.85, st.report()
    assert st.store_efficiency >= 0.99 and st.global_store_bytes == size
    assert st.traffic["argument 0"][0] <= size * (1 if d > 1 else 1.1), st.traffic
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts, st.report()
