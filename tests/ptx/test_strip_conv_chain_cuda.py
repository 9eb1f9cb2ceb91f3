"""Rung 5: the PTX that nvcc makes of the strips' kernels, executed: values, faults, races, traffic."""

from __future__ import annotations

import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
CHAIN, CONV = OPS["strip_conv_chain"], OPS["depthwise_conv2d"]
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TAPS = (0, 11, 35)  # the instances: any number, one of the usual, and the longest
P = "const void*"
# Those in float16, which differ from those in bfloat16 by two conversions, are slow ones.
DTYPES = [pytest.param(d, marks=pytest.mark.slow if d == torch.float16 else ()) for d in DTYPE]


@pytest.fixture(scope="module")
def text():
    rows = [f"void conv_row_kernel<{k}>({P}, {P}, {P}, {P}, {P}, void*, const StripParams)" for k in TAPS]
    columns = [
        f"void conv_column_kernel<{k}, {last}>({', '.join([P] * 8)}, void*, const StripParams)"
        for k in TAPS
        for last in ("true", "false")
    ]
    return ptx("strip_conv_chain.cuh", (*rows, *columns))


def up(x, n):
    return -(-x // n) * n


def inverse(dilation):
    """The reciprocal that strip_plan.h hands to a kernel, as a signed number of 32 bits."""
    value = 0 if dilation == 1 else 2**32 // dilation + 1
    return value - 2**32 if value >= 2**31 else value


def one_pass(
    text, x, strips, *, vertical, flip=False, edge=None, gate=None, segment=None, quads=None, many=False
):
    """A pass of one or two strips, each (weight, bias, dilation), cut as strip_plan.h does.

    segment: outputs of a block along the axis, all if None. quads: of the lines beside each other in a block. many: a
    thread computes 9 outputs at a time and not 5, which is a choice where 11 taps are not of channels_last tensors.
    """
    n, c, h, w = x.shape
    last = not x.is_contiguous()
    row = not (last or vertical)
    y = torch.full_like(x, float("nan"))
    planes, length, width = (n, h, w * c) if last and vertical else (n * h, w, c) if last else (n * c, h, w)
    if row:
        length, width = w, h
    taps = [(t.shape[2] * t.shape[3], d) for t, _, d in strips]
    used = [min(k, 2 * ((length - 1) // d) + 1) for k, d in taps]
    dilation = [d if u > 1 else 1 for u, (_, d) in zip(used, taps, strict=True)]
    halo = [(u - 1) // 2 * d for u, d in zip(used, dilation, strict=True)]
    steps, two = len(strips), len(strips) == 2
    k = used[0] if used[0] in TAPS and used == used[:1] * steps else 0
    edge_bias, edge_weight, edge_dilation = edge or (None, None, 1)
    edge_taps = 1 if edge_weight is None else edge_weight.numel() // c
    quads = quads or (2 if row else -(-c // 4) if last and not vertical else 4)
    segment, outputs = segment or length, 9 if last or (many and k == 11) else 5
    restage = int(last and not vertical and dilation[-1] == 1)
    beyond = 2 * halo[1] if two else 0
    staged = up(min(length, segment + beyond), outputs * dilation[0]) + 2 * halo[0]
    if row:
        leads = [-halo[0] % 16, -sum(halo) % 16 if segment < length else 0]
        staged = up(staged + max(leads), 4)
    second = up(segment, outputs * dilation[1]) + beyond if two else segment if row or restage else 0
    room = [u * 4 * (quads | 1) if last else up(u, 4) for u in used]
    tile = sum(room) + (0 if row else steps * 4 * quads)
    places = [staged, second, room[0], sum(room), tile, tile + staged * 4 * quads, restage]
    stripes, segments = -(-width // (4 * quads)), -(-length // segment)
    steps_packed = [
        v
        for i in range(2)
        for v in (
            [taps[i][0], used[i], dilation[i], halo[i], outputs, inverse(dilation[i])]
            if i < steps
            else [0] * 6
        )
    ]
    p = struct.pack(
        "<q31i4x", planes, DTYPE[x.dtype], steps, c, length, width, int(flip), int((w if row else width) % 4 == 0),
        *steps_packed, edge_taps, edge_dilation, stripes, segment, segments, *places,
    )  # fmt: skip
    pointers = [t for weight, bias, _ in strips for t in (weight, bias)] + [None] * (4 - 2 * steps)
    if row:
        name, extra = entry(text, "conv_row_kernel", f"ILi{k}E"), []
    else:
        name = entry(text, "conv_column_kernel", f"ILi{k}ELb{int(last)}E")
        extra = [edge_bias, edge_weight, gate]
    shared = 4 * (tile + (staged + second) * 4 * quads)
    st = run(
        text, name, planes * stripes * segments, (quads, 32 // quads), [x, *pointers, *extra, y, p],
        shared_bytes=shared,
    )  # fmt: skip
    return y, st


def stages(c, kernels, dtype):
    """Four strips (weight, bias, dilation) of (kernel, dilation) pairs, horizontal and vertical in turn."""
    return [
        (
            random(c, 1, *((k, 1) if i % 2 else (1, k)), dtype=dtype, seed=10 + i, scale=k**-0.5),
            random(c, dtype=dtype, seed=20 + i),
            d,
        )
        for i, (k, d) in enumerate(kernels)
    ]


def run_chain(text, x, strips, gate=None, **cut):
    """Two stages as csrc/cuda/strip_conv_chain.cpp does them, and the statistics of its two launches."""
    h1, v1, h2, v2 = strips
    z, across = one_pass(text, x, [h1, (h2[0], None, h2[2])], vertical=False, **cut)
    y, down = one_pass(
        text, z, [(v1[0], h2[1], v1[2]), v2], vertical=True, edge=(v1[1], h2[0], h2[2]), gate=gate, **cut
    )
    return y, (across, down)


def reference(x, strips, double=False):
    x, *rest = (t.double() if double else t for t in (x, *(t for w, b, _ in strips for t in (w, b))))
    weights, biases = rest[::2], rest[1::2]
    return CHAIN.reference(x, weights, biases, bias_mask=[True] * 4, dilations=[d for _, _, d in strips])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kernels", [((11, 1), (11, 1), (11, 6), (11, 6)), ((5, 1), (3, 2), (7, 3), (5, 1))], ids=str
)
def test_chain(text, kernels, dtype, layout):
    for shape, cut in (
        ((1, 4, 37, 64), {}),
        ((1, 3, 37, 63), {"segment": 16}),
        ((1, 3, 37, 64), {"many": True}),
    ):
        x, u = (random(*shape, dtype=dtype, seed=s).contiguous(memory_format=layout) for s in (0, 1))
        strips = stages(shape[1], kernels, dtype)
        if "many" in cut and (layout == torch.channels_last or kernels[0][0] != 11):
            continue  # it would be the first case once more
        y, _ = run_chain(text, x, strips, **cut)
        assert_bound(y, reference(x, strips), reference(x, strips, True), f"{shape}")
    gated, _ = run_chain(text, x, strips, gate=u)
    assert_bound(gated, u * reference(x, strips), u.double() * reference(x, strips, True), "gated")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vertical", [False, True])
def test_single_strip_and_its_input_gradient(text, vertical, dtype, layout):
    for k, d, shape in ((11, 6, (1, 2, 21, 48)), (15, 2, (1, 2, 40, 19))):
        kernel, dilation = ((k, 1), [d, 1]) if vertical else ((1, k), [1, d])
        x, g = (random(*shape, dtype=dtype, seed=s).contiguous(memory_format=layout) for s in (0, 1))
        weight = random(shape[1], 1, *kernel, dtype=dtype, seed=2, scale=k**-0.5)
        bias = random(shape[1], dtype=dtype, seed=3)
        y, _ = one_pass(text, x, [(weight, bias, d)], vertical=vertical)
        gx, _ = one_pass(text, g, [(weight, None, d)], vertical=vertical, flip=True)
        exact = [t.double() for t in (x, weight, bias)]
        kwargs, mask = {"dilation": dilation}, [True, False, False]
        assert_bound(y, CONV.reference(x, weight, bias, **kwargs), CONV.reference(*exact, **kwargs))
        eager = CONV.reference_backward(g, x, weight, bias, **kwargs, output_mask=mask)[0]
        want = CONV.reference_backward(g.double(), *exact, **kwargs, output_mask=mask)[0]
        assert_bound(gx, eager, want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("vertical", [False, True])
def test_many_taps(text, vertical, layout):
    """35 of them, twice."""
    x = random(1, 4, *((40, 12) if vertical else (12, 40))).contiguous(memory_format=layout)
    first, second = stages(4, ((35, 1),) * 4, torch.float32)[int(vertical) :: 2]
    y, _ = one_pass(text, x, [first, second], vertical=vertical)

    def eager(*tensors):
        x, *rest = tensors
        for weight, bias in (rest[:2], rest[2:]):
            x = CONV.reference(x, weight, bias, dilation=[1, 1])
        return x

    tensors = (x, *first[:2], *second[:2])
    assert_bound(y, eager(*tensors), eager(*(t.double() for t in tensors)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic(text, dtype, layout):
    """At SDAN's sizes: whole sectors, each element of the tensor moved once by either pass, few bank conflicts."""
    last = layout == torch.channels_last
    c = 24 if last else 1
    h1, v1, h2, v2 = stages(c, ((11, 1), (11, 1), (11, 6), (11, 6)), dtype)
    passes = [
        ((1, c, 2, 320) if last else (1, c, 16, 320), [h1, h2], False),
        ((1, c, 2, 320) if last else (1, c, 16, 320), [h1], False),
        ((1, c, 180, 8) if last else (1, c, 180, 64), [v1, v2], True),
    ]
    for shape, strips, vertical in passes:
        x = random(*shape, dtype=dtype).contiguous(memory_format=layout)
        _, st = one_pass(text, x, strips, vertical=vertical)
        size = x.numel() * x.element_size()
        assert st.store_efficiency >= 0.85 and st.load_efficiency >= 0.85, st.report()
        assert st.global_store_bytes == size == st.footprint["argument 0"][0]
        assert st.traffic["argument 0"][0] <= 1.15 * size, st.traffic
        # The tensor's accesses are the wide ones: whole sectors, and not a second time within a block either.
        wide = [s for s in st.sites if s.space == "global" and s.kind in ("ld", "cp.async") and s.size >= 8]
        assert 32 * sum(s.sectors for s in wide) <= 1.15 * size, st.report()
        assert st.bank_conflicts <= 0.10 * st.shared_wavefronts, st.report()
