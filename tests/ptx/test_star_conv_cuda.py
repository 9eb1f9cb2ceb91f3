"""Rung 5: the PTX that nvcc makes of star_conv's and the gate's kernels, executed: values, faults, races, traffic."""

from __future__ import annotations

import struct

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run, sum_parts
from host_harness import assert_bound, random
from torch import Tensor

from sdan_fast.reference import depthwise_conv2d, star

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
ACTIVATIONS = ("none", "gelu", "relu6", "relu", "silu")
NAN = float("nan")
THREADS = 256
# name, mangled, elements in 128 bits
TYPES = {torch.float32: ("float", "If", 4), torch.bfloat16: ("bfloat16", "INS0_8bfloat16E", 8)}


@pytest.fixture(scope="module")
def text():
    instances = []
    for t, _, wide in TYPES.values():
        p, q = f"const {t}*", f"{t}*"
        forward, backward = (
            f"({p}, {p}, {p}, {p}, {q}, const StarConvParams)",
            (f"({p}, {p}, {p}, {p}, {p}, {q}, {q}, float*, const StarConvParams)"),
        )
        for v in (wide, 1):
            instances.append(f"void star_conv_forward_kernel<{t}, {v}>{forward}")
        for v in (4, 1):
            instances.append(f"void star_conv_last_kernel<{t}, {v}>{forward}")
            instances.append(f"void star_conv_backward_kernel<{t}, {v}>{backward}")
            instances.append(f"void star_conv_backward_last_kernel<{t}, {v}>{backward}")
    return ptx("star_conv.cuh", tuple(instances))


def name_of(text, kernel, dtype, v):
    return entry(text, f"{kernel}_kernel{TYPES[dtype][1]}Li{v}E")


def params(shape, rows, outer, last, splits=1, columns=1, vectors=1, bands=1):
    n, c, h, w = shape
    step, outer = 2 * c if last else 2 * c * h * w, ACTIVATIONS.index(outer)
    return struct.pack("<qq9i4x", n, step, c, h, w, rows, splits, columns, vectors, outer, bands)


class Case:
    """p and b as the two halves of one tensor of 2 C channels, weights, a gradient; and the exact answers."""

    def __init__(self, shape, dtype, last, outer):
        n, c, h, w = shape
        self.shape, self.last = shape, last
        self.format = torch.channels_last if last else torch.contiguous_format
        self.both = random(n, 2 * c, h, w, dtype=dtype).contiguous(memory_format=self.format)
        self.grads = torch.full_like(self.both, NAN)
        self.g = random(*shape, dtype=dtype, seed=1).contiguous(memory_format=self.format)
        self.y = torch.full_like(self.g, NAN)
        self.weight, self.bias = (
            random(c, 1, 3, 3, dtype=dtype, seed=2, scale=0.4),
            random(c, dtype=dtype, seed=3),
        )
        self.outer = outer

    def answers(self, dtype):
        """y, and the gradients of p, b, weight and bias, computed in `dtype`."""
        p, b, weight, bias = (
            t.to(dtype).requires_grad_() for t in (*self.both.chunk(2, 1), self.weight, self.bias)
        )
        y = star(depthwise_conv2d(p, weight, bias), b, outer=self.outer)
        return y.detach(), torch.autograd.grad(y, (p, b, weight, bias), self.g.to(dtype))

    def halves(self, t: Tensor):
        return t.chunk(2, dim=1)


CASES = [
    ((2, 5, 11, 48), 8, "wide", "none"),  # a group that ends beyond the image; several warps in a row
    ((1, 3, 7, 9), 4, 1, "silu"),
    ((1, 2, 3, 160), 16, "wide", "gelu"),
]


def vector(dtype, v, most=8):
    return min(TYPES[dtype][2], most) if v == "wide" else v


