"""Triton kernels of StarConv: two launches forward (LayerNorm with both 1x1s, then DW3x3 with GELU and star), eleven
backward.

Nothing but the inputs is kept for backward, which forms the two 1x1 results and the statistics again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import depthwise_conv2d as depthwise
from . import heuristics, pointwise
from ._triton import jit, tl
from .launch import ceil_div, empty_image, image_layout, launch, output_format, unavailable, wide_plane
from .layer_norm2d import normalize, normalize_grad
from .phases import compile_time
from .pointwise import divisor, image_tile, product_end, product_of, product_start, stacked_tile
from .reduce import Sums, finish, join_all
from .star import ACTIVATIONS

MAX_CHANNELS = 256  # all of a pixel's channels are one side of a product


@compile_time
def rounded_log2(n):
    """log2 of the smallest power of two that is at least n."""
    return (n - 1).bit_length()


@jit
def stack(x, LEVELS: tl.constexpr):
    """Matrices [A, B], up to 2^LEVELS of them, one above the other; missing ones are zero."""
    if LEVELS == 0:
        y = x[0]
    else:
        A: tl.constexpr = x[0].shape[0]
        B: tl.constexpr = x[0].shape[1]
        for _ in tl.static_range((1 << LEVELS) - len(x)):
            x = x + (tl.zeros((A, B), x[0].dtype),)
        y = tl.permute(join_all(x, 1 << LEVELS), (2, 0, 1))
        y = tl.reshape(y, (A << LEVELS, B))
    return y


@jit
def norm_pointwise(
    x_ptr, nw_ptr, nb_ptr, w1_ptr, w2_ptr, y1_ptr, y2_ptr, z_ptr, PV, CIV, C1V, C2V, x_stride, y1_stride, y2_stride,
    x_batch, y1_batch, y2_batch, tiles, eps,
    BC: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr, VI: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    VC: tl.constexpr, VP: tl.constexpr, NORM_BIAS: tl.constexpr, KEEP: tl.constexpr, TILES: tl.constexpr,
    NCHW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y1 = W1 z and y2 = W2 z with z = LN(x): x is read and normalized once, and both matrices are one, W1 above W2.

    KEEP: z itself is written as well; it lies as x does. TILES: how many tiles of BO outputs to form before they are
    written, which is 1 or all.
    """
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    i = tl.arange(0, BC)
    i_ok = i < CIV * VI
    p = (pid % tiles) * BP + tl.arange(0, BP)
    p_ok = p < PV * VP
    at = image_tile(i, p, PV, x_stride, VC, VP, NCHW, WIDE)
    x = tl.load(x_ptr + n * x_batch + at, i_ok[:, None] & p_ok[None, :], other=0.0).to(tl.float32)
    z, _ = normalize(x, i_ok, CIV * VI, eps)
    z *= tl.load(nw_ptr + i, i_ok, other=0.0).to(tl.float32)[:, None]
    if NORM_BIAS:
        z += tl.load(nb_ptr + i, i_ok, other=0.0).to(tl.float32)[:, None]
    z = z.to(x_ptr.dtype.element_ty)
    if KEEP:
        tl.store(z_ptr + n * x_batch + at, z, i_ok[:, None] & p_ok[None, :])
    PIXELS_FIRST: tl.constexpr = not NCHW and x_ptr.dtype.element_ty == tl.float32
    zero = product_start(BO, BP, PIXELS_FIRST)
    C1 = C1V * V1
    CO = C1 + C2V * V2
    LEVELS: tl.constexpr = rounded_log2(TILES)
    BW: tl.constexpr = BO << LEVELS
    for first in range(0, CO, BW):
        y = ()
        for t in tl.static_range(TILES):
            o = first + t * BO + tl.arange(0, BO)
            w = stacked_tile(w1_ptr, w2_ptr, o, i, i_ok, C1V, C2V, CIV, PV, V1, V2, VI, False, PIXELS_FIRST)
            tile = product_end(product_of(w, z, zero, PIXELS_FIRST), PIXELS_FIRST).to(y1_ptr.dtype.element_ty)
            y = y + (tile,)
        y = stack(y, LEVELS)
        o = first + tl.arange(0, BW)
        at1 = image_tile(o, p, PV, y1_stride, VC, VP, NCHW, WIDE)
        tl.store(y1_ptr + n * y1_batch + at1, y, (o < C1)[:, None] & p_ok[None, :])
        at2 = image_tile(o - C1, p, PV, y2_stride, VC, VP, NCHW, WIDE)
        tl.store(y2_ptr + n * y2_batch + at2, y, ((o >= C1) & (o < CO))[:, None] & p_ok[None, :])


