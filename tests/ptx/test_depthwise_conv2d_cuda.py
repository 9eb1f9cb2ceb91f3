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


@pytest.fixture(scope="module")
def text():
    instances = []
    for _, t in DTYPE.values():
        p, v = f"const {t}*", 4 // (4 if t == "float" else 2)
        for channels, inner, outer in ((v, 3, 3), (v, 8, 1), (1, 12, 1), (2 * v, 12, 1)):
            if t == "float" and channels > 1:
                continue
            instances.append(
                f"void wgrad_last_kernel<{t}, {channels}, {inner}, {outer}>({p}, {p}, float*, const ConvParams)"
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
    "abreast",
    "vertical",
]


def params(dtype, planes, **fields):
    """ConvParams as bytes; the fields that a kernel does not read may be missing."""
    values = [fields.get(name, 0) for name in FIELDS]
    return struct.pack("<iiq17i4x", DTYPE[dtype][0], 0, planes, *values)


def inputs(shape, kernel, dtype):
    x, g = (random(*shape, dtype=dtype, seed=s) for s in (0, 1))
    taps = kernel[0] * kernel[1]
    return (
        x,
        random(shape[1], 1, *kernel, dtype=dtype, seed=2, scale=taps**-0.5),
        random(shape[1], dtype=dtype, seed=3),
        g,
    )


@pytest.mark.parametrize("dtype", DTYPE, ids=str)
def test_weight_gradient_in_channels_last(text, dtype):
    kernel, dilation, taps = (3, 3), (2, 2), 9
    n, c, h, w = shape = (2, 24, 13, 17)
    x, weight, bias, g = inputs(shape, kernel, dtype)
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    v = 4 // x.element_size()
    _, tname = DTYPE[dtype]
    mangled = "If" if tname == "float" else f"{len(tname)}{tname}"
    fields = dict(zip(["kh", "kw", "dh", "dw"], (*kernel, *dilation), strict=True))
    splits = 3
    partial = torch.full((splits, c, taps + 1), float("nan"))
    # All taps of a thread's channels, or units of 8 taps of the three columns; 4, 2 or 1 columns at a time.
    for pair, inner, outer, abreast in ((v, 3, 3, 4), (v, 8, 1, 2), (1, 12, 1, 1), (2 * v, 12, 1, 4)):
        if tname == "float" and pair > 1:
            continue
        p = params(dtype, n, channels=c, height=h, width=w, vertical=1, abreast=abreast, **fields)
        partial.fill_(float("nan"))
        name = entry(text, "wgrad_last_kernel", mangled, f"Li{pair}ELi{inner}ELi{outer}E")
        lanes = c // pair
        pitch = lanes * 4 + (lanes - lanes * 4) % 32
        shared = 4 * pitch * pair * (inner + 1)
        run(text, name, (splits, 1, 3 // outer), (lanes, 4), [g, x, partial, p], shared_bytes=shared)
        check_sums(partial, x, weight, bias, g, dilation, splits)


def test_sectors_of_rows(text):
    """28 channels of 16 bits are 1.75 sectors: where a pixel begins with one, its two are 87.5 % used at best."""
    n, c, h, w = shape = (1, 28, 2, 160)
    x, weight, bias, g = inputs(shape, (1, 11), torch.bfloat16)
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    partial = torch.full((1, c, 12), float("nan"))
    fields = dict(
        zip(["channels", "height", "width", "kh", "kw", "dh", "dw"], (c, h, w, 1, 11, 1, 1), strict=True)
    )
    p = params(torch.bfloat16, n, abreast=1, **fields)
    name = entry(text, "wgrad_last_kernel", "8bfloat16", "Li4ELi12ELi1E")
    shared = 4 * (7 * 36 + (7 - 7 * 36) % 32) * 4 * 13
    st = run(text, name, (1, 1, 1), (7, 36), [g, x, partial, p], shared_bytes=shared)
    check_sums(partial, x, weight, bias, g, (1, 1), 1)
    loads = [s for s in st.sites if s.space == "global" and s.kind == "ld" and s.requests]
    assert max(s.efficiency for s in loads if s.size == 8) >= 0.85, st.report()
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts


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
