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
    gw, gb = torch.full_like(weight, float("nan")), torch.full_like(bias, float("nan"))
    weight_sums(partial, gw, gb, c, taps, 1, splits, (0, 1, c))
    eager = CONV.reference_backward(g, x, weight, bias, **kwargs, output_mask=[True] * 3)
    want = CONV.reference_backward(g.double(), *exact, **kwargs, output_mask=[True] * 3)
    assert_bound(gw, eager[1], want[1])
    assert_bound(gb, eager[2], want[2])