@jit
def norm_pointwise_grad(
    g1_ptr, g2_ptr, x_ptr, nw_ptr, w1_ptr, w2_ptr, gx_ptr, partial_ptr, N, PV, CIV, C1V, C2V,
    x_stride, g1_stride, g2_stride, x_batch, g1_batch, g2_batch, tiles, eps,
    BC: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr, VI: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    VC: tl.constexpr, VP: tl.constexpr, TILES: tl.constexpr, NCHW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient in x of norm_pointwise from those of y1 and y2, and partial [programs, 2 C] sums for the norm's
    parameters.

    gx lies as x does.
    """
    pid = tl.program_id(0)
    C = CIV * VI
    C1 = C1V * V1
    CO = C1 + C2V * V2
    i = tl.arange(0, BC)
    i_ok = i < C
    nw = tl.load(nw_ptr + i, i_ok, other=0.0).to(tl.float32)
    PIXELS_FIRST: tl.constexpr = not NCHW and x_ptr.dtype.element_ty == tl.float32
    w_sum = tl.zeros((BC,), tl.float32)
    b_sum = tl.zeros((BC,), tl.float32)
    for tile in range(pid * TILES, min(pid * TILES + TILES, N * tiles)):
        n = (tile // tiles).to(tl.int64)
        p = (tile % tiles) * BP + tl.arange(0, BP)
        p_ok = p < PV * VP
        gz = product_start(BC, BP, PIXELS_FIRST)
        for first in range(0, CO, BO):
            o = first + tl.arange(0, BO)
            at1 = image_tile(o, p, PV, g1_stride, VC, VP, NCHW, WIDE)
            g1 = tl.load(g1_ptr + n * g1_batch + at1, (o < C1)[:, None] & p_ok[None, :], other=0.0)
            at2 = image_tile(o - C1, p, PV, g2_stride, VC, VP, NCHW, WIDE)
            second = (o >= C1) & (o < CO)
            g2 = tl.load(g2_ptr + n * g2_batch + at2, second[:, None] & p_ok[None, :], other=0.0)
            g = tl.where((o < C1)[:, None], g1, g2)
            w = stacked_tile(w1_ptr, w2_ptr, o, i, i_ok, C1V, C2V, CIV, PV, V1, V2, VI, True, PIXELS_FIRST)
            gz = product_of(w, g, gz, PIXELS_FIRST)
        gz = product_end(gz, PIXELS_FIRST)
        mask = i_ok[:, None] & p_ok[None, :]
        at = image_tile(i, p, PV, x_stride, VC, VP, NCHW, WIDE)
        x = tl.load(x_ptr + n * x_batch + at, mask, other=0.0).to(tl.float32)
        xhat, rstd = normalize(x, i_ok, C, eps)
        w_sum += tl.sum(gz * xhat, 1)
        b_sum += tl.sum(gz, 1)
        gx = normalize_grad(gz * nw[:, None], xhat, rstd, C)
        tl.store(gx_ptr + n * x_batch + at, gx.to(gx_ptr.dtype.element_ty), mask)
    row = partial_ptr + pid.to(tl.int64) * (2 * C)
    tl.store(row + i, w_sum, i_ok)
    tl.store(row + C + i, b_sum, i_ok)


def _both_products(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, pw1_weight: Tensor, pw2_weight: Tensor, eps: float,
    fmt: torch.memory_format, z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """W1 LN(x) and W2 LN(x), one launch, which also writes LN(x) into z if there is one."""
    N, C, H, W = x.shape
    y1, y2 = (empty_image(x, w.shape[0], fmt) for w in (pw1_weight, pw2_weight))
    lays = [image_layout(fmt, t) for t in (x, y1, y2)]
    vc, vp = min(t.VC for t in lays), min(t.VP for t in lays)
    s = heuristics.norm_pointwise(C, y1.shape[1], y2.shape[1], x.element_size(), planes=lays[0].NCHW)
    vi, v1, v2 = (divisor(t.shape[1]) for t in (x, y1, y2))
    tiles = ceil_div(H * W, s.BP)
    launch(norm_pointwise, (N * tiles,), x, norm_weight.contiguous(),
           norm_weight if norm_bias is None else norm_bias.contiguous(), pw1_weight.contiguous(),
           pw2_weight.contiguous(), y1, y2, x if z is None else z, H * W // vp, C // vi, y1.shape[1] // v1,
           y2.shape[1] // v2,
           *(t.stride * t.VC // vc for t in lays), x.stride(0), y1.stride(0), y2.stride(0), tiles, eps,
           BC=s.BC, BO=s.BO, BP=s.BP, VI=vi, V1=v1, V2=v2, VC=vc, VP=vp, NORM_BIAS=norm_bias is not None,
           KEEP=z is not None, TILES=s.TILES, NCHW=lays[0].NCHW, WIDE=wide_plane(x, y1, y2),
           num_warps=s.warps)  # fmt: skip
    return y1, y2


def supports(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, pw1_weight: Tensor, dw_weight: Tensor,
    dw_bias: Tensor | None, pw2_weight: Tensor, *, outer: str = "none", eps: float = 1e-5,
) -> str | None:  # fmt: skip
    """None if the kernels can run this call, else the reason why not."""
    if x.shape[1] > MAX_CHANNELS:
        return (
            f"the Triton kernels hold all channels of a pixel, up to {MAX_CHANNELS}, and x has {x.shape[1]}"
        )
    if outer not in ACTIVATIONS:
        return f"outer must be one of {', '.join(ACTIVATIONS)}, got {outer!r}"
    reason = depthwise.refuses_filter(dw_weight)
    return reason or unavailable(x, norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight)


def forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, pw1_weight: Tensor, dw_weight: Tensor,
    dw_bias: Tensor | None, pw2_weight: Tensor, *, outer: str = "none", eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """outer(GELU(DW(W1 z)) * W2 z) with z = LN(x): x (N, Ci, H, W) -> (N, Co, H, W), x's memory format; two launches.

    Workspace: two tensors of the result's size.
    """
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = empty_image(x, pw2_weight.shape[0], fmt)
    if y.numel() > 0:
        t, b = _both_products(x, norm_weight, norm_bias, pw1_weight, pw2_weight, eps, fmt)
        depthwise.convolve(t, dw_weight, dw_bias, y, (1, 1), star="forward", outer=outer, gate=b)
    return y


def backward(
    grad_output: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, pw1_weight: Tensor,
    dw_weight: Tensor, dw_bias: Tensor | None, pw2_weight: Tensor, *, outer: str = "none", eps: float = 1e-5,
    output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in [x, norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight] where `output_mask` asks.

    All of them: both products again, the star's gradients, DW's input gradient, x and the norm (2), DW's weight (2),
    and 2 for each 1x1, from LN(x), which the first launch keeps. Workspace: one tensor of x's size and five of the
    result's.
    """
    need_x, need_nw, need_nb, need_w1, need_dw, need_db, need_w2 = output_mask
    fmt = output_format(x)
    g, x = grad_output.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    gnw, gnb = norm_weight.new_empty(norm_weight.shape), norm_weight.new_empty(norm_weight.shape)
    gw1, gw2 = pw1_weight.new_empty(pw1_weight.shape), pw2_weight.new_empty(pw2_weight.shape)
    gx = torch.empty_like(x, memory_format=fmt)
    if g.numel() == 0:
        grads = [
            gx,
            gnw,
            gnb,
            gw1,
            dw_weight.new_empty(dw_weight.shape),
            norm_weight.new_empty(dw_weight.shape[:1]),
            gw2,
        ]
        return [t.zero_() for t, need in zip(grads, output_mask, strict=True) if need]
    z = torch.empty_like(x, memory_format=fmt) if need_w1 or need_w2 else None
    t, b = _both_products(x, norm_weight, norm_bias, pw1_weight, pw2_weight, eps, fmt, z)
    ga, gb = torch.empty_like(t, memory_format=fmt), torch.empty_like(b, memory_format=fmt)
    depthwise.convolve(
        t, dw_weight, dw_bias, ga, (1, 1), star="backward", outer=outer, gate=b, grad=g, gate_grad=gb
    )
    gdw, gdb = (
        depthwise.weight_grad(ga, t, dw_weight, (1, 1), need_dw, need_db)
        if need_dw or need_db
        else (None, None)
    )
    wide = wide_plane(x, t)
    gt = t  # which is no longer needed itself
    if need_x or need_nw or need_nb or need_w1:
        depthwise.convolve(ga, dw_weight, None, gt, (1, 1), flip=True)
    if z is not None:
        for grad, gw, need in ((gt, gw1, need_w1), (gb, gw2, need_w2)):
            if need:
                pointwise.weight_grad(
                    grad, z, gw, None, image_layout(fmt, grad), image_layout(fmt, z), wide=wide
                )
    if need_x or need_nw or need_nb:
        N, C, H, W = x.shape
        lays = [image_layout(fmt, v) for v in (x, gt, gb)]
        vc, vp = min(v.VC for v in lays), min(v.VP for v in lays)
        vi, v1, v2 = (divisor(v.shape[1]) for v in (x, gt, gb))
        s = heuristics.norm_pointwise(C, gt.shape[1], gb.shape[1], x.element_size(), True, lays[0].NCHW)
        tiles = ceil_div(H * W, s.BP)
        depth = heuristics.in_a_row(N * tiles, s.TILES)
        programs = ceil_div(N * tiles, depth)
        sums = Sums.matrix(C)
        partial = sums.empty(x, programs, C)
        launch(norm_pointwise_grad, (programs,), gt, gb, x, norm_weight.contiguous(), pw1_weight.contiguous(),
               pw2_weight.contiguous(), gx, partial, N, H * W // vp, C // vi, gt.shape[1] // v1, gb.shape[1] // v2,
               *(v.stride * v.VC // vc for v in lays), x.stride(0), gt.stride(0), gb.stride(0), tiles, eps,
               BC=s.BC, BO=s.BO, BP=s.BP, VI=vi, V1=v1, V2=v2, VC=vc, VP=vp, TILES=depth, NCHW=lays[0].NCHW,
               WIDE=wide, num_warps=s.warps)  # fmt: skip
        if need_nw or need_nb:
            finish(partial, sums, gnw, gnb)
    grads = [gx, gnw, gnb, gw1, gdw, gdb, gw2]
    return [v for v, need in zip(grads, output_mask, strict=True) if need]
