"""Rung 5: the PTX that nvcc makes of the depth-wise convolution's kernels, executed: values, faults, races, traffic."""

from __future__ import annotations

import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run, weight_sums
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
CONV = OPS["depthwise_conv2d"]
DTYPE = {torch.float32: (0, "float"), torch.bfloat16: (1, "bfloat16"), torch.float16: (2, "float16")}
ANY = "const void*, const void*, const void*, void*, const ConvParams"


@pytest.fixture(scope="module")
def text():
    instances = [f"void conv_square_kernel<{k}>({ANY})" for k in (1, 3, 7)]
    for _, t in DTYPE.values():
        p, v = f"const {t}*", 4 // (4 if t == "float" else 2)
        instances.append(f"void conv_last_kernel<{t}, 3, {v}>({p}, {p}, {p}, {t}*, const ConvParams)")
        for pair, inner, outer in ((v, 3, 3), (v, 8, 1), (1, 12, 1)):
            instances.append(
                f"void wgrad_last_kernel<{t}, {pair}, {inner}, {outer}>({p}, {p}, float*, const ConvParams)"
            )
    return ptx("conv_wgrad.cuh", tuple(instances))


FIELDS = [
    "channels",
    "height",
    "width",
    "kh",
    "kw",
    "dh",
    "dw",
    "flip",
    "tile_h",
    "tile_w",
    "tiles_y",
    "tiles_x",
    "rows",
    "pitch",
    "wide",
    "splits",
    "vertical",
]


def params(dtype, planes, **fields):
    """ConvParams as bytes; the fields that a kernel does not read may be missing."""
    values = [fields.get(name, 0) for name in FIELDS]
    return struct.pack("<iiq17i4x", DTYPE[dtype][0], 0, planes, *values)