@pytest.mark.parametrize("approx", ["exact", "worst"])
@pytest.mark.parametrize(("shape", "rows", "v", "outer"), CASES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_contiguous(text, dtype, shape, rows, v, outer, approx):
    case = Case(shape, dtype, False, outer)
    v_forward, v_backward = vector(dtype, v), vector(dtype, v, 4)
    p, b = case.halves(case.both)
    args = [p, b, case.weight, case.bias, case.y, params(shape, rows, outer, False)]
    run(text, name_of(text, "star_conv_forward", dtype, v_forward), 3, THREADS, args, approx=approx)
    exact, wanted = case.answers(torch.float64)
    eager, usual = case.answers(dtype)
    assert_bound(case.y, eager, exact)
    planes, splits = shape[0] * shape[1], 2
    partial = torch.full((planes, splits, 10), NAN)
    gp, gb = case.halves(case.grads)
    args = [case.g, p, b, case.weight, case.bias, gp, gb, partial]
    args.append(params(shape, rows, outer, False, splits))
    run(text, name_of(text, "star_conv_backward", dtype, v_backward), 3, THREADS, args, approx=approx)
    check_gradients(case, partial.view(shape[0], shape[1], splits, 10).double().sum((0, 2)), usual, wanted)


@pytest.mark.parametrize("approx", ["exact", "worst"])
@pytest.mark.parametrize(
    ("shape", "rows", "v", "outer"), [((2, 8, 11, 9), 4, "wide", "none"), ((1, 3, 7, 9), 4, 1, "silu")]
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_channels_last(text, dtype, shape, rows, v, outer, approx):
    case = Case(shape, dtype, True, outer)
    v = vector(dtype, v, 4)
    p, b = case.halves(case.both)
    args = [p, b, case.weight, case.bias, case.y, params(shape, rows, outer, True, bands=2)]
    run(text, name_of(text, "star_conv_last", dtype, v), 3, THREADS, args, approx=approx)
    exact, wanted = case.answers(torch.float64)
    eager, usual = case.answers(dtype)
    assert_bound(case.y, eager, exact)
    vectors, columns = shape[1] // v, 6
    blocks = shape[0] * -(-shape[2] // rows) * -(-shape[3] // (columns - 2))  # the tiles
    partial = torch.full((blocks, shape[1], 10), NAN)
    gp, gb = case.halves(case.grads)
    args = [case.g, p, b, case.weight, case.bias, gp, gb, partial]
    args.append(params(shape, rows, outer, True, 1, columns, vectors))
    name = name_of(text, "star_conv_backward_last", dtype, v)
    st = run(
        text, name, (blocks, 1), THREADS, args, shared_bytes=10 * v * (THREADS + vectors) * 4, approx=approx
    )
    check_gradients(case, partial.double().sum(0), usual, wanted)
    assert st.bank_conflicts <= 0.10 * st.shared_wavefronts


def check_gradients(case, sums, usual, wanted):
    for got, eager, exact in zip(case.halves(case.grads), usual[:2], wanted[:2], strict=True):
        assert_bound(got, eager, exact)
    c, dtype = case.shape[1], case.weight.dtype
    assert_bound(sums[:, :9].reshape(c, 1, 3, 3).to(dtype), usual[2], wanted[2])
    assert_bound(sums[:, 9].to(dtype), usual[3], wanted[3])


def efficiency(st, kind, size):
    """Bytes asked for over the bytes of their sectors, of the accesses of a kernel's loop that are `size` bytes wide.

    What is left out: the weights, read once by each thread and from L1 but for the first, the columns next to a
    warp's (shifted by one element), and the partial sums.
    """
    sites = [s for s in st.sites if s.space == "global" and s.kind == kind and s.size == size]
    most = max(s.requests for s in sites)
    sites = [s for s in sites if s.requests > most / 2]
    return sum(s.unique for s in sites) / (32 * sum(s.sectors for s in sites))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_traffic(text, dtype, last):
    """At rows of 320 pixels, and at 56 channels in channels_last."""
    shape, rows = ((1, 1, 32, 320), 16) if not last else ((1, 56, 18, 20), 16)
    case = Case(shape, dtype, last, "gelu")
    p, b = case.halves(case.both)
    v = vector(dtype, "wide", 4 if last else 8)
    args = [p, b, case.weight, case.bias, case.y, params(shape, rows, "gelu", last)]
    kernel = "star_conv_last" if last else "star_conv_forward"
    items = -(-shape[2] // rows) * shape[3] * (shape[1] // v if last else 1) // (1 if last else v)
    st = run(text, name_of(text, kernel, dtype, v), -(-items // THREADS), THREADS, args)
    assert_bound(case.y, *(case.answers(d)[0] for d in (dtype, torch.float64)))
    size = v * case.y.element_size()
    assert st.global_store_bytes == case.y.numel() * case.y.element_size()
    shares = {"forward": (efficiency(st, "ld", size), efficiency(st, "st", size))}
    gp, gb = case.halves(case.grads)
    tiles = -(-shape[2] // rows) * -(-shape[3] // 16)
    partial = torch.full((tiles * shape[1], 10), NAN)
    args = [case.g, p, b, case.weight, case.bias, gp, gb, partial]
    if last:
        args.append(params(shape, rows, "gelu", True, 1, 18, 14))
        name, shared = name_of(text, "star_conv_backward_last", dtype, 4), 10 * 4 * (THREADS + 14) * 4
        st = run(text, name, (tiles, 1), THREADS, args, shared_bytes=shared)
    else:
        args.append(params(shape, rows, "gelu", False, 2))
        st = run(text, name_of(text, "star_conv_backward", dtype, 4), 2, THREADS, args)
    size = 4 * case.y.element_size()
    shares["backward"] = (efficiency(st, "ld", size), efficiency(st, "st", size))
    print(shares, st.bank_conflicts / max(st.shared_wavefronts, 1))
    # 56 channels of 16 bits are 3.5 sectors, and every other half pixel begins in the middle of one (docs/cuda.md).
    least = 0.83 if last and dtype != torch.float32 else 0.85
    for loads, stores in shares.values():
        assert loads >= least and stores >= least, shares
    assert st.bank_conflicts <= 0.10 * max(st.shared_wavefronts, 1)


def test_rows_below_each_other_share_their_halos(text):
    """Two groups of six rows of a block: 14 rows of p for 12, and two columns more than its 18 or 19."""
    dtype, shape = torch.bfloat16, (1, 28, 36, 40)
    case = Case(shape, dtype, True, "none")
    p, b = case.halves(case.both)
    args = [p, b, case.weight, case.bias, case.y, params(shape, 6, "none", True, bands=2)]
    blocks = 3 * 40 * 7 // (THREADS // 2) + 1
    st = run(text, name_of(text, "star_conv_last", dtype, 4), blocks, THREADS, args)
    assert_bound(case.y, *(case.answers(d)[0] for d in (dtype, torch.float64)))
    read, written = (sum(t[i] for t in st.traffic.values()) for i in range(2))
    size = case.y.numel() * case.y.element_size()
    print(st.traffic, read / size, written / size)
    assert read + written <= 1.15 * 3 * size


# ---- the gate


@pytest.fixture(scope="module")
def gate_text():
    instances = []
    for t, _, wide in TYPES.values():
        p, q = f"const {t}*", f"{t}*"
        for v in (wide, 1):
            for kernel in ("gate", "gate_last"):
                signature = f"({p}, {p}, {p}, {p}, {q}, {q}, float*, const GateParams)"
                instances.append(f"void {kernel}_kernel<{t}, {v}>{signature}")
    return ptx("pointwise_gate.cuh", tuple(instances))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "wide"), [((2, 24, 6, 16), True), ((1, 5, 7, 9), False)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gate(gate_text, dtype, shape, wide, last):
    n, c, h, w = shape
    fmt = torch.channels_last if last else torch.contiguous_format
    u, t, g = (random(*shape, dtype=dtype, seed=s).contiguous(memory_format=fmt) for s in range(3))
    bias = random(c, dtype=dtype, seed=3)
    v = TYPES[dtype][2] if wide else 1
    splits, vectors = 2, c // v
    blocks = splits if last else n * c * splits
    packed = struct.pack("<qq3i4x", n, h * w, c, splits, vectors)
    name = name_of(gate_text, "gate_last" if last else "gate", dtype, v)

    def launch(a, b, y, hh, partial, t=t):
        return run(gate_text, name, blocks, THREADS, [a, t, b, bias, y, hh, partial, packed])

    y, gu, gt = (torch.full_like(u, NAN) for _ in range(3))
    partial = torch.full((splits * c if last else n * c * splits,), NAN)
    st = launch(u, None, y, None, None)
    offset = bias.view(1, c, 1, 1)
    assert_bound(y, u * (t + offset), u.double() * (t.double() + offset.double()))
    if wide:
        assert efficiency(st, "ld", 16) >= 0.97 and efficiency(st, "st", 16) >= 0.97
        assert st.global_store_bytes == u.numel() * u.element_size()
    st = launch(g, u, gu, gt, partial)
    assert_bound(gu, g * (t + offset), g.double() * (t.double() + offset.double()))
    assert_bound(gt, g * u, g.double() * u.double())
    if wide:
        assert efficiency(st, "ld", 16) >= 0.97 and efficiency(st, "st", 16) >= 0.97
    assert st.bank_conflicts <= 0.10 * max(st.shared_wavefronts, 1)
    again = torch.full_like(partial, NAN)
    launch(g, u, None, None, again, t=None)  # the sums alone
    assert torch.equal(again, partial)
    gb = torch.full((c,), NAN, dtype=dtype)
    image, column, split = (0, 1, c) if last else (c * splits, splits, 1)
    sum_parts(partial, [gb], [0, c], 1, 1 if last else n, splits, (0, column, image, split))
    assert_bound(gb, (g * u).sum((0, 2, 3)), (g.double() * u.double()).sum((0, 2, 3)))
