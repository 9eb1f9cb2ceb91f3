"""The 1x1 convolution as a product over pixels, with what is fused around it: factors, bias, gate."""

from __future__ import annotations

import torch
from torch import Tensor

from . import heuristics
from ._triton import INTERPRETED, jit, tl
from .launch import ImageLayout, ceil_div, launch
from .phases import put, split_phases
from .reduce import Sums, finish, join_all, total, whole_sectors


@jit
def dot(a, b, acc):
    """acc + a @ b: tensor cores for 16-bit operands, plain FMAs for float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def image_tile(c, p, PV, stride, VC: tl.constexpr, VP: tl.constexpr, NCHW: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [channels, pixels] within an image of PV VP pixels; stride VC from pixel to pixel if not NCHW."""
    if WIDE:
        c = c.to(tl.int64)
        p = p.to(tl.int64)
    if NCHW:
        at = (c * PV * VP)[:, None] + p[None, :]
    else:
        at = c[:, None] + (p * stride * VC)[None, :]
    return at


@jit
def weight_tile(
    w_ptr, o, i, o_ok, i_ok, COV, CIV, VO: tl.constexpr, VI: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """W[o, i] of a matrix of COV VO outputs by CIV VI inputs; TRANSPOSED: it is stored with the outputs contiguous."""
    if TRANSPOSED:
        at = o[:, None] + (i * COV * VO)[None, :]
    else:
        at = (o * CIV * VI)[:, None] + i[None, :]
    return tl.load(w_ptr + at, o_ok[:, None] & i_ok[None, :], other=0.0)


@jit
def matrix_tile(
    w_ptr, o, i, o_ok, i_ok, COV, CIV, PV, VO: tl.constexpr, VI: tl.constexpr, TRANSPOSED: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
):  # fmt: skip
    """W[o, i], or its transpose if PIXELS_FIRST; see product_of and weight_tile.

    Where pixels are first the weights have to be loaded with neighbouring outputs in neighbouring threads: not along
    their rows, whose contiguity the factor hides.
    """
    if PIXELS_FIRST:
        one = tl.minimum(PV, 1)
        w = weight_tile(w_ptr, i * one, o, i_ok, o_ok, CIV, COV, VI, VO, not TRANSPOSED)
    else:
        w = weight_tile(w_ptr, o, i, o_ok, i_ok, COV, CIV, VO, VI, TRANSPOSED)
    return w


@jit
def stacked_tile(
    w1_ptr, w2_ptr, o, i, i_ok, C1V, C2V, CIV, PV, V1: tl.constexpr, V2: tl.constexpr, VI: tl.constexpr,
    TRANSPOSED: tl.constexpr, PIXELS_FIRST: tl.constexpr,
):  # fmt: skip
    """matrix_tile of W1 above W2: rows from C1V V1 on are those of W2, which has C2V V2 of them."""
    C1 = C1V * V1
    first, second = o < C1, (o >= C1) & (o < C1 + C2V * V2)
    if TRANSPOSED:  # [i, o]: the stacked index is the one that is summed over
        w1 = matrix_tile(w1_ptr, i, o, i_ok, first, CIV, C1V, PV, VI, V1, True, PIXELS_FIRST)
        w2 = matrix_tile(w2_ptr, i, o - C1, i_ok, second, CIV, C2V, PV, VI, V2, True, PIXELS_FIRST)
    else:
        w1 = matrix_tile(w1_ptr, o, i, first, i_ok, C1V, CIV, PV, V1, VI, False, PIXELS_FIRST)
        w2 = matrix_tile(w2_ptr, o - C1, i, second, i_ok, C2V, CIV, PV, V2, VI, False, PIXELS_FIRST)
    return tl.where(first[:, None] if TRANSPOSED == PIXELS_FIRST else first[None, :], w1, w2)


@jit
def product_of(w, x, acc, PIXELS_FIRST: tl.constexpr):
    """acc [outputs, pixels] + w x [inputs, pixels]; PIXELS_FIRST: acc is [pixels, outputs] and w transposed.

    A dot of plain FMAs reads its second operand from shared memory as it was loaded, and without bank conflicts only
    if its columns are contiguous. Where channels are contiguous in memory those of x are not, so x comes first there.
    """
    return dot(tl.trans(x), w, acc) if PIXELS_FIRST else dot(w, x, acc)


@jit
def product_tile(
    w_ptr, x, acc, o, i, o_ok, i_ok, COV, CIV, PV, VO: tl.constexpr, VI: tl.constexpr, TRANSPOSED: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
):  # fmt: skip
    """product_of the tile W[o, i]."""
    w = matrix_tile(w_ptr, o, i, o_ok, i_ok, COV, CIV, PV, VO, VI, TRANSPOSED, PIXELS_FIRST)
    return product_of(w, x, acc, PIXELS_FIRST)


@jit
def product_start(BO: tl.constexpr, BP: tl.constexpr, PIXELS_FIRST: tl.constexpr):
    """An empty accumulator of product_of."""
    return tl.zeros((BP, BO) if PIXELS_FIRST else (BO, BP), tl.float32)


@jit
def product_end(acc, PIXELS_FIRST: tl.constexpr):
    """product_of's accumulator as [outputs, pixels]."""
    if PIXELS_FIRST:
        acc = tl.trans(acc)
    return acc


@jit
def pointwise_product(
    x_ptr, factor_ptr, w_ptr, bias_ptr, gate_ptr, y_ptr, PV, CIV, COV, x_stride, y_stride,
    x_batch, factor_batch, gate_batch, y_batch, tiles, out_tiles,
    BO: tl.constexpr, BI: tl.constexpr, BP: tl.constexpr, VI: tl.constexpr, VO: tl.constexpr, VC: tl.constexpr,
    VP: tl.constexpr, TRANSPOSED: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
    NCHW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = (W (x [* factor]) [+ bias]) [* gate] at each pixel; see weight_tile for W and image_tile for the layout.

    x and factor have CIV VI channels and lie alike but for the batch stride; so do gate and y, with COV VO channels.
    """
    pid = tl.program_id(0)
    n = (pid // out_tiles // tiles).to(tl.int64)
    o = (pid % out_tiles) * BO + tl.arange(0, BO)
    p = ((pid // out_tiles) % tiles) * BP + tl.arange(0, BP)
    o_ok = o < COV * VO
    p_ok = p < PV * VP
    PIXELS_FIRST: tl.constexpr = not NCHW and x_ptr.dtype.element_ty == tl.float32
    acc = product_start(BO, BP, PIXELS_FIRST)
    for first in range(0, CIV * VI, BI):
        i = first + tl.arange(0, BI)
        i_ok = i < CIV * VI
        mask = i_ok[:, None] & p_ok[None, :]
        at = image_tile(i, p, PV, x_stride, VC, VP, NCHW, WIDE)
        x = tl.load(x_ptr + n * x_batch + at, mask, other=0.0)
        if FACTOR:
            factor = tl.load(factor_ptr + n * factor_batch + at, mask, other=0.0)
            x = (x.to(tl.float32) * factor.to(tl.float32)).to(x_ptr.dtype.element_ty)
        acc = product_tile(w_ptr, x, acc, o, i, o_ok, i_ok, COV, CIV, PV, VO, VI, TRANSPOSED, PIXELS_FIRST)
    acc = product_end(acc, PIXELS_FIRST)
    if BIAS:
        acc += tl.load(bias_ptr + o, o_ok, other=0.0).to(tl.float32)[:, None]
    mask = o_ok[:, None] & p_ok[None, :]
    at = image_tile(o, p, PV, y_stride, VC, VP, NCHW, WIDE)
    if GATE:
        acc *= tl.load(gate_ptr + n * gate_batch + at, mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * y_batch + at, acc.to(y_ptr.dtype.element_ty), mask)


@jit
def pointwise_wgrad(
    g_ptr, factor_ptr, x_ptr, partial_ptr, N, PV, CIV, COV, g_stride, x_stride, g_batch, factor_batch, x_batch,
    tiles, splits, out_tiles,
    BO: tl.constexpr, BI: tl.constexpr, BP: tl.constexpr, VI: tl.constexpr, VO: tl.constexpr, VC: tl.constexpr,
    VP: tl.constexpr, TILES: tl.constexpr, FACTOR: tl.constexpr, NCHW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """First stage of a 1x1 convolution's weight gradient: sums of (g [* factor]) x^T over TILES tiles of BP pixels.

    Row `split` of partial [splits, Co Ci + Co] is laid out as the weight, then the bias.
    """
    pid = tl.program_id(0)
    split = pid % splits
    o = (pid // splits % out_tiles) * BO + tl.arange(0, BO)
    i = (pid // splits // out_tiles) * BI + tl.arange(0, BI)
    CI = CIV * VI
    CO = COV * VO
    o_ok = o < CO
    i_ok = i < CI
    acc = tl.zeros((BO, BI), tl.float32)
    bias = tl.zeros((BO,), tl.float32)
    for tile in range(split * TILES, min(split * TILES + TILES, N * tiles)):
        n = (tile // tiles).to(tl.int64)
        p = (tile % tiles) * BP + tl.arange(0, BP)
        p_ok = p < PV * VP
        mask = o_ok[:, None] & p_ok[None, :]
        at = image_tile(o, p, PV, g_stride, VC, VP, NCHW, WIDE)
        g = tl.load(g_ptr + n * g_batch + at, mask, other=0.0)
        if FACTOR:
            factor = tl.load(factor_ptr + n * factor_batch + at, mask, other=0.0)
            product = g.to(tl.float32) * factor.to(tl.float32)
            bias += tl.sum(product, 1)
            g = product.to(g_ptr.dtype.element_ty)
        else:
            bias += tl.sum(g.to(tl.float32), 1)
        at = image_tile(i, p, PV, x_stride, VC, VP, NCHW, WIDE)
        x = tl.load(x_ptr + n * x_batch + at, i_ok[:, None] & p_ok[None, :], other=0.0)
        acc = dot(g, tl.trans(x), acc)
    row = partial_ptr + split.to(tl.int64) * (CO * CI + tl.cdiv(CO, 8) * 8)
    tl.store(row + (o * CI)[:, None] + i[None, :], acc, o_ok[:, None] & i_ok[None, :])
    if pid // splits // out_tiles == 0:
        tl.store(row + CO * CI + o, bias, o_ok)


@jit
def load_vectors(ptr, q, ok, V: tl.constexpr):
    """Pixels V q ... V q + V - 1 of the plane at ptr as V float32 tensors; zero where not ok."""
    at = ptr + ((q * V)[:, None] + tl.arange(0, V)[None, :])
    phases = split_phases(tl.load(at, ok[:, None], other=0.0), V)
    out = ()
    for v in tl.static_range(V):
        out = out + (phases[v].to(tl.float32),)
    return out


@jit
def pointwise_wgrad_planes(
    g_ptr, factor_ptr, x_ptr, partial_ptr, N, PV, CI, CO, g_batch, factor_batch, x_batch, chunks,
    out_tiles, in_tiles,
    TO: tl.constexpr, TI: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    FACTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """pointwise_wgrad for float32 in NCHW, where a dot of plain FMAs would read shared memory across its banks.

    A thread owns vectors of V pixels and keeps its own TO x TI sums in registers: no operand goes through shared
    memory, only the sums do, once a program. Programs of the same pixels are neighbours, and find them in cache.
    """
    pid = tl.program_id(0)
    i0 = (pid % in_tiles) * TI
    o0 = (pid // in_tiles % out_tiles) * TO
    split = pid // in_tiles // out_tiles
    acc = (tl.zeros((BLOCK,), tl.float32),) * (TO * TI)
    bias = (tl.zeros((BLOCK,), tl.float32),) * TO
    for chunk in range(split * CHUNKS, min(split * CHUNKS + CHUNKS, N * chunks)):
        n = (chunk // chunks).to(tl.int64)
        q = (chunk % chunks) * BLOCK + tl.arange(0, BLOCK)
        ok = q < PV
        if WIDE:
            q = q.to(tl.int64)
        plane = tl.full((), 0, tl.int64) + PV * V  # an image of one pixel makes PV a plain number
        g = ()
        for j in tl.static_range(TO):
            good = ok & (o0 + j < CO)
            vector = load_vectors(g_ptr + (n * g_batch + (o0 + j) * plane), q, good, V)
            if FACTOR:
                factor = load_vectors(factor_ptr + (n * factor_batch + (o0 + j) * plane), q, good, V)
                for v in tl.static_range(V):
                    g = g + (vector[v] * factor[v],)
            else:
                g = g + vector
        if i0 == 0:
            for j in tl.static_range(TO):
                bias = put(bias, j, bias[j] + total(g[j * V : j * V + V]))
        for i in tl.static_range(TI):
            x = load_vectors(x_ptr + (n * x_batch + (i0 + i) * plane), q, ok & (i0 + i < CI), V)
            for j in tl.static_range(TO):
                for v in tl.static_range(V):
                    acc = put(acc, j * TI + i, acc[j * TI + i] + g[j * V + v] * x[v])
    row = partial_ptr + split.to(tl.int64) * (CO * CI + tl.cdiv(CO, 8) * 8)
    column = tl.arange(0, TO * TI)
    o, i = o0 + column // TI, i0 + column % TI
    tl.store(row + o * CI + i, tl.sum(join_all(acc, TO * TI), 0), (o < CO) & (i < CI))
    if i0 == 0:
        last = o0 + tl.arange(0, TO)
        tl.store(row + CO * CI + last, tl.sum(join_all(bias, TO), 0), last < CO)


def divisor(n: int) -> int:
    """The largest power of two up to 16 that divides n."""
    return next(v for v in (16, 8, 4, 2, 1) if n % v == 0)


def product(
    x: Tensor, weight: Tensor, y: Tensor, lay: ImageLayout, out_lay: ImageLayout, *, bias: Tensor | None = None,
    factor: Tensor | None = None, gate: Tensor | None = None, transposed: bool = False, wide: bool = False,
) -> None:  # fmt: skip
    """y = (W (x [* factor]) [+ bias]) [* gate], one launch; W = weight (Co, Ci, 1, 1), or its transpose."""
    N, CI, H, W = x.shape
    CO = y.shape[1]
    vc, vp = min(lay.VC, out_lay.VC), min(lay.VP, out_lay.VP)
    vi, vo = divisor(CI), divisor(CO)
    s = heuristics.pointwise(CO, CI, x.element_size())
    tiles, out_tiles = ceil_div(H * W, s.BP), ceil_div(CO, s.BO)
    launch(pointwise_product, (N * tiles * out_tiles,), x, x if factor is None else factor, weight.contiguous(),
           weight if bias is None else bias.contiguous(), y if gate is None else gate, y, H * W // vp, CI // vi,
           CO // vo, lay.stride * lay.VC // vc, out_lay.stride * out_lay.VC // vc, x.stride(0),
           x.stride(0) if factor is None else factor.stride(0), y.stride(0) if gate is None else gate.stride(0),
           y.stride(0), tiles, out_tiles, BO=s.BO, BI=s.BI, BP=s.BP, VI=vi, VO=vo, VC=vc, VP=vp,
           TRANSPOSED=transposed, FACTOR=factor is not None, BIAS=bias is not None, GATE=gate is not None,
           NCHW=lay.NCHW, WIDE=wide, num_warps=s.warps)  # fmt: skip


def weight_grad(
    g: Tensor, x: Tensor, gw: Tensor, gb: Tensor | None, g_lay: ImageLayout, x_lay: ImageLayout, *,
    factor: Tensor | None = None, wide: bool = False,
) -> None:  # fmt: skip
    """gw (Co, Ci, 1, 1) = (g [* factor]) x^T over all pixels and gb (Co,) the sums of g [* factor]; two launches."""
    N, CI, H, W = x.shape
    CO = g.shape[1]
    vc, vp = min(g_lay.VC, x_lay.VC), min(g_lay.VP, x_lay.VP)
    vi, vo = divisor(CI), divisor(CO)
    factors = g if factor is None else factor
    sums = Sums.matrix(CO * CI)
    if x_lay.NCHW and x.dtype == torch.float32:
        s = heuristics.pointwise_wgrad_planes(CO, CI)
        chunks = ceil_div(H * W // vp, s.BLOCK)
        splits = ceil_div(N * chunks, s.CHUNKS)
        out_tiles, in_tiles = ceil_div(CO, s.TO), ceil_div(CI, s.TI)
        partial = sums.empty(x, splits, whole_sectors(CO))
        launch(pointwise_wgrad_planes, (splits * out_tiles * in_tiles,), g, factors, x, partial, N, H * W // vp, CI,
               CO, g.stride(0), factors.stride(0), x.stride(0), chunks, out_tiles, in_tiles, TO=s.TO, TI=s.TI,
               V=vp, BLOCK=s.BLOCK, CHUNKS=s.CHUNKS, FACTOR=factor is not None, WIDE=wide,
               num_warps=s.BLOCK // 32)  # fmt: skip
    else:
        s = heuristics.pointwise_wgrad(CO, CI, x.element_size())
        tiles = ceil_div(H * W, s.BP)
        splits = ceil_div(N * tiles, s.TILES)
        out_tiles, in_tiles = ceil_div(CO, s.BO), ceil_div(CI, s.BI)
        partial = sums.empty(x, splits, whole_sectors(CO))
        launch(pointwise_wgrad, (splits * out_tiles * in_tiles,), g, factors, x, partial, N, H * W // vp, CI // vi,
               CO // vo, g_lay.stride * g_lay.VC // vc, x_lay.stride * x_lay.VC // vc, g.stride(0), factors.stride(0),
               x.stride(0), tiles, splits, out_tiles, BO=s.BO, BI=s.BI, BP=s.BP, VI=vi, VO=vo, VC=vc, VP=vp,
               TILES=s.TILES, FACTOR=factor is not None, NCHW=x_lay.NCHW, WIDE=wide,
               num_warps=s.warps)  # fmt: skip
    finish(partial, sums, gw, gb)
