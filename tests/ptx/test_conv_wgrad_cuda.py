"""Rung 5: the PTX of the weight gradient's kernels of contiguous tensors, executed: values, faults, races, traffic.

Those of channels_last tensors are in test_conv_wgrad_last_cuda.py and test_depthwise_conv2d_cuda.py.
"""

from __future__ import annotations

import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run, weight_sums
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
CONV = OPS["depthwise_conv2d"]
MANGLED = {torch.float32: "f", torch.bfloat16: "8bfloat16", torch.float16: "7float16"}
NAME = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# (kernel, dilation, Vertical, Inner, Outer, Step): all taps in one thread, or units of taps.
TILES = [((1, 11), 2, 0, 12, 1, 0), ((1, 15), 3, 0, 8, 1, 0), ((11, 1), 2, 1, 12, 1, 0), ((5, 3), 1, 1, 8, 1, 0),
         ((3, 3), 1, 1, 3, 3, 1), ((7, 7), 2, 1, 7, 7, 0), ((5, 5), 3, 1, 5, 5, 3)]  # fmt: skip
# (kernel, dilation, Units, Pairs)
PRODUCTS = [((1, 11), 6, 1, 6), ((11, 1), 6, 6, 1), ((3, 3), 1, 4, 2), ((7, 7), 4, 3, 3)]


