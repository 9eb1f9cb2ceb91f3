"""The depth-wise convolution, strip or square: its launches forward and for the gradients of input, weight and bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import heuristics
from .depthwise_nchw import conv_nchw, wgrad_nchw
from .depthwise_nhwc import conv_nhwc, wgrad_nhwc
from .launch import (
    ceil_div,
    channel_vector,
    is_aligned,
    launch,
    output_format,
    pair,
    pixel_stride,
    rows_are_dense,
    unavailable,
    wide_plane,
)
from .reduce import Sums, finish

MAX_TAPS = 63  # along one axis


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, dilation: Sequence[int], *, flip: bool = False,
    star: str = "none", outer: str = "none", gate: Tensor | None = None, grad: Tensor | None = None,
    gate_grad: Tensor | None = None,
) -> None:  # fmt: skip
    """y = the convolution of x, one launch (plus a small transposition of the filter where channels are last).

    x and y: N x C x H x W, each NCHW or each channels_last, either possibly a slice of channels of such a tensor.
    flip: the filter flipped. star: see conv_nchw; gate, grad and gate_grad lie in memory as y does.
    """
    N, C, H, W = x.shape
    KH, KW = weight.shape[-2:]
    DH, DW = dilation
    if y.numel() == 0:
        return
    flags = dict(FLIP=flip, BIAS=bias is not None, STAR=star, OUTER=outer, WIDE=wide_plane(x, y))
    extra = [t if t is not None else y for t in (gate, grad, gate_grad)]
    if rows_are_dense(x):
        s = heuristics.conv_nchw(KH, KW, DH, W, H, x.element_size(), is_aligned(x, y, *extra), DW)
        QW = ceil_div(W, s.V)
        groups = H if s.R == 1 else ceil_div(H, s.R * DH) * DH
        QG = QW if s.M == 1 else ceil_div(QW, s.M * s.S) * s.S
        blocks = ceil_div(groups * QG, s.BG * s.BQ) if s.FLAT else ceil_div(groups, s.BG) * ceil_div(QW, s.BQ)
        launch(conv_nchw, (N * C * blocks,), x, weight.contiguous(), weight if bias is None else bias.contiguous(), y,
               *extra, C, H, W, QW, groups, x.stride(0), y.stride(0), blocks, KH=KH, KW=KW, DH=DH, DW=DW, R=s.R, V=s.V,
               BG=s.BG, BQ=s.BQ, FLAT=s.FLAT, VECTOR=s.VECTOR, M=s.M, S=s.S, **flags, num_warps=s.warps)  # fmt: skip
        return
    along_h = KH > 1  # squares too, whose neighbouring threads then have neighbouring pixels
    KA, KB, DA, DB = (KH, KW, DH, DW) if along_h else (KW, 1, DW, 1)
    length, lines = (H, W) if along_h else (W, H)
    s = heuristics.conv_nhwc(KA, KB, length, DA, C, channel_vector(x, y, *extra), along_h, x.element_size())
    taps = weight.reshape(C, KH * KW).t().contiguous()
    groups = ceil_div(length, s.P * s.S * DA) * s.S * DA if s.P > 1 else length
    blocks, tiles = ceil_div(groups, s.BG) * ceil_div(lines, s.BL), ceil_div(C, s.BC)
    launch(conv_nhwc, (N * blocks * tiles,), x, taps, taps if bias is None else bias.contiguous(), y, *extra,
           C // s.VEC, H, W, groups, lines, x.stride(0), pixel_stride(x) // s.VEC, y.stride(0),
           pixel_stride(y) // s.VEC, blocks, tiles, KA=KA, KB=KB, DA=DA, DB=DB, ALONG_H=along_h, KT=s.KT, P=s.P,
           S=s.S, BG=s.BG, BL=s.BL, BC=s.BC, VEC=s.VEC, **flags, num_warps=s.warps)  # fmt: skip


def weight_grad(
    g: Tensor, x: Tensor, weight: Tensor, dilation: Sequence[int], need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the filter and of the bias (as asked for) from the output's gradient g and the input x; two
    launches.

    The workspace has a row of Sums for each program of a channel. Empty images give zeros.
    """
    N, C, H, W = x.shape
    KH, KW = weight.shape[-2:]
    DH, DW = dilation
    taps = KH * KW
    gw, gb = weight.new_empty(weight.shape), weight.new_empty((C,))
    if g.numel() == 0:
        return (gw.zero_() if need_weight else None), (gb.zero_() if need_bias else None)
    wide = wide_plane(g, x)
    if rows_are_dense(x):
        s = heuristics.wgrad_nchw(KH, KW, W, x.element_size(), is_aligned(x, g), DW)
        QW = ceil_div(W, s.V)
        QG = QW if s.M == 1 else ceil_div(QW, s.M * s.S) * s.S
        groups = H if s.R == 1 else ceil_div(H, s.R * DH) * DH
        down = 1 if s.FLAT else ceil_div(groups, s.BG)
        chunks = ceil_div(groups * QG, s.BG) if s.FLAT else down * ceil_div(QG, s.BQ)
        tiles = ceil_div(KH, s.TH)
        depth = heuristics.in_a_row(N * chunks * C * tiles, s.CHUNKS, s.LEAST)
        if not s.FLAT:
            depth = whole(depth, down, s.CHUNKS)
        splits = ceil_div(N * chunks, depth)
        sums = Sums.filters(taps, taps, s.TH * KW)
        partial = sums.empty(x, splits, C)
        launch(wgrad_nchw, (splits * C * tiles,), g, x, partial, N, C, H, W, QW, groups, g.stride(0),
               x.stride(0), chunks, depth, splits, KH=KH, KW=KW, DH=DH, DW=DW, TH=s.TH, COLUMNS=s.COLUMNS, R=s.R,
               V=s.V, BG=s.BG, BQ=s.BQ, FLAT=s.FLAT, VECTOR=s.VECTOR, M=s.M, S=s.S, WIDE=wide,
               num_warps=s.warps)  # fmt: skip
    else:
        along_h = KW == 1 and KH > 1
        KA, KB, DA, DB = (KH, 1, DH, 1) if along_h else (KW, KH, DW, DH)
        length, lines = (H, W) if along_h else (W, H)
        s = heuristics.wgrad_nhwc(KA, KB, length, DA, C, channel_vector(x, g), along_h)
        groups = ceil_div(length, s.P * DA) * DA if s.P > 1 else length
        down, tiles = ceil_div(groups, s.BG), ceil_div(C, s.BC)
        chunks = down * ceil_div(lines, s.BL)
        steps = ceil_div(KB, s.TB) * ceil_div(KA, s.KT)
        depth = heuristics.in_a_row(N * chunks * tiles * steps, s.CHUNKS, s.LEAST)
        if along_h or (KB == 1 and DA > 1):
            depth = whole(depth, down, s.CHUNKS)
        splits = ceil_div(N * chunks, depth)
        sums = Sums.filters(taps, KA if s.TB == 1 else taps, s.KT * s.TB)
        partial = sums.empty(x, splits, C)
        launch(wgrad_nhwc, (splits * tiles * steps,), g, x, partial, N, C // s.VEC, H, W, groups, lines, g.stride(0),
               pixel_stride(g) // s.VEC, x.stride(0), pixel_stride(x) // s.VEC, chunks, depth, splits, tiles,
               KA=KA, KB=KB, DA=DA, DB=DB, ALONG_H=along_h, KT=s.KT, TB=s.TB, COLUMNS=s.COLUMNS, P=s.P, BG=s.BG,
               BL=s.BL, BC=s.BC, VEC=s.VEC, WIDE=wide, num_warps=s.warps)  # fmt: skip
    finish(partial, sums, gw, gb)
    return (gw if need_weight else None), (gb if need_bias else None)