def up(x, n):
    return -(-x // n) * n


def tiles(h, w, kernel, dilation):
    """The tile that conv_plan.h chooses for small images, and the shared floats beside the taps."""
    (kh, kw), (dh, dw) = kernel, dilation
    hy, hx = (kh - 1) * dh, (kw - 1) * dw
    t = {"tile_h": up(min(h, 32), 8 * dh), "tile_w": 64}
    t |= {"rows": t["tile_h"] + hy, "pitch": up(t["tile_w"] + hx + 7, 8)}
    items = t["tile_h"] // 8 * t["tile_w"]
    t |= {"tiles_y": -(-h // t["tile_h"]), "tiles_x": -(-w // t["tile_w"])}
    return t, items, t["rows"] * t["pitch"]


def inputs(shape, kernel, dtype):
    x, g = (random(*shape, dtype=dtype, seed=s) for s in (0, 1))
    taps = kernel[0] * kernel[1]
    return (
        x,
        random(shape[1], 1, *kernel, dtype=dtype, seed=2, scale=taps**-0.5),
        random(shape[1], dtype=dtype, seed=3),
        g,
    )


def launch(text, kind, instance, shape, kernel, dilation, dtype, x, weight, bias, y, flip=0, approx="exact"):
    n, c, h, w = shape
    t, items, floats = tiles(h, w, kernel, dilation)
    fields = dict(zip(["kh", "kw", "dh", "dw"], (*kernel, *dilation), strict=True))
    wide = int(w % (4 if dtype == torch.float32 else 8) == 0)
    p = params(dtype, n * c, channels=c, height=h, width=w, flip=flip, wide=wide, **fields, **t)
    threads = min(512, up(items, 32))
    taps = (kernel[0] if kernel[0] < 3 else up(kernel[0], 4)) * kernel[
        1
    ]  # conv_square's, in whole accesses of 4
    shared = 4 * (up(taps + 1, 4) + floats)
    name = entry(text, f"conv_{kind}_kernel", f"ILi{instance}E")
    blocks = n * c * t["tiles_y"] * t["tiles_x"]
    return run(text, name, blocks, threads, [x, weight, bias, y, p], shared_bytes=shared, approx=approx)


CASES = [
    ("square", 3, (3, 3), 1),
    ("square", 7, (7, 7), 4),
    ("square", 1, (1, 15), 2),
    ("square", 1, (11, 5), 1),
]


@pytest.mark.parametrize("dtype", DTYPE, ids=str)
@pytest.mark.parametrize(("kind", "instance", "kernel", "d"), CASES)
@pytest.mark.parametrize("width", [48, 19])
def test_contiguous(text, kind, instance, kernel, d, dtype, width):
    shape, dilation = (1, 2, 21, width), (d if kernel[0] > 1 else 1, d if kernel[1] > 1 else 1)
    x, weight, bias, g = inputs(shape, kernel, dtype)
    y, gx = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    launch(text, kind, instance, shape, kernel, dilation, dtype, x, weight, bias, y)
    launch(text, kind, instance, shape, kernel, dilation, dtype, g, weight, None, gx, flip=1)
    kwargs, exact = {"dilation": list(dilation)}, [t.double() for t in (x, weight, bias)]
    assert_bound(y, CONV.reference(x, weight, bias, **kwargs), CONV.reference(*exact, **kwargs))
    mask = [True, False, False]
    eager = CONV.reference_backward(g, x, weight, bias, **kwargs, output_mask=mask)[0]
    want = CONV.reference_backward(g.double(), *exact, **kwargs, output_mask=mask)[0]
    assert_bound(gx, eager, want)


@pytest.mark.parametrize(("kind", "instance", "kernel", "d"), [c for c in CASES if c[1] > 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic(text, kind, instance, kernel, d, dtype):
    """Wide, full sectors. Strips are in test_strip_conv_chain_cuda.py."""
    shape = (1, 1, 40, 320)
    x, weight, bias, _ = inputs(shape, kernel, dtype)
    y = torch.full(shape, float("nan"), dtype=dtype)
    st = launch(text, kind, instance, shape, kernel, (d, d), dtype, x, weight, bias, y)
    size = x.numel() * x.element_size()
    assert st.load_efficiency >= 0.8  # a square's rows begin within a sector
    assert st.store_efficiency >= 0.99
    assert st.global_store_bytes == size
    assert size <= st.global_load_sector_bytes <= 4 * size + 64 * 1024
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts, st.report()


@pytest.mark.parametrize("dtype", DTYPE, ids=str)
def test_channels_last(text, dtype):
    kernel, dilation, taps = (3, 3), (2, 2), 9
    n, c, h, w = shape = (2, 24, 13, 17)
    x, weight, bias, g = inputs(shape, kernel, dtype)
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    y = torch.full_like(x, float("nan"))
    v = 4 // x.element_size()
    _, tname = DTYPE[dtype]
    mangled = "If" if tname == "float" else f"{len(tname)}{tname}"
    fields = dict(zip(["kh", "kw", "dh", "dw"], (*kernel, *dilation), strict=True))
    p = params(dtype, n, channels=c, height=h, width=w, vertical=1, splits=1, **fields)
    st = run(
        text, entry(text, "conv_last_kernel", mangled), (3, 1, n), (c // v, 4), [x, weight, bias, y, p],
        shared_bytes=4 * taps * c,
    )  # fmt: skip
    kwargs, exact = {"dilation": list(dilation)}, [t.double() for t in (x, weight, bias)]
    assert_bound(y, CONV.reference(x, weight, bias, **kwargs), CONV.reference(*exact, **kwargs))
    # Also of 24 16-bit channels, a sector and a half: neighbouring threads have neighbouring pixels. The loads of a tap
    # are shifted by whole pixels, so that in 16 bits they begin in the middle of a sector.
    assert st.store_efficiency >= 0.85
    assert st.load_efficiency >= (0.85 if dtype == torch.float32 else 0.8)

    splits = 3
    partial = torch.full((splits, c, taps + 1), float("nan"))
    # All taps of a thread's channels, or units of 8 taps of the three columns.
    for pair, inner, outer in ((v, 3, 3), (v, 8, 1), (1, 12, 1)):
        partial.fill_(float("nan"))
        name = entry(text, "wgrad_last_kernel", f"{mangled}", f"Li{pair}ELi{inner}ELi{outer}E")
        lanes = c // pair
        pitch = lanes * 4 + (lanes - lanes * 4) % 32
        shared = 4 * pitch * pair * (inner + 1)
        run(text, name, (splits, 1, 3 // outer), (lanes, 4), [g, x, partial, p], shared_bytes=shared)
        check_sums(partial, x, weight, bias, g, dilation, splits)


def check_sums(partial, x, weight, bias, g, dilation, splits):
    """The gradients of weight and bias from partial sums of channels_last tensors."""
    c, taps, kwargs = x.shape[1], weight[0].numel(), {"dilation": list(dilation)}
    exact = [t.double() for t in (x, weight, bias)]
    gw, gb = torch.full_like(weight, float("nan")), torch.full_like(bias, float("nan"))
    weight_sums(partial, gw, gb, c, taps, 1, splits, (0, 1, c))
    eager = CONV.reference_backward(g, x, weight, bias, **kwargs, output_mask=[True] * 3)
    want = CONV.reference_backward(g.double(), *exact, **kwargs, output_mask=[True] * 3)
    assert_bound(gw, eager[1], want[1])
    assert_bound(gb, eager[2], want[2])
