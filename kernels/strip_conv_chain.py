"""Triton kernels of the strip chain: per two stages one horizontal and one vertical pass over memory, exactly.

1xk and kx1 convolutions with zero padding commute, so the chain H1 V1 H2 V2 is the pass H2 (H1 x + b1), then the pass
V2 (V1 m + b2 F + b3) + b4, where F = H2 1 is what H2 makes of a row of ones (bias b2 passed through H2 as well). A
program of the horizontal pass owns whole rows, one of the vertical pass whole columns: the intermediate goes through
the program's own part of the output, which stays in cache, and is zero outside the image as it must be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import depthwise_conv2d as depthwise
from . import heuristics
from ._triton import jit, tl
from .depthwise_conv2d import accumulate, first_row
from .launch import ceil_div, is_aligned, launch, output_format, rows_are_dense, unavailable, wide_plane
from .phases import load_phases, put, store_phases


@jit
def strip_rows_program(
    pid, x_ptr, w1_ptr, b1_ptr, w2_ptr, field_ptr, y_ptr, C, H, W, QW, GROUPS, ROWS, x_batch, y_batch, blocks,
    K1: tl.constexpr, D1: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, FIELD: tl.constexpr,
    VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = W2 * (W1 * x + b1), both 1xk, on ROWS groups of R whole rows of one plane; ROWS QW <= BLOCK.

    FIELD: the first program of a channel also writes field [C, W], what W2 makes of a row of ones.
    """
    plane = pid // blocks
    block = pid % blocks
    n, c = plane // C, plane % C
    offset = c.to(tl.int64) * H * W
    x_ptr += n.to(tl.int64) * x_batch + offset
    y_ptr += n.to(tl.int64) * y_batch + offset
    w1_ptr += c * K1
    w2_ptr += c * K2
    i = tl.arange(0, BLOCK)
    local = i // QW
    q = i - local * QW
    group = block * ROWS + local
    ok = (local < ROWS) & (group < GROUPS)
    h = first_row(group, R, 1)
    acc = accumulate(x_ptr, w1_ptr, h, q, ok, H, W, QW, 1, K1, 1, D1, R, V, FLIP, VECTOR, WIDE)
    if BIAS:
        bias = tl.load(b1_ptr + c).to(tl.float32)
        for v in tl.static_range(R * V):
            acc = put(acc, v, acc[v] + bias)
    store_rows(y_ptr, h, q, ok, H, W, acc, 1, R, V, VECTOR, WIDE)
    tl.debug_barrier()  # the program's own rows, written by other threads of it, are read from here on
    acc = accumulate(y_ptr, w2_ptr, h, q, ok, H, W, QW, 1, K2, 1, D2, R, V, FLIP, VECTOR, WIDE)
    tl.debug_barrier()
    store_rows(y_ptr, h, q, ok, H, W, acc, 1, R, V, VECTOR, WIDE)
    if FIELD:  # noqa: SIM102 - known at compile time, the condition inside is not
        if (n == 0) & (block == 0):
            field = (tl.zeros((BLOCK,), tl.float32),) * V
            for k in tl.static_range(K2):
                weight = tl.load(w2_ptr + (K2 - 1 - k if FLIP else k)).to(tl.float32)
                for v in tl.static_range(V):
                    column = q * V + (v + (k - K2 // 2) * D2)
                    inside = column.to(tl.uint32, bitcast=True) < W
                    field = put(field, v, field[v] + tl.where(inside, weight, 0.0))
            store_phases(field_ptr + c.to(tl.int64) * W, 0 * q, q, local == 0, W, field, V, VECTOR)


@jit
def strip_rows(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, field_ptr, y_ptr, C, H, W, QW, GROUPS, ROWS, x_batch, y_batch, blocks,
    K1: tl.constexpr, D1: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, FIELD: tl.constexpr,
    VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One launch of strip_rows_program, a program for each plane and block."""
    strip_rows_program(
        tl.program_id(0),
        x_ptr, w1_ptr, b1_ptr, w2_ptr, field_ptr, y_ptr, C, H, W, QW, GROUPS, ROWS, x_batch, y_batch,
        blocks, K1, D1, K2, D2, R, V, BLOCK, FLIP, BIAS, FIELD, VECTOR, WIDE,
    )  # fmt: skip


@jit
def store_rows(y_ptr, h, q, ok, H, W, acc, DH: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
               VECTOR: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Store R V tensors as rows h, h + DH, ... of a plane."""
    for r in tl.static_range(R):
        row = h + r * DH
        at = row.to(tl.int64) * W if WIDE else row * W
        store_phases(y_ptr, at, q, ok & (row < H), W, acc[r * V : (r + 1) * V], V, VECTOR)


@jit
def strip_columns_program(
    pid, x_ptr, w1_ptr, b1_ptr, b2_ptr, field_ptr, w2_ptr, b3_ptr, y_ptr, C, H, W, QW, GROUPS1, GROUPS2,
    x_batch, y_batch, blocks,
    K1: tl.constexpr, D1: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BG: tl.constexpr, BQ: tl.constexpr, FLIP: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    BIAS3: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = W2 * (W1 * x + b1 field + b2) + b3, both kx1, on BQ vectors of whole columns; GROUPS1, GROUPS2 <= BG."""
    plane = pid // blocks
    n, c = plane // C, plane % C
    offset = c.to(tl.int64) * H * W
    x_ptr += n.to(tl.int64) * x_batch + offset
    y_ptr += n.to(tl.int64) * y_batch + offset
    i = tl.arange(0, BG * BQ)
    group = i // BQ
    q = (pid % blocks) * BQ + i % BQ
    ok = (group < GROUPS1) & (q < QW)
    h = first_row(group, R, D1)
    acc = accumulate(x_ptr, w1_ptr + c * K1, h, q, ok, H, W, QW, K1, 1, D1, 1, R, V, FLIP, VECTOR, WIDE)
    if BIAS1:
        bias = tl.load(b1_ptr + c)
        field = load_phases(field_ptr + c.to(tl.int64) * W, 0 * q, q, ok, W, QW, 0, V, VECTOR)
        for j in tl.static_range(R):
            for v in tl.static_range(V):
                acc = put(acc, j * V + v, acc[j * V + v] + bias.to(tl.float32) * field[v])
    if BIAS2:
        shift = tl.load(b2_ptr + c).to(tl.float32)
        for v in tl.static_range(R * V):
            acc = put(acc, v, acc[v] + shift)
    store_rows(y_ptr, h, q, ok, H, W, acc, D1, R, V, VECTOR, WIDE)
    tl.debug_barrier()
    ok = (group < GROUPS2) & (q < QW)
    h = first_row(group, R, D2)
    acc = accumulate(y_ptr, w2_ptr + c * K2, h, q, ok, H, W, QW, K2, 1, D2, 1, R, V, FLIP, VECTOR, WIDE)
    if BIAS3:
        last = tl.load(b3_ptr + c).to(tl.float32)
        for v in tl.static_range(R * V):
            acc = put(acc, v, acc[v] + last)
    tl.debug_barrier()
    store_rows(y_ptr, h, q, ok, H, W, acc, D2, R, V, VECTOR, WIDE)


@jit
def strip_columns(
    x_ptr, w1_ptr, b1_ptr, b2_ptr, field_ptr, w2_ptr, b3_ptr, y_ptr, C, H, W, QW, GROUPS1, GROUPS2, x_batch, y_batch,
    blocks,
    K1: tl.constexpr, D1: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BG: tl.constexpr, BQ: tl.constexpr, FLIP: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    BIAS3: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One launch of strip_columns_program, a program for each plane and block."""
    strip_columns_program(
        tl.program_id(0),
        x_ptr, w1_ptr, b1_ptr, b2_ptr, field_ptr, w2_ptr, b3_ptr, y_ptr, C, H, W, QW, GROUPS1, GROUPS2,
        x_batch, y_batch, blocks, K1, D1, K2, D2, R, V, BG, BQ, FLIP, BIAS1, BIAS2, BIAS3, VECTOR, WIDE,
    )  # fmt: skip


@dataclass
class Strip:
    """One depth-wise convolution: weight (C, 1, kh, kw), bias (C,) or None, dilations along H and W."""

    weight: Tensor
    bias: Tensor | None
    dilations: tuple[int, int]

    @property
    def axis(self) -> str:
        """ "w" for 1xk, "h" for kx1, else "hw"."""
        kh, kw = self.weight.shape[2:]
        return "w" if kh == 1 else "h" if kw == 1 else "hw"

    @property
    def taps(self) -> int:
        """Taps of a strip."""
        return self.weight.shape[2] * self.weight.shape[3]

    @property
    def dilation(self) -> int:
        """Dilation of a strip along its axis."""
        return self.dilations[1] if self.axis == "w" else self.dilations[0]


def two_stages(x: Tensor, strips: Sequence[Strip], y: Tensor, middle: Tensor, *, flip: bool = False) -> None:
    """y = the four convolutions H1, V1, H2, V2 of x, in two launches where one program can hold a row and a column.

    flip: with flipped filters and no biases in the opposite order, V2, H2, V1, H1: the input gradient of the chain.
    """
    N, C, H, W = x.shape
    h1, v1, h2, v2 = strips
    s = heuristics.strip_chain(x.element_size(), W, H, v1.dilation, v2.dilation, is_aligned(x, y, middle))
    if s is None or not rows_are_dense(x):
        one_by_one(x, list(reversed(strips)) if flip else strips, y, middle, flip=flip)
        return
    if flip:
        h1, v1, h2, v2 = (Strip(t.weight, None, t.dilations) for t in (h2, v2, h1, v1))
    QW = ceil_div(W, s.V)
    common = dict(V=s.V, FLIP=flip, VECTOR=s.VECTOR, WIDE=wide_plane(x, y))
    need_field = v1.bias is not None
    field = x.new_empty((C, W) if need_field else (1, 1), dtype=torch.float32)
    groups = ceil_div(H, s.R_ROWS)
    rows = s.BLOCK // QW
    blocks = ceil_div(groups, rows)
    launch(strip_rows, (N * C * blocks,), x, h1.weight.contiguous(), bias_pointer(h1), h2.weight.contiguous(), field,
           middle, C, H, W, QW, groups, rows, x.stride(0), middle.stride(0), blocks, K1=h1.taps, D1=h1.dilation,
           K2=h2.taps, D2=h2.dilation, R=s.R_ROWS, BLOCK=s.BLOCK, BIAS=h1.bias is not None, FIELD=need_field, **common,
           num_warps=s.BLOCK // 32)  # fmt: skip
    groups1, groups2 = (ceil_div(H, s.R * t.dilation) * t.dilation for t in (v1, v2))
    blocks = ceil_div(QW, s.BQ)
    launch(strip_columns, (N * C * blocks,), middle, v1.weight.contiguous(), bias_pointer(v1), bias_pointer(h2), field,
           v2.weight.contiguous(), bias_pointer(v2), y, C, H, W, QW, groups1, groups2, middle.stride(0), y.stride(0),
           blocks, K1=v1.taps, D1=v1.dilation, K2=v2.taps, D2=v2.dilation, R=s.R, BG=s.BG, BQ=s.BQ,
           BIAS1=v1.bias is not None, BIAS2=h2.bias is not None, BIAS3=v2.bias is not None,
           **common, num_warps=s.BG * s.BQ // 32)  # fmt: skip


def bias_pointer(strip: Strip) -> Tensor:
    """The bias, or what stands in for one that a kernel does not read."""
    return strip.weight if strip.bias is None else strip.bias.contiguous()


def one_by_one(x: Tensor, strips: Sequence[Strip], y: Tensor, middle: Tensor, *, flip: bool = False) -> None:
    """y = the convolutions of x in order, a launch each; the intermediates alternate between `middle` and y."""
    for i, strip in enumerate(strips):
        out = y if (len(strips) - i) % 2 == 1 else middle
        depthwise.convolve(x, strip.weight, None if flip else strip.bias, out, strip.dilations, flip=flip)
        x = out


def run(x: Tensor, strips: Sequence[Strip], y: Tensor, *, flip: bool = False) -> None:
    """y = the convolutions of x in order, each H1 V1 H2 V2 among them in two launches; flip: the input gradient.

    x and y may be slices of channels. Workspace: up to three tensors like y.
    """
    units: list[Sequence[Strip]] = []
    at = 0
    while at < len(strips):
        length = 4 if [t.axis for t in strips[at : at + 4]] == ["w", "h", "w", "h"] else 1
        units.append(strips[at : at + length])
        at += length
    if flip:
        units.reverse()
    for i, unit in enumerate(units):
        out = y if i == len(units) - 1 else torch.empty_like(y)
        if len(unit) == 4:
            two_stages(x, unit, out, torch.empty_like(y), flip=flip)
        else:
            one_by_one(x, unit, out, out, flip=flip)
        x = out


def _strips(
    weights: Sequence[Tensor], biases: Sequence[Tensor], bias_mask: Sequence[bool], dilations: Sequence[int]
) -> list[Strip]:
    present = iter(biases)
    return [
        Strip(w, next(present) if has else None, (d, d))
        for w, has, d in zip(weights, bias_mask, dilations, strict=True)
    ]


def supports(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bias_mask: Sequence[bool],
    dilations: Sequence[int],
) -> str | None:
    """None if the kernels can run this call, else the reason why not."""
    for weight in weights:
        if reason := depthwise.refuses_filter(weight):
            return reason
    return unavailable(x, *weights, *biases)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bias_mask: Sequence[bool],
    dilations: Sequence[int],
) -> Tensor:
    """The chain of x (N, C, H, W); weights (C, 1, 1, k), (C, 1, k, 1), ... in order; x's memory format.

    Two launches per two stages in NCHW (rows to 4096 bytes, columns to 2048 pixels), else one per convolution.
    """
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = torch.empty_like(x, memory_format=fmt)
    if y.numel() > 0:
        run(x, _strips(weights, biases, bias_mask, dilations), y)
    return y


def backward(
    grad_output: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *,
    bias_mask: Sequence[bool], dilations: Sequence[int], output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in [x, weights..., biases...] where `output_mask` asks for them.

    x's alone is two launches per two stages. With filters the chain's intermediates are recomputed, one launch per
    convolution, and each convolution takes one launch for its input's gradient and two for its own.
    """
    fmt = output_format(x)
    g, x = grad_output.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    strips = _strips(weights, biases, bias_mask, dilations)
    need_x, need_w = output_mask[0], output_mask[1 : 1 + len(weights)]
    need_present = iter(output_mask[1 + len(weights) :])
    need_b = [next(need_present) if strip.bias is not None else False for strip in strips]
    gx, grads = gradients(g, x, strips, need_x, need_w, need_b)
    out = [gx] if gx is not None else []
    return out + [gw for gw, _ in grads if gw is not None] + [gb for _, gb in grads if gb is not None]


def gradients(
    g: Tensor, x: Tensor, strips: Sequence[Strip], need_x: bool, need_w: Sequence[bool], need_b: Sequence[bool],
    gx: Tensor | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
    """The gradient of a chain of depth-wise convolutions in its input, and in each filter and bias, as asked for.

    gx: where to put the input's, which may be a slice of channels.
    """
    grads: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(strips)
    wanted = [i for i in range(len(strips)) if need_w[i] or need_b[i]]
    if need_x and gx is None:
        gx = torch.empty_like(x)
    if not wanted:
        if need_x and gx.numel() > 0:
            run(g, strips, gx, flip=True)
        return gx, grads
    inputs = [x]
    for strip in strips[: wanted[-1]]:
        inputs.append(torch.empty_like(x))
        depthwise.convolve(inputs[-2], strip.weight, strip.bias, inputs[-1], strip.dilations)
    for i in reversed(range(len(strips))):
        strip = strips[i]
        if i in wanted:
            grads[i] = depthwise.weight_grad(
                g, inputs[i], strip.weight, strip.dilations, need_w[i], need_b[i]
            )
        if need_x or i > wanted[0]:
            below = gx if i == 0 else torch.empty_like(x)
            depthwise.convolve(g, strip.weight, None, below, strip.dilations, flip=True)
            g = below
    return gx, grads
