"""Rung 5: the PTX that nvcc makes of conv_square, executed: values, faults, races, traffic."""

from __future__ import annotations

import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
CONV = OPS["depthwise_conv2d"]
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Instances (K, D), and kernels that take them with their dilations.
CASES = [
    (3, 1, (3, 3), (1, 1)),
    (7, 1, (7, 7), (1, 1)),
    (7, 4, (7, 7), (4, 4)),
    (5, 3, (5, 5), (3, 3)),
    (7, 0, (7, 7), (2, 3)),
    (1, 0, (1, 15), (1, 2)),
    (1, 0, (11, 5), (2, 1)),
]


@pytest.fixture(scope="module")
def text():
    arguments = "const void*, const void*, const void*, void*, const SquareParams"
    instances = sorted({f"void conv_square_kernel<{k}, {d}>({arguments})" for k, d, *_ in CASES})
    return ptx("conv_square.cuh", tuple(instances))


def up(x, n):
    return -(-x // n) * n


def launch(text, k, d, kernel, dilation, x, weight, bias, y, *, flip=0, tile=None):
    """One launch; tile: its rows and columns, all of the image's if None."""
    (n, c, h, w), (kh, kw), (dh, dw) = x.shape, kernel, dilation
    outputs = 8 if d == 0 else 5 if d == 1 or k > 7 else 9
    rows, margin = -(-h // dh), -(-((kw - 1) // 2 * dw) // 4)
    th, tw = tile or (up(rows, outputs), up(w, 4))
    down, across, pitch = -(-rows // th), -(-w // tw), tw // 4 + 2 * margin
    taps = up((kh if kh < 3 else up(kh, 4)) * (kh if d else kw), 4)
    p = struct.pack(
        "<q17i4x", n * c, DTYPE[x.dtype], c, h, w, kh, kw, dh, dw, flip, int(w % 4 == 0), th, tw, down, across,
        pitch, margin, taps,
    )  # fmt: skip
    block = (min(pitch, 256), max(1, min(256 // pitch, 3)))
    return run(
        text, entry(text, "conv_square_kernel", f"ILi{k}ELi{d}E"), n * c * dh * down * across, block,
        [x, weight, bias, y, p], shared_bytes=4 * (taps + (th + kh - 1) * pitch * 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("k", "d", "kernel", "dilation"), CASES)
def test_values(text, k, d, kernel, dilation, dtype):
    for width, tile in ((48, None), (19, None), (48, (10 if d in (0, 1) else 9, 32))):
        tile = tile and (up(tile[0], 8) if d == 0 else tile[0], tile[1])
        shape = (1, 2, 21, width)
        x, g = (random(*shape, dtype=dtype, seed=s) for s in (0, 1))
        weight = random(2, 1, *kernel, dtype=dtype, seed=2, scale=(kernel[0] * kernel[1]) ** -0.5)
        bias = random(2, dtype=dtype, seed=3)
        y, gx = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        launch(text, k, d, kernel, dilation, x, weight, bias, y, tile=tile)
        launch(text, k, d, kernel, dilation, g, weight, None, gx, flip=1, tile=tile)
        kwargs, exact = {"dilation": list(dilation)}, [t.double() for t in (x, weight, bias)]
        assert_bound(y, CONV.reference(x, weight, bias, **kwargs), CONV.reference(*exact, **kwargs))
        mask = [True, False, False]
        eager = CONV.reference_backward(g, x, weight, bias, **kwargs, output_mask=mask)[0]
        want = CONV.reference_backward(g.double(), *exact, **kwargs, output_mask=mask)[0]
        assert_bound(gx, eager, want)


@pytest.mark.parametrize(("k", "d", "kernel", "dilation"), CASES[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic(text, k, d, kernel, dilation, dtype):
    """Whole sectors, no bank conflicts; a dilated square reads no halo again but its rows' own."""
    x = random(1, 1, 40, 320, dtype=dtype)
    weight = random(1, 1, *kernel, dtype=dtype, seed=2)
    y = torch.full_like(x, float("nan"))
    rows = -(-40 // d)
    tile = (20, 320) if d == 1 else (up(rows, 5 if k > 7 else 9), 160)
    st = launch(text, k, d, kernel, dilation, x, weight, None, y, tile=tile)
    size = x.numel() * x.element_size()
    assert st.load_efficiency >= 0.8  # a tile's margin begins within a sector
    assert st.store_efficiency >= 0.99
    assert st.global_store_bytes == size
    again = k - 1 if d == 1 else 4  # of 40 rows
    assert 40 * st.traffic["argument 0"][0] <= (40 + again) * size, st.traffic
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts, st.report()
