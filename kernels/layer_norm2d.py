"""Triton kernels of the LayerNorm over channels at each pixel, forward and backward, in either memory layout.

A program holds all channels of BP pixels, as [BC, BP], with the strides that they have in memory: nothing is
permuted. The statistics are three passes over registers: the mean, what its rounding missed, the variance. Backward
recomputes them from x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import heuristics
from ._triton import jit, tl
from .launch import ceil_div, image_layout, launch, output_format, unavailable, wide_plane
from .reduce import Sums, finish

MAX_CHANNELS = 1024


@jit
def pixel_tile(tile, CV, PV, stride, BC: tl.constexpr, BP: tl.constexpr, VC: tl.constexpr, VP: tl.constexpr,
               NCHW: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(offsets in an image, channel in range, pixel in range) of all channels of BP pixels, [BC, BP].

    CV VC channels and PV VP pixels; stride VC elements from pixel to pixel where channels are contiguous.
    """
    c = tl.arange(0, BC)
    p = tile * BP + tl.arange(0, BP)
    if WIDE:
        c = c.to(tl.int64)
        p = p.to(tl.int64)
    if NCHW:
        at = (c * PV * VP)[:, None] + p[None, :]
    else:
        at = c[:, None] + (p * stride * VC)[None, :]
    return at, c < CV * VC, p < PV * VP


@jit
def normalize(x, c_ok, C, eps):
    """(x - mean) / sqrt(var + eps) over axis 0 of x [BC, BP], of which C rows count, and 1 / sqrt(var + eps) [BP]."""
    share = tl.div_rn(1.0, C * 1.0)  # every thread has a pixel's sums, and would divide them
    # The sum of the channels is rounded in units of the mean. Where that is large against their spread, x - mean is
    # exact, and its own mean is what the first one missed.
    mean = tl.sum(x, 0) * share
    centred = tl.where(c_ok[:, None], x - mean[None, :], 0.0)
    missed = tl.sum(centred, 0) * share
    centred = tl.where(c_ok[:, None], centred - missed[None, :], 0.0)
    variance = tl.sum(centred * centred, 0) * share
    # Inductor passes Python's floats as float64.
    rstd = tl.div_rn(1.0, tl.sqrt_rn((variance + eps).to(tl.float32)))
    return centred * rstd[None, :], rstd


@jit
def normalize_grad(gw, xhat, rstd, C):
    """Gradient in x of `normalize`, from gw, the gradient of its result."""
    share = tl.div_rn(1.0, C * 1.0)
    mean = tl.sum(gw, 0) * share
    along = tl.sum(gw * xhat, 0) * share
    return rstd[None, :] * (gw - mean[None, :] - xhat * along[None, :])


