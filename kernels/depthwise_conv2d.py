"""Triton kernels of the depth-wise convolution, strip or square: forward, input gradient, weight and bias gradients.

NCHW: a thread owns R rows x V neighbouring pixels of one plane (see phases.py); filter taps are scalars.
channels_last: a thread owns P positions along the filter's longer axis x V neighbouring channels; filter taps are
vectors. The input gradient is the same kernel with the filter flipped. Weight and bias gradients are summed in two
stages of fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import heuristics
from ._triton import jit, tl
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
from .phases import first_tap, last_tap, load_phases, load_row, needed, put, reach, store_phases
from .reduce import finish, join_all, total
from .star import activate, activate_grad

MAX_TAPS = 63  # along one axis

# -- NCHW -------------------------------------------------------------------------------------------------------------


@jit
def tile_index(block, QW, GROUPS, FLAT: tl.constexpr, BG: tl.constexpr, BQ: tl.constexpr):
    """(row group, vector, in range) of each thread: BG x BQ tiles, or (FLAT) BG BQ consecutive vectors of the plane."""
    i = tl.arange(0, BG * BQ)
    if FLAT:
        i += block * (BG * BQ)
        group = i // QW
        q = i - group * QW
        ok = group < GROUPS
    else:
        tiles = tl.cdiv(QW, BQ)
        group = (block // tiles) * BG + i // BQ
        q = (block % tiles) * BQ + i % BQ
        ok = (group < GROUPS) & (q < QW)
    return group, q, ok


@jit
def first_row(group, R: tl.constexpr, DH: tl.constexpr):
    """First of a group's R rows, which are DH apart, so that neighbouring rows of a group share taps."""
    if R > 1:  # (group // DH) R DH + group % DH
        group += (group // DH) * ((R - 1) * DH)
    return group


@jit
def strip_row(
    acc, x_ptr, at, weights, q, ok, W, QW, FIRST: tl.constexpr, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    M: tl.constexpr, S: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add one row's 1xk convolution at vectors q, q + S, ... (M of them) to acc[FIRST], acc[FIRST + 1], ...

    A vector is loaded once and added to all outputs that it is a tap of before the next one is loaded.
    """
    REACH: tl.constexpr = reach(K, D, V)
    for delta in tl.static_range(-REACH, REACH + S * (M - 1) + 1):
        if needed(delta, K, D, V, M, S):
            x = load_phases(x_ptr, at, q, ok, W, QW, delta, V, VECTOR)
            for m in tl.static_range(M):
                for v in tl.static_range(V):
                    for k in tl.static_range(
                        first_tap(delta - m * S, v, K, D, V), last_tap(delta - m * S, v, K, D, V)
                    ):
                        product = weights[k] * x[(m * S - delta) * V + v + (k - K // 2) * D]
                        acc = put(acc, FIRST + m * V + v, acc[FIRST + m * V + v] + product)
    return acc


@jit
def accumulate(
    x_ptr, w_ptr, h, q, ok, H, W, QW,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    FLIP: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr = 1, S: tl.constexpr = 1, start=0.0,
):  # fmt: skip
    """start + the convolution of one plane at rows h, h + DH, ... (R of them) and vectors q, q + S, ... (M of them,
    which is 1 unless the filter is 1xk) of V pixels: R M V tensors [BLOCK], float32.
    """
    BLOCK: tl.constexpr = h.shape[0]
    REACH: tl.constexpr = reach(KW, DW, V)
    acc = (tl.zeros((BLOCK,), tl.float32) + start,) * (R * M * V)
    if KH == 1 or R > 1:
        weights = ()
        for tap in tl.static_range(KH * KW):
            weights = weights + (tl.load(w_ptr + (KH * KW - 1 - tap if FLIP else tap)).to(tl.float32),)
    if KH == 1:
        for r in tl.static_range(R):
            row = h + r * DH
            at = row.to(tl.int64) * W if WIDE else row * W
            acc = strip_row(
                acc, x_ptr, at, weights, q, ok & (row < H), W, QW, r * M * V, KW, DW, V, M, S, VECTOR
            )
    elif R == 1:
        # A loop over the filter's rows keeps large squares small in code; their columns are unrolled.
        for kh in range(KH):
            row = h + (kh - KH // 2) * DH
            good = ok & (row.to(tl.uint32, bitcast=True) < H)
            at = row.to(tl.int64) * W if WIDE else row * W
            x = load_row(x_ptr, at, q, good, W, QW, KW, DW, V, VECTOR)
            for kw in tl.static_range(KW):
                tap = (KH - 1 - kh) * KW + KW - 1 - kw if FLIP else kh * KW + kw
                weight = tl.load(w_ptr + tap).to(tl.float32)
                for v in tl.static_range(V):
                    acc = put(acc, v, acc[v] + weight * x[REACH * V + v + (kw - KW // 2) * DW])
    else:
        # Every input row is read once and serves all of the R rows that it is a tap of.
        for j in tl.static_range(R + KH - 1):
            row = h + (j - KH // 2) * DH
            good = ok & (row.to(tl.uint32, bitcast=True) < H)
            at = row.to(tl.int64) * W if WIDE else row * W
            x = load_row(x_ptr, at, q, good, W, QW, KW, DW, V, VECTOR)
            for r in tl.static_range(R):
                if j - r >= 0 and j - r < KH:
                    for kw in tl.static_range(KW):
                        for v in tl.static_range(V):
                            product = weights[(j - r) * KW + kw] * x[REACH * V + v + (kw - KW // 2) * DW]
                            acc = put(acc, r * V + v, acc[r * V + v] + product)
    return acc


@jit
def conv_nchw_program(
    pid, x_ptr, w_ptr, bias_ptr, y_ptr, gate_ptr, grad_ptr, gate_grad_ptr, C, H, W, QW, GROUPS,
    x_batch, y_batch, blocks,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, V: tl.constexpr, BG: tl.constexpr, BQ: tl.constexpr, FLAT: tl.constexpr,
    FLIP: tl.constexpr, BIAS: tl.constexpr, STAR: tl.constexpr, OUTER: tl.constexpr,
    VECTOR: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr = 1, S: tl.constexpr = 1,
):  # fmt: skip
    """y = conv(x) + bias for planes of H x W, channel c of image n at n x_batch + c H W (so x may be a channel
    slice).

    QW: vectors per row. GROUPS: row groups per plane. FLIP: the filter flipped, which makes it the input gradient.
    STAR "forward": y = OUTER(GELU(conv(x) + bias) * gate). STAR "backward": from `grad`, the gradient of that, the
    gradients of conv(x) + bias (into y) and of the gate (into gate_grad).
    """
    plane = pid // blocks
    n, c = plane // C, plane % C
    offset = c.to(tl.int64) * H * W
    x_ptr += n.to(tl.int64) * x_batch + offset
    out = n.to(tl.int64) * y_batch + offset
    y_ptr += out
    w_ptr += c * (KH * KW)
    QG = QW if M == 1 else tl.cdiv(QW, M * S) * S  # threads per row
    group, q, ok = tile_index(pid % blocks, QG, GROUPS, FLAT, BG, BQ)
    h = first_row(group, R, DH)
    if M > 1:
        q = first_row(q, M, S)
        ok = ok & (q < QW)
    start = 0.0
    if BIAS:
        start = tl.load(bias_ptr + c).to(tl.float32)
    acc = accumulate(x_ptr, w_ptr, h, q, ok, H, W, QW, KH, KW, DH, DW, R, V, FLIP, VECTOR, WIDE, M, S, start)
    for i in tl.static_range(R * M):
        row = h + (i // M) * DH
        good = ok & (row < H)
        qm = q + (i % M) * S
        if i % M > 0:
            good = good & (qm < QW)
        at = row.to(tl.int64) * W if WIDE else row * W
        y = acc[i * V : i * V + V]
        if STAR != "none":
            gate = load_phases(gate_ptr + out, at, qm, good, W, QW, 0, V, VECTOR)
            if STAR == "forward":
                z = ()
                for v in tl.static_range(V):
                    z = z + (activate(activate(y[v], "gelu") * gate[v], OUTER),)
                y = z
            else:
                grad = load_phases(grad_ptr + out, at, qm, good, W, QW, 0, V, VECTOR)
                z = ()
                gate_grad = ()
                for v in tl.static_range(V):
                    a = activate(y[v], "gelu")
                    g = activate_grad(a * gate[v], grad[v], OUTER)
                    gate_grad = gate_grad + (g * a,)
                    z = z + (activate_grad(y[v], g * gate[v], "gelu"),)
                y = z
                store_phases(gate_grad_ptr + out, at, qm, good, W, gate_grad, V, VECTOR)
        store_phases(y_ptr, at, qm, good, W, y, V, VECTOR)


@jit
def conv_nchw(
    x_ptr, w_ptr, bias_ptr, y_ptr, gate_ptr, grad_ptr, gate_grad_ptr, C, H, W, QW, GROUPS, x_batch, y_batch, blocks,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, V: tl.constexpr, BG: tl.constexpr, BQ: tl.constexpr, FLAT: tl.constexpr,
    FLIP: tl.constexpr, BIAS: tl.constexpr, STAR: tl.constexpr, OUTER: tl.constexpr,
    VECTOR: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One launch of conv_nchw_program, a program for each plane and block."""
    conv_nchw_program(
        tl.program_id(0),
        x_ptr, w_ptr, bias_ptr, y_ptr, gate_ptr, grad_ptr, gate_grad_ptr, C, H, W, QW, GROUPS, x_batch,
        y_batch, blocks, KH, KW, DH, DW, R, V, BG, BQ, FLAT, FLIP, BIAS, STAR, OUTER, VECTOR, WIDE, M, S,
    )  # fmt: skip


@jit
def strip_row_grad(
    acc, g, x, TAP: tl.constexpr, FIRST: tl.constexpr, DELTA: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Add to acc[TAP], acc[TAP + 1], ... (K taps) what vector `DELTA` of a row, x, gives with g[FIRST] ... (M V)."""
    for m in tl.static_range(M):
        for v in tl.static_range(V):
            for k in tl.static_range(
                first_tap(DELTA - m * S, v, K, D, V), last_tap(DELTA - m * S, v, K, D, V)
            ):
                product = g[FIRST + m * V + v] * x[(m * S - DELTA) * V + v + (k - K // 2) * D]
                acc = put(acc, TAP + k, acc[TAP + k] + product)
    return acc


@jit
def wgrad_nchw(
    g_ptr, x_ptr, partial_ptr, N, C, H, W, QW, GROUPS, g_batch, x_batch, chunks, splits,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, TH: tl.constexpr, COLUMNS: tl.constexpr,
    R: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """First stage of the weight gradient: sums of g * (shifted x) over CHUNKS chunks of BLOCK row-group vectors.

    Program (split, channel, TH filter rows) adds up TH KW taps, and g itself for the bias. It writes them into row
    `split` of partial [splits, C KH KW + C], which is laid out as the weight, then the bias. COLUMNS: a power of two,
    at least TH KW. chunks: per plane. splits: ceil(N chunks / CHUNKS).
    """
    pid = tl.program_id(0)
    split = pid % splits
    c = (pid // splits) % C
    tile = pid // splits // C
    REACH: tl.constexpr = reach(KW, DW, V)
    QG = QW if M == 1 else tl.cdiv(QW, M * S) * S
    acc = (tl.zeros((BLOCK,), tl.float32),) * (TH * KW)
    bias = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(split * CHUNKS, min(split * CHUNKS + CHUNKS, N * chunks)):
        n = chunk // chunks
        offset = c.to(tl.int64) * H * W
        g_plane = g_ptr + (n.to(tl.int64) * g_batch + offset)
        x_plane = x_ptr + (n.to(tl.int64) * x_batch + offset)
        group, q, ok = tile_index(chunk % chunks, QG, GROUPS, True, BLOCK, 1)
        h = first_row(group, R, DH)
        if M > 1:
            q = first_row(q, M, S)
            ok = ok & (q < QW)
        g = ()
        for r in tl.static_range(R):
            row = h + r * DH
            at = row.to(tl.int64) * W if WIDE else row * W
            for m in tl.static_range(M):
                g = g + load_phases(g_plane, at, q, ok & (row < H), W, QW, m * S, V, VECTOR)
        if tile == 0:
            bias += total(g)
        for j in tl.static_range(R + TH - 1):
            row = h + (tile * TH + j - KH // 2) * DH
            good = ok & (row.to(tl.uint32, bitcast=True) < H)
            at = row.to(tl.int64) * W if WIDE else row * W
            for delta in tl.static_range(-REACH, REACH + S * (M - 1) + 1):
                if needed(delta, KW, DW, V, M, S):
                    x = load_phases(x_plane, at, q, good, W, QW, delta, V, VECTOR)
                    for r in tl.static_range(R):
                        if j - r >= 0 and j - r < TH:
                            acc = strip_row_grad(acc, g, x, (j - r) * KW, r * M * V, delta, KW, DW, V, M, S)
    sums = tl.sum(join_all(acc, COLUMNS), 0)
    row = partial_ptr + split.to(tl.int64) * (C * (KH * KW + 1))
    column = tl.arange(0, COLUMNS)
    tap = tile * (TH * KW) + column
    tl.store(row + c * (KH * KW) + tap, sums, (column < TH * KW) & (tap < KH * KW))
    if tile == 0:
        tl.store(row + C * (KH * KW) + c, tl.sum(bias, 0))


# -- channels_last ----------------------------------------------------------------------------------------------------


@jit
def pixel_groups(block, S, F, P: tl.constexpr, DA: tl.constexpr, BP: tl.constexpr, ALONG_H: tl.constexpr):
    """(first position on the filter's main axis, position on the other one, in range) of BP groups of P positions.

    F: extent of the faster index (columns or groups of columns), S: of the slower one. The P positions are DA apart.
    """
    i = block * BP + tl.arange(0, BP)
    slow = i // F
    fast = i - slow * F
    group = slow if ALONG_H else fast
    group = first_row(group, P, DA)
    return group, fast if ALONG_H else slow, slow < S


@jit
def pixel_tile(
    block,
    GROUPS,
    LINES,
    P: tl.constexpr,
    DA: tl.constexpr,
    BG: tl.constexpr,
    BL: tl.constexpr,
    ALONG_H: tl.constexpr,
):
    """The same for tiles of BG groups by BL lines, of GROUPS and LINES; neighbouring threads are neighbours along W."""
    i = tl.arange(0, BG * BL)
    tiles = tl.cdiv(LINES, BL)
    if ALONG_H:
        group, line = i // BL, i % BL
    else:
        group, line = i % BG, i // BG
    group += (block // tiles) * BG
    line += (block % tiles) * BL
    return first_row(group, P, DA), line, (group < GROUPS) & (line < LINES)


@jit
def inside(a, L):
    """Whether 0 <= a < L: negative numbers are large without their sign."""
    return a.to(tl.uint32, bitcast=True) < L


@jit
def pixel_offsets(a, b, c, SA, SB, PS, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Offsets [BP, BC] of channels c of the pixels at (a, b); PS VEC elements per pixel."""
    pixel = a.to(tl.int64) * SA + b * SB if WIDE else a * SA + b * SB
    return (pixel * PS * VEC)[:, None] + c[None, :]


@jit
def load_pixel(ptr, mask, ok):
    """The channels at ptr [BP, BC] as float32; zero where mask [BP, BC] or ok [BP] is false."""
    return tl.load(ptr, mask & ok[:, None], other=0.0).to(tl.float32)


@jit
def store_pixel(ptr, mask, ok, x):
    """Store x [BP, BC] at ptr where mask [BP, BC] and ok [BP] are true."""
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask & ok[:, None])


@jit
def conv_nhwc(
    x_ptr, w_ptr, bias_ptr, y_ptr, gate_ptr, grad_ptr, gate_grad_ptr, CV, H, W, GROUPS, LINES,
    x_batch, x_pixel, y_batch, y_pixel, blocks, tiles,
    KA: tl.constexpr, KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, ALONG_H: tl.constexpr,
    KT: tl.constexpr, P: tl.constexpr, BG: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
    FLIP: tl.constexpr, BIAS: tl.constexpr, STAR: tl.constexpr, OUTER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """conv_nchw for channels_last: channel c of pixel i of image n at n x_batch + i x_pixel VEC + c, C = CV VEC
    channels.

    The filter has KA taps along its main axis, which is H if ALONG_H, and KB along the other; it is stored as
    [KH, KW, C]. KT of the KA are in registers at a time. gate, grad and gate_grad lie as y does.
    """
    BP: tl.constexpr = BG * BL
    NT: tl.constexpr = (KA + KT - 1) // KT
    pid = tl.program_id(0)
    n = (pid // tiles // blocks).to(tl.int64)
    c = (pid % tiles) * BC + tl.arange(0, BC)
    C = CV * VEC
    c_ok = c < C
    LA, LB, SA, SB = W, H, 1, W
    if ALONG_H:
        LA, LB, SA, SB = H, W, W, 1
    a0, b, ok = pixel_tile((pid // tiles) % blocks, GROUPS, LINES, P, DA, BG, BL, ALONG_H)
    x_ptr += n * x_batch
    # From one of a thread's positions to the next. Each address is made of the first: of a chain of additions AMD's
    # compiler asks at every link what the whole may be, which takes it minutes and gigabytes.
    hop = DA * SA * x_pixel * VEC
    start = tl.zeros((BP, BC), tl.float32)
    if BIAS:
        start += tl.load(bias_ptr + c, c_ok).to(tl.float32)[None, :]
    acc = (start,) * P
    for step in range(KB * NT):
        kb = step // NT
        first = (step % NT) * KT
        bb = b + (kb - KB // 2) * DB
        weights = ()
        for t in tl.static_range(KT):
            tap = (first + t) * KB + kb if ALONG_H else kb * KA + first + t
            if FLIP:
                tap = KA * KB - 1 - tap
            if KA % KT == 0:  # what a channel out of range gets is stored nowhere
                weight = tl.load(w_ptr + (tap * C + c), c_ok)
            else:
                weight = tl.load(w_ptr + (tap * C + c), c_ok & (first + t < KA), other=0.0)
            weights = weights + (weight.to(tl.float32)[None, :],)
        mask = (ok & inside(bb, LB))[:, None] & c_ok[None, :]
        a = a0 + (first - KA // 2) * DA
        at = x_ptr + pixel_offsets(a, bb, c, SA, SB, x_pixel, VEC, WIDE)
        for e in tl.static_range(P + KT - 1):
            x = load_pixel(at + e * hop, mask, inside(a + e * DA, LA))
            for p in tl.static_range(P):
                if e - p >= 0 and e - p < KT:
                    acc = put(acc, p, acc[p] + weights[e - p] * x)
    y_ptr += n * y_batch
    at = pixel_offsets(a0, b, c, SA, SB, y_pixel, VEC, WIDE)
    hop = DA * SA * y_pixel * VEC
    mask = ok[:, None] & c_ok[None, :]
    for p in tl.static_range(P):
        good = a0 + p * DA < LA
        here = at + p * hop
        y = acc[p]
        if STAR != "none":
            gate = load_pixel(gate_ptr + n * y_batch + here, mask, good)
            if STAR == "forward":
                y = activate(activate(y, "gelu") * gate, OUTER)
            else:
                g = load_pixel(grad_ptr + n * y_batch + here, mask, good)
                act = activate(y, "gelu")
                g = activate_grad(act * gate, g, OUTER)
                store_pixel(gate_grad_ptr + n * y_batch + here, mask, good, g * act)
                y = activate_grad(y, g * gate, "gelu")
        store_pixel(y_ptr + here, mask, good, y)


@jit
def wgrad_nhwc(
    g_ptr, x_ptr, partial_ptr, N, CV, H, W, S, F, g_batch, g_pixel, x_batch, x_pixel, chunks, splits, tiles,
    KA: tl.constexpr, KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, ALONG_H: tl.constexpr,
    KT: tl.constexpr, TB: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
    CHUNKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """wgrad_nchw for channels_last: program (split, channel tile, TB x KT taps) sums CHUNKS chunks of BP groups of P
    pixels.
    """
    NT: tl.constexpr = (KA + KT - 1) // KT
    pid = tl.program_id(0)
    tile = pid % tiles
    split = (pid // tiles) % splits
    step = pid // tiles // splits
    kb = (step // NT) * TB
    first = (step % NT) * KT
    c = tile * BC + tl.arange(0, BC)
    C = CV * VEC
    c_ok = c < C
    LA, LB, SA, SB = W, H, 1, W
    if ALONG_H:
        LA, LB, SA, SB = H, W, W, 1
    acc = (tl.zeros((BP, BC), tl.float32),) * (TB * KT)
    bias = tl.zeros((BP, BC), tl.float32)
    g_hop, x_hop = DA * SA * g_pixel * VEC, DA * SA * x_pixel * VEC
    for chunk in range(split * CHUNKS, min(split * CHUNKS + CHUNKS, N * chunks)):
        n = (chunk // chunks).to(tl.int64)
        a0, b, ok = pixel_groups(chunk % chunks, S, F, P, DA, BP, ALONG_H)
        at = g_ptr + n * g_batch + pixel_offsets(a0, b, c, SA, SB, g_pixel, VEC, WIDE)
        mask = ok[:, None] & c_ok[None, :]
        g = ()
        for p in tl.static_range(P):
            g = g + (load_pixel(at + p * g_hop, mask, a0 + p * DA < LA),)
        if step == 0:
            bias += total(g)
        a = a0 + (first - KA // 2) * DA
        for row in tl.static_range(TB):
            bb = b + (kb + row - KB // 2) * DB
            at = x_ptr + n * x_batch + pixel_offsets(a, bb, c, SA, SB, x_pixel, VEC, WIDE)
            mask = (ok & inside(bb, LB))[:, None] & c_ok[None, :]
            for e in tl.static_range(P + KT - 1):
                x = load_pixel(at + e * x_hop, mask, inside(a + e * DA, LA))
                for p in tl.static_range(P):
                    if e - p >= 0 and e - p < KT:
                        acc = put(acc, row * KT + e - p, acc[row * KT + e - p] + g[p] * x)
    # As wgrad_nchw's: row `split` of [splits, C taps + C], the weight's layout first, then the bias's.
    out = partial_ptr + split.to(tl.int64) * (C * (KA * KB + 1))
    for t in tl.static_range(TB * KT):
        at = c * (KA * KB) + (kb + t // KT) * KA + first + t % KT
        tl.store(out + at, tl.sum(acc[t], 0), c_ok & (first + t % KT < KA))
    if step == 0:
        tl.store(out + C * (KA * KB) + c, tl.sum(bias, 0), c_ok)


# -- launches ---------------------------------------------------------------------------------------------------------


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
    s = heuristics.conv_nhwc(KA, KB, length, DA, C, channel_vector(x, y, *extra), along_h)
    taps = weight.reshape(C, KH * KW).t().contiguous()
    groups = ceil_div(length, s.P * DA) * DA if s.P > 1 else length
    blocks, tiles = ceil_div(groups, s.BG) * ceil_div(lines, s.BL), ceil_div(C, s.BC)
    launch(conv_nhwc, (N * blocks * tiles,), x, taps, taps if bias is None else bias.contiguous(), y, *extra,
           C // s.VEC, H, W, groups, lines, x.stride(0), pixel_stride(x) // s.VEC, y.stride(0),
           pixel_stride(y) // s.VEC, blocks, tiles, KA=KA, KB=KB, DA=DA, DB=DB, ALONG_H=along_h, KT=s.KT, P=s.P,
           BG=s.BG, BL=s.BL, BC=s.BC, VEC=s.VEC, **flags, num_warps=s.warps)  # fmt: skip


def weight_grad(
    g: Tensor, x: Tensor, weight: Tensor, dilation: Sequence[int], need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the filter and of the bias (as asked for) from the output's gradient g and the input x; two
    launches.

    The workspace is splits x C (taps + 1) floats. Empty images give zeros.
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
        chunks = ceil_div(groups * QG, s.BLOCK)
        splits = ceil_div(N * chunks, s.CHUNKS)
        partial = x.new_empty((splits, C * (taps + 1)), dtype=torch.float32)
        launch(wgrad_nchw, (splits * C * ceil_div(KH, s.TH),), g, x, partial, N, C, H, W, QW, groups, g.stride(0),
               x.stride(0), chunks, splits, KH=KH, KW=KW, DH=DH, DW=DW, TH=s.TH, COLUMNS=s.COLUMNS, R=s.R, V=s.V,
               BLOCK=s.BLOCK, CHUNKS=s.CHUNKS, VECTOR=s.VECTOR, M=s.M, S=s.S, WIDE=wide, num_warps=s.warps)  # fmt: skip
    else:
        along_h = KW == 1 and KH > 1
        KA, KB, DA, DB = (KH, 1, DH, 1) if along_h else (KW, KH, DW, DH)
        length = H if along_h else W
        s = heuristics.wgrad_nhwc(KA, KB, length, DA, C, channel_vector(x, g))
        groups = ceil_div(length, s.P * DA) * DA if s.P > 1 else length
        slow, fast = (groups, W) if along_h else (H, groups)
        chunks, tiles = ceil_div(slow * fast, s.BP), ceil_div(C, s.BC)
        splits = ceil_div(N * chunks, s.CHUNKS)
        partial = x.new_empty((splits, C * (taps + 1)), dtype=torch.float32)
        steps = (KB // s.TB) * ceil_div(KA, s.KT)
        launch(wgrad_nhwc, (splits * tiles * steps,), g, x, partial, N, C // s.VEC, H, W, slow, fast, g.stride(0),
               pixel_stride(g) // s.VEC, x.stride(0), pixel_stride(x) // s.VEC, chunks, splits, tiles,
               KA=KA, KB=KB, DA=DA, DB=DB, ALONG_H=along_h, KT=s.KT, TB=s.TB, P=s.P, BP=s.BP, BC=s.BC, VEC=s.VEC,
               CHUNKS=s.CHUNKS, WIDE=wide, num_warps=s.warps)  # fmt: skip
    finish(partial, gw, gb)
    return (gw if need_weight else None), (gb if need_bias else None)


# -- the op -----------------------------------------------------------------------------------------------------------


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