def whole(depth: int, down: int, most: int) -> int:
    """At least `depth` chunks: whole columns or rows of `down` chunks where `most` holds them: none is read twice."""
    return ceil_div(depth, down) * down if down <= most else most


def refuses_filter(weight: Tensor) -> str | None:
    """Why no kernel takes this filter, or None."""
    if max(weight.shape[-2:]) > MAX_TAPS:
        kh, kw = weight.shape[-2:]
        return f"the Triton kernels take filters of up to {MAX_TAPS} taps an axis, this one is {kh}x{kw}"
    return None


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: Sequence[int] = (1, 1)
) -> str | None:
    """None if the kernels can run this call, else the reason why not."""
    return refuses_filter(weight) or unavailable(x, weight, bias)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: Sequence[int] = (1, 1)
) -> Tensor:
    """Depth-wise "same" convolution of x (N, C, H, W) with weight (C, 1, kh, kw), odd kh and kw; x's memory format."""
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = torch.empty_like(x, memory_format=fmt)
    convolve(x, weight, bias, y, pair(dilation))
    return y


def backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    dilation: Sequence[int] = (1, 1), output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in [x, weight, bias] where `output_mask` asks for them: one launch for x, two for weight and bias."""
    fmt = output_format(x)
    g, x = grad_output.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    grads = []
    if output_mask[0]:
        gx = torch.empty_like(x, memory_format=fmt)
        convolve(g, weight, None, gx, pair(dilation), flip=True)
        grads.append(gx)
    if output_mask[1] or output_mask[2]:
        grads += [
            t
            for t in weight_grad(g, x, weight, pair(dilation), output_mask[1], output_mask[2])
            if t is not None
        ]
    return grads