def up(x, n):
    return -(-x // n) * n


@pytest.fixture(scope="module")
def tile_text():
    found = {(t, *c[2:]) for t in ("float", "bfloat16") for c in TILES if t == "float" or c[4] == 1}
    return ptx(
        "conv_wgrad.cuh",
        tuple(
            f"void wgrad_tile_kernel<{t}, {'true' if v else 'false'}, {k}, {o}, {step}>"
            f"(const {t}*, const {t}*, float*, const TileParams)"
            for t, v, k, o, step in sorted(found)
        ),
    )


@pytest.fixture(scope="module")
def product_text():
    return ptx(
        "conv_wgrad_mma.cuh",
        tuple(
            f"void wgrad_mma_kernel<{t}, {u}, {p}>(const {t}*, const {t}*, float*, const MmaParams)"
            for t in ("bfloat16", "float16")
            for _, _, u, p in PRODUCTS
        ),
    )


class Case:
    """A gradient in regions of 32 x 32 (or the one given), the region's parameters, the answers."""

    def __init__(self, shape, kernel, d, dtype, region=(32, 32)):
        n, c, h, w = self.shape = shape
        self.kernel, self.dilation = kernel, (d if kernel[0] > 1 else 1, d if kernel[1] > 1 else 1)
        self.halo = [(k - 1) // 2 * s for k, s in zip(kernel, self.dilation, strict=True)]
        self.x, self.g = (random(*shape, dtype=dtype, seed=s) for s in (0, 1))
        self.weight = random(c, 1, *kernel, dtype=dtype, seed=2)
        self.bias = random(c, dtype=dtype, seed=3)
        self.regions = (-(-h // region[0]), -(-w // region[1]))
        wide = int(w * dtype.itemsize % 16 == 0)
        self.head = [c, h, w, *kernel, *self.dilation, wide, *region, *self.regions]
        self.splits = self.regions[0] * self.regions[1]
        self.partial = torch.full((n * c * self.splits, kernel[0] * kernel[1] + 1), float("nan"))

    def launch(self, text, name, tile, rest, blocks, warps, shared):
        packed = struct.pack("<20i", *self.head, *tile, *rest)
        grid = (self.partial.shape[0], blocks)
        return run(text, name, grid, 32 * warps, [self.g, self.x, self.partial, packed], shared_bytes=shared)

    def check(self):
        n, c = self.shape[:2]
        gw, gb = (torch.full_like(t, float("nan")) for t in (self.weight, self.bias))
        taps, strides = self.kernel[0] * self.kernel[1], (c * self.splits, self.splits, 1)
        weight_sums(self.partial, gw, gb, c, taps, n, self.splits, strides)
        args, kwargs = (self.g, self.x, self.weight, self.bias), {"dilation": list(self.dilation)}
        mask = [False, True, True]
        eager = CONV.reference_backward(*args, **kwargs, output_mask=mask)
        exact = CONV.reference_backward(*[t.double() for t in args], **kwargs, output_mask=mask)
        assert_bound(gw, eager[-2], exact[-2], "weight")
        assert_bound(gb, eager[-1], exact[-1], "bias")


@pytest.mark.parametrize("width", [40, 19])
@pytest.mark.parametrize(
    ("dtype", "kernel", "d", "vertical", "inner", "outer", "step"),
    # Squares in 16 bits are the tensor cores'.
    [
        (t, *case)
        for t in (torch.float32, torch.bfloat16)
        for case in TILES
        if t == torch.float32 or case[4] == 1
    ],
    ids=str,
)
def test_tiles(tile_text, dtype, kernel, d, vertical, inner, outer, step, width):
    case = Case((2, 2, 40, width), kernel, d, dtype)
    (dh, dw), (hy, hx) = case.dilation, case.halo
    tile = (8 * dh, 32) if vertical else (8, up(32, 7 * dw))
    lead = up(hx, 8)
    columns = up(lead + tile[1] + hx, 8)
    pitches = (columns + 4, tile[1] + 4) if vertical else (up(columns, 32) + 4, up(tile[1], 32) + 4)
    rows = tile[0] + 2 * hy
    along, across = kernel if vertical else kernel[::-1]
    units = 1 if outer > 1 else across * -(-along // inner)
    at_once = min(units, 8)
    shared = 8 * (rows * pitches[0] + tile[0] * pitches[1])
    name = entry(tile_text, f"wgrad_tile_kernelI{'N' if dtype.itemsize == 2 else 'f'}",
                 f"{MANGLED[dtype]}", f"Lb{vertical}ELi{inner}ELi{outer}ELi{step}E")  # fmt: skip
    rest = [lead, rows, columns, *pitches, 8 // at_once]
    case.launch(tile_text, name, tile, rest, -(-units // at_once), at_once * (8 // at_once), shared)
    case.check()


def products(text, case, units, pairs, tile, splits=2):
    """wgrad_mma, as wgrad_plan.h has it but for the sizes of regions and tiles."""
    hy, hx = case.halo
    groups = -(-case.kernel[0] // units)
    each = -(-case.kernel[0] // groups)
    rows, columns = tile[0] + 2 * hy, tile[1] + 16 * (pairs - 1)
    stage = 2 * (tile[0] * (columns + 8) + rows * (tile[1] + 8))
    shared = max(2 * stage, groups * splits * 4 * (16 * (16 * pairs + 8) + 16))
    name = entry(text, "wgrad_mma_kernel", f"{MANGLED[case.x.dtype]}E", f"Li{units}ELi{pairs}E")
    rest = [up(hx, 8), rows, columns, each, groups, splits]
    return case.launch(text, name, tile, rest, 1, groups * splits, shared)


@pytest.mark.parametrize("width", [48, 19])
@pytest.mark.parametrize(("kernel", "d", "units", "pairs"), PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products(product_text, dtype, kernel, d, units, pairs, width):
    case = Case((2, 2, 37, width), kernel, d, dtype)
    products(product_text, case, units, pairs, (16, 32))
    case.check()


@pytest.mark.parametrize(("kernel", "d", "units", "pairs"), PRODUCTS)
def test_traffic(product_text, kernel, d, units, pairs):
    """At rows of SDAN's: everything once, in whole sectors, almost without bank conflicts."""
    case = Case((1, 1, 48, 320), kernel, d, torch.bfloat16, region=(48, 320))
    tile = (48, 80) if kernel[0] > 1 else (16, 160)
    st = products(product_text, case, units, pairs, tile, splits=4 if kernel[0] < 4 else 2)
    size = case.x.numel() * 2
    assert st.traffic["argument 0"] == (size, 0) and st.traffic["argument 1"] == (size, 0)
    loads = [s for s in st.sites if s.space == "global" and s.kind == "cp.async" and s.requests]
    assert max(s.efficiency for s in loads) >= 0.99 and min(s.efficiency for s in loads) >= 0.85
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts, st.report()
    case.check()