@jit
def layer_norm_forward(
    x_ptr, w_ptr, b_ptr, y_ptr, CV, PV, stride, x_batch, y_batch, tiles, eps,
    BC: tl.constexpr, BP: tl.constexpr, VC: tl.constexpr, VP: tl.constexpr, BIAS: tl.constexpr,
    NCHW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = LN(x) weight + bias; see pixel_tile for the layout."""
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    at, c_ok, p_ok = pixel_tile(pid % tiles, CV, PV, stride, BC, BP, VC, VP, NCHW, WIDE)
    mask = c_ok[:, None] & p_ok[None, :]
    x = tl.load(x_ptr + n * x_batch + at, mask, other=0.0).to(tl.float32)
    xhat, _ = normalize(x, c_ok, CV * VC, eps)
    c = tl.arange(0, BC)
    y = xhat * tl.load(w_ptr + c, c_ok, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        y += tl.load(b_ptr + c, c_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + n * y_batch + at, y.to(y_ptr.dtype.element_ty), mask)


@jit
def layer_norm_backward(
    g_ptr, x_ptr, w_ptr, gx_ptr, partial_ptr, N, CV, PV, stride, g_batch, x_batch, tiles, eps,
    BC: tl.constexpr, BP: tl.constexpr, VC: tl.constexpr, VP: tl.constexpr, TILES: tl.constexpr,
    NEED_X: tl.constexpr, NEED_AFFINE: tl.constexpr, NCHW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient in x (laid out as g), and row `program` of partial [programs, 2 C]: sums for the weight, then the
    bias.
    """
    pid = tl.program_id(0)
    C = CV * VC
    c = tl.arange(0, BC)
    w = tl.load(w_ptr + c, c < C, other=0.0).to(tl.float32)
    gw_sum = tl.zeros((BC,), tl.float32)
    gb_sum = tl.zeros((BC,), tl.float32)
    for tile in range(pid * TILES, min(pid * TILES + TILES, N * tiles)):
        n = (tile // tiles).to(tl.int64)
        at, c_ok, p_ok = pixel_tile(tile % tiles, CV, PV, stride, BC, BP, VC, VP, NCHW, WIDE)
        mask = c_ok[:, None] & p_ok[None, :]
        x = tl.load(x_ptr + n * x_batch + at, mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + n * g_batch + at, mask, other=0.0).to(tl.float32)
        xhat, rstd = normalize(x, c_ok, C, eps)
        if NEED_AFFINE:
            gw_sum += tl.sum(g * xhat, 1)
            gb_sum += tl.sum(g, 1)
        if NEED_X:
            gx = normalize_grad(g * w[:, None], xhat, rstd, C)
            tl.store(gx_ptr + n * g_batch + at, gx.to(gx_ptr.dtype.element_ty), mask)
    if NEED_AFFINE:
        row = partial_ptr + pid.to(tl.int64) * (2 * C)
        tl.store(row + c, gw_sum, c < C)
        tl.store(row + C + c, gb_sum, c < C)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> str | None:
    """None if the kernels can run this call, else the reason why not."""
    if x.shape[1] > MAX_CHANNELS:
        return (
            f"the Triton kernels hold all channels of a pixel, up to {MAX_CHANNELS}, and x has {x.shape[1]}"
        )
    return unavailable(x, weight, bias)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm of x (N, C, H, W) over C at each pixel, weight and bias (C,); x's memory format; one launch."""
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = torch.empty_like(x, memory_format=fmt)
    if x.numel() > 0:
        N, C, H, W = x.shape
        lay = image_layout(fmt, x, y)
        s = heuristics.pixels(C)
        tiles = ceil_div(H * W, s.BP)
        launch(layer_norm_forward, (N * tiles,), x, weight.contiguous(), weight if bias is None else bias.contiguous(),
               y, C // lay.VC, H * W // lay.VP, lay.stride, x.stride(0), y.stride(0), tiles, eps, BC=s.BC, BP=s.BP,
               VC=lay.VC, VP=lay.VP, BIAS=bias is not None, NCHW=lay.NCHW, WIDE=wide_plane(x),
               num_warps=s.warps)  # fmt: skip
    return y


def backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, *,
    output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in [x, weight, bias] where `output_mask` asks for them: one launch, two where weight or bias want
    one.
    """
    need_x, need_weight, need_bias = output_mask
    fmt = output_format(x)
    g, x = grad_output.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    gx = torch.empty_like(x, memory_format=fmt) if need_x else x
    gw, gb = torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)
    affine = need_weight or need_bias
    if x.numel() > 0:
        N, C, H, W = x.shape
        lay = image_layout(fmt, x, g)
        s = heuristics.pixels(C, backward=True, planes=lay.NCHW)
        tiles = ceil_div(H * W, s.BP)
        depth = heuristics.in_a_row(N * tiles, s.TILES)
        programs = ceil_div(N * tiles, depth)
        sums = Sums.matrix(C)
        partial = sums.empty(x, programs if affine else 1, C)
        launch(layer_norm_backward, (programs,), g, x, weight.contiguous(), gx, partial, N, C // lay.VC,
               H * W // lay.VP, lay.stride, g.stride(0), x.stride(0), tiles, eps, BC=s.BC, BP=s.BP, VC=lay.VC,
               VP=lay.VP, TILES=depth, NEED_X=need_x, NEED_AFFINE=affine, NCHW=lay.NCHW, WIDE=wide_plane(x),
               num_warps=s.warps)  # fmt: skip
        if need_x and C == 1:
            # The product with the weight is fused into the difference with the mean, which is not fused: what one
            # channel leaves of it is the product's rounding, not nothing.
            gx.mul_(0)
        if affine:
            finish(partial, sums, gw, gb)
    else:
        gw.zero_()
        gb.zero_()
    return [t for t, need in ((gx, need_x), (gw, need_weight), (gb, need_bias)) if need]
