"""Rung 5: the PTX that nvcc makes of conv_last, executed: values, faults, races, sectors."""

from __future__ import annotations

import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
CONV = OPS["depthwise_conv2d"]
TYPE = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Instances (K, V), kernels that take them, dilations, channels.
CASES = [
    (3, 4, (3, 3), (2, 2), 24),
    (7, 4, (7, 7), (1, 1), 8),
    (1, 4, (11, 5), (1, 2), 4),
    (1, 1, (5, 3), (2, 1), 3),
]


@pytest.fixture(scope="module")
def text():
    instances = []
    for t in TYPE.values():
        for k, v in sorted({case[:2] for case in CASES}):
            p = f"const {t}*"
            instances.append(f"void conv_last_kernel<{t}, {k}, {v}>({p}, {p}, {p}, {t}*, const LastParams)")
    return ptx("conv_last.cuh", tuple(instances))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("k", "v", "kernel", "dilation", "c"), CASES)
def test_values_and_sectors(text, k, v, kernel, dilation, c, dtype):
    n, h, w = 2, 23, 17
    (kh, kw), (dh, dw) = kernel, dilation
    x, g = (
        random(n, c, h, w, dtype=dtype, seed=s).contiguous(memory_format=torch.channels_last) for s in (0, 1)
    )
    weight = random(c, 1, kh, kw, dtype=dtype, seed=2, scale=(kh * kw) ** -0.5)
    bias = random(c, dtype=dtype, seed=3)
    name = TYPE[dtype]
    mangled = "If" if name == "float" else f"{len(name)}{name}"
    rows, groups, columns = 8 if k == 1 else 9, 1, 8
    height = -(-h // dh)  # of the images that rows dh apart form
    down, across = -(-height // (groups * rows)), -(-w // columns)

    def launch(x, bias, flip):
        y = torch.full_like(x, float("nan"))
        p = struct.pack("<q12i", n, c, h, w, kh, kw, dh, dw, flip, groups, columns, down, across)
        lanes = -(-c // v)
        st = run(
            text, entry(text, "conv_last_kernel", mangled, f"Li{k}ELi{v}E"), n * dh * down * across,
            (lanes, min(128 // lanes, 8)), [x, weight, bias, y, p], shared_bytes=4 * kh * kw * lanes * v,
        )  # fmt: skip
        return y, st

    y, st = launch(x, bias, 0)
    gx, _ = launch(g, None, 1)
    kwargs, exact = {"dilation": list(dilation)}, [t.double() for t in (x, weight, bias)]
    assert_bound(y, CONV.reference(x, weight, bias, **kwargs), CONV.reference(*exact, **kwargs))
    mask = [True, False, False]
    eager = CONV.reference_backward(g, x, weight, bias, **kwargs, output_mask=mask)[0]
    want = CONV.reference_backward(g.double(), *exact, **kwargs, output_mask=mask)[0]
    assert_bound(gx, eager, want)
    if c == 24:
        # Also of 24 16-bit channels, a sector and a half: neighbouring threads have neighbouring pixels. The loads of a
        # tap are shifted by whole pixels, so that in 16 bits they begin in the middle of a sector. Taps are scalars.
        loads = [
            s for s in st.sites if s.space == "global" and s.kind == "ld" and s.size == 4 * x.element_size()
        ]
        assert st.store_efficiency >= 0.85, st.report()
        assert loads and min(s.efficiency for s in loads) >= (0.85 if dtype == torch.float32 else 0.8)
        assert st.bank_conflicts <= 0.10 * st.shared_wavefronts, st.report()
