"""Rung 5: the PTX that nvcc makes of the LayerNorm's kernels, executed: values, faults, races, traffic."""

from __future__ import annotations

import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
NORM = OPS["layer_norm2d"]
TYPES = {torch.float32: ("float", "f", 4), torch.bfloat16: ("bfloat16", "NS0_8bfloat16E", 8)}


@pytest.fixture(scope="module")
def text():
    instances = []
    for t, _, wide in TYPES.values():
        p = f"const {t}*"
        for v, r in ((4, 8), (1, 8), (4, 0)):
            instances.append(
                f"void norm_forward_kernel<{t}, {v}, {r}>({p}, {p}, {p}, {t}*, const NormParams)"
            )
        for v, r in ((4, 8), (1, 0)):
            instances.append(
                f"void norm_backward_kernel<{t}, {v}, {r}>({p}, {p}, {p}, {t}*, float*, const NormParams)"
            )
        for v, r in ((wide, 1), (wide, 4), (1, 0)):
            instances.append(
                f"void norm_last_kernel<{t}, {v}, {r}>({p}, {p}, {p}, {t}*, const NormParams, int)"
            )
        for v, r in ((4, 1), (4, 4), (1, 16)):
            instances.append(
                f"void norm_backward_last_kernel<{t}, {v}, {r}>({p}, {p}, {p}, {t}*, float*, const NormParams, int)"
            )
    return ptx("layer_norm2d.cuh", tuple(instances))


def instance(text, kernel, dtype, v, r):
    return entry(text, f"{kernel}_kernelI{TYPES[dtype][1]}Li{v}ELi{r}E")


def params(shape):
    n, c, h, w = shape
    return struct.pack("<qqif", n, h * w, c, 1e-5)


def inputs(shape, dtype):
    x, g = (random(*shape, dtype=dtype, seed=s) for s in (0, 1))
    return x, random(shape[1], dtype=dtype, seed=2), random(shape[1], dtype=dtype, seed=3), g


def check_forward(y, x, weight, bias):
    exact = NORM.reference(x.double(), weight.double(), bias.double())
    assert_bound(y, NORM.reference(x, weight, bias), exact)


CASES = [((2, 56, 6, 24), 4, 8), ((1, 10, 5, 7), 1, 8), ((1, 80, 4, 16), 4, 0)]


@pytest.mark.parametrize("approx", ["exact", "worst"])
@pytest.mark.parametrize(("shape", "v", "r"), CASES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_forward(text, dtype, shape, v, r, approx):
    x, weight, bias, _ = inputs(shape, dtype)
    y = torch.full(shape, float("nan"), dtype=dtype)
    name = instance(text, "norm_forward", dtype, v, r)
    st = run(text, name, 2, 256, [x, weight, bias, y, params(shape)], approx=approx)
    check_forward(y, x, weight, bias)
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts
    if r and v > 1:  # read once, in full sectors
        pixels = sum(
            s.bytes
            for s in st.sites
            if s.space == "global" and s.kind == "ld" and s.size == v * x.element_size()
        )
        assert pixels == x.numel() * x.element_size()
        assert st.store_efficiency >= 0.99


@pytest.mark.parametrize(("shape", "v", "r"), [((2, 56, 6, 24), 4, 8), ((1, 80, 5, 7), 1, 0)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_backward(text, dtype, shape, v, r):
    x, weight, bias, g = inputs(shape, dtype)
    blocks, c = 2, shape[1]
    gx = torch.full(shape, float("nan"), dtype=dtype)
    partial = torch.full((blocks, c, 2), float("nan"))
    name = instance(text, "norm_backward", dtype, v, r)
    args = [g, x, weight, gx, partial, params(shape)]
    st = run(text, name, blocks, 256, args, shared_bytes=8 * c)
    assert st.store_efficiency >= 0.85 or v == 1
    eager = NORM.reference_backward(g, x, weight, bias, output_mask=[True] * 3)
    exact = [t.double() for t in (g, x, weight, bias)]
    want = NORM.reference_backward(*exact, output_mask=[True] * 3)
    sums = partial.double().sum(0)
    assert_bound(gx, eager[0], want[0])
    assert_bound(sums[:, 0].to(dtype), eager[1], want[1])
    assert_bound(sums[:, 1].to(dtype), eager[2], want[2])
    again = torch.full_like(partial, float("nan"))
    run(text, name, blocks, 256, [g, x, weight, None, again, params(shape)], shared_bytes=8 * c)
    assert torch.equal(again, partial)


@pytest.mark.parametrize(
    ("shape", "wide", "r"), [((2, 56, 5, 6), True, 1), ((1, 320, 2, 3), True, 4), ((1, 70, 3, 5), False, 0)]
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_channels_last(text, dtype, shape, wide, r):
    x, weight, bias, _ = inputs(shape, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.full_like(x, float("nan"))
    v = TYPES[dtype][2] if wide else 1
    lanes = 1
    while lanes < 32 and lanes * v < shape[1]:
        lanes *= 2
    name = instance(text, "norm_last", dtype, v, r)
    st = run(text, name, 3, 256, [x, weight, bias, y, params(shape), lanes])
    check_forward(y, x, weight, bias)
    assert st.store_efficiency >= 0.85 or not wide


@pytest.mark.parametrize(
    ("shape", "v", "r"), [((2, 56, 5, 8), 4, 1), ((1, 160, 3, 4), 4, 4), ((1, 70, 3, 5), 1, 16)]
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_backward_channels_last(text, dtype, shape, v, r):
    x, weight, bias, g = inputs(shape, dtype)
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x + 100, g))
    lanes = 1
    while lanes < 32 and lanes * v < shape[1]:
        lanes *= 2
    blocks, c = 2, shape[1]
    gx = torch.full_like(x, float("nan"))
    partial = torch.full((blocks, c, 2), float("nan"))
    name = instance(text, "norm_backward_last", dtype, v, r)
    args = [g, x, weight, gx, partial, params(shape), lanes]
    shared = 256 // lanes * c * 8
    st = run(text, name, blocks, 256, args, shared_bytes=shared)
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts
    wide = [s for s in st.sites if s.space == "global" and s.size == v * x.element_size() and s.kind == "st"]
    images = max(wide, key=lambda s: s.requests)
    assert images.efficiency >= 0.85 or v == 1
    eager = NORM.reference_backward(g, x, weight, bias, output_mask=[True] * 3)
    exact = [t.double() for t in (g, x, weight, bias)]
    want = NORM.reference_backward(*exact, output_mask=[True] * 3)
    sums = partial.double().sum(0)
    assert_bound(gx, eager[0], want[0])
    assert_bound(sums[:, 0].to(dtype), eager[1], want[1])
    assert_bound(sums[:, 1].to(dtype), eager[2], want[2])
