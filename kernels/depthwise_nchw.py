"""Depth-wise convolution of NCHW planes and its weight gradient: a thread owns R rows x V neighbouring pixels.

See phases.py for how a row is read; filter taps are scalars. The input gradient is the same kernel with the filter
flipped. Weight and bias gradients are summed in two stages of fixed order.
"""

from __future__ import annotations

from ._triton import jit, tl
from .phases import first_tap, last_tap, load_phases, load_row, needed, put, reach, store_phases
from .reduce import join_all, total, whole_sectors
from .star import activate, activate_grad

# The longest strip of a known model.
UNROLLED = tl.constexpr(35) if tl is not None else 35


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
def down_columns(block, QW, GROUPS, BG: tl.constexpr, BQ: tl.constexpr):
    """The number that tile_index has for tile `block` of those counted down each stripe of BQ vectors."""
    down = tl.cdiv(GROUPS, BG)
    return block % down * tl.cdiv(QW, BQ) + block // down


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
def tap_weight(w_ptr, tap, TAPS: tl.constexpr, FLIP: tl.constexpr):
    """One weight of a filter of TAPS taps."""
    return tl.load(w_ptr + (TAPS - 1 - tap if FLIP else tap)).to(tl.float32)


@jit
def vector_taps(
    acc, x_ptr, w_ptr, h, q, ok, delta, H, W, QW, K: tl.constexpr, DH: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    PARTIAL: tl.constexpr, FLIP: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the taps of an undilated 1xK filter that fall into vector q + delta of each of R rows.

    PARTIAL: delta, known at compile time, is so far out that only some of the 2 V - 1 distances to it are taps.
    """
    x = ()
    for r in tl.static_range(R):
        row = h + r * DH
        at = row.to(tl.int64) * W if WIDE else row * W
        near = q + delta
        good = ok & (row < H) & (near.to(tl.uint32, bitcast=True) < QW)
        x = x + load_phases(x_ptr, at, near, good, W, QW, 0, V, VECTOR)
    for e in tl.static_range(1 - V, V):
        if not PARTIAL or (delta * V + e >= -(K // 2) and delta * V + e <= K // 2):
            weight = tap_weight(w_ptr, delta * V + e + K // 2, K, FLIP)
            for r in tl.static_range(R):
                for v in tl.static_range(max(0, -e), min(V, V - e)):
                    acc = put(acc, r * V + v, acc[r * V + v] + weight * x[r * V + v + e])
    return acc


@jit
def row_taps(
    acc, x_ptr, w_ptr, h, q, ok, j, H, W, QW, K: tl.constexpr, DH: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    PARTIAL: tl.constexpr, FLIP: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the j-th row that a Kx1 filter at R rows meets, which is tap j - r of row r.

    PARTIAL: j, known at compile time, is so far out that it is no tap of some rows.
    """
    row = h + (j - K // 2) * DH
    good = ok & (row.to(tl.uint32, bitcast=True) < H)
    at = row.to(tl.int64) * W if WIDE else row * W
    x = load_phases(x_ptr, at, q, good, W, QW, 0, V, VECTOR)
    for r in tl.static_range(R):
        if not PARTIAL or (j - r >= 0 and j - r < K):
            weight = tap_weight(w_ptr, j - r, K, FLIP)
            for v in tl.static_range(V):
                acc = put(acc, r * V + v, acc[r * V + v] + weight * x[v])
    return acc


@jit
def accumulate_long(
    x_ptr, w_ptr, h, q, ok, H, W, QW, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, R: tl.constexpr,
    V: tl.constexpr, FLIP: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, start,
):  # fmt: skip
    """What `accumulate` makes of a long strip (1xk undilated), in loops over its vectors or rows."""
    BLOCK: tl.constexpr = h.shape[0]
    acc = (tl.zeros((BLOCK,), tl.float32) + start,) * (R * V)
    if KH == 1:
        REACH: tl.constexpr = reach(KW, 1, V)
        WHOLE: tl.constexpr = (KW // 2 + 1 - V) // V  # up to this distance a vector has taps of all distances
        for delta in tl.static_range(-REACH, -WHOLE):
            acc = vector_taps(
                acc, x_ptr, w_ptr, h, q, ok, delta, H, W, QW, KW, DH, R, V, True, FLIP, VECTOR, WIDE
            )
        for delta in range(-WHOLE, WHOLE + 1):
            acc = vector_taps(
                acc, x_ptr, w_ptr, h, q, ok, delta, H, W, QW, KW, DH, R, V, False, FLIP, VECTOR, WIDE
            )
        for delta in tl.static_range(WHOLE + 1, REACH + 1):
            acc = vector_taps(
                acc, x_ptr, w_ptr, h, q, ok, delta, H, W, QW, KW, DH, R, V, True, FLIP, VECTOR, WIDE
            )
    else:
        for j in tl.static_range(R - 1):
            acc = row_taps(acc, x_ptr, w_ptr, h, q, ok, j, H, W, QW, KH, DH, R, V, True, FLIP, VECTOR, WIDE)
        for j in range(R - 1, KH):
            acc = row_taps(acc, x_ptr, w_ptr, h, q, ok, j, H, W, QW, KH, DH, R, V, False, FLIP, VECTOR, WIDE)
        for j in tl.static_range(KH, R + KH - 1):
            acc = row_taps(acc, x_ptr, w_ptr, h, q, ok, j, H, W, QW, KH, DH, R, V, True, FLIP, VECTOR, WIDE)
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
    if (KW == 1 and KH > UNROLLED) or (KH == 1 and KW > UNROLLED and DW == 1 and M == 1):
        acc = accumulate_long(x_ptr, w_ptr, h, q, ok, H, W, QW, KH, KW, DH, R, V, FLIP, VECTOR, WIDE, start)
    else:
        acc = accumulate(
            x_ptr, w_ptr, h, q, ok, H, W, QW, KH, KW, DH, DW, R, V, FLIP, VECTOR, WIDE, M, S, start
        )
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
    g_ptr, x_ptr, partial_ptr, N, C, H, W, QW, GROUPS, g_batch, x_batch, chunks, depth, splits,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, TH: tl.constexpr, COLUMNS: tl.constexpr,
    R: tl.constexpr, V: tl.constexpr, BG: tl.constexpr, BQ: tl.constexpr, FLAT: tl.constexpr,
    VECTOR: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """First stage of the weight gradient: sums of g * (shifted x) over `depth` chunks of BG BQ row-group vectors.

    Program (split, channel, TH filter rows) adds up TH KW taps, and g itself for the bias. It writes them into row
    `split` of partial, see Sums. COLUMNS: a power of two, more than TH KW. chunks: per plane. splits: ceil(N chunks /
    depth).
    """
    pid = tl.program_id(0)
    split = pid % splits
    c = (pid // splits) % C
    tile = pid // splits // C
    REACH: tl.constexpr = reach(KW, DW, V)
    QG = QW if M == 1 else tl.cdiv(QW, M * S) * S
    acc = (tl.zeros((BG * BQ,), tl.float32),) * (TH * KW)
    bias = tl.zeros((BG * BQ,), tl.float32)
    for chunk in range(split * depth, min(split * depth + depth, N * chunks)):
        n = chunk // chunks
        offset = c.to(tl.int64) * H * W
        g_plane = g_ptr + (n.to(tl.int64) * g_batch + offset)
        x_plane = x_ptr + (n.to(tl.int64) * x_batch + offset)
        block = chunk % chunks
        if not FLAT:  # down the columns first
            block = down_columns(block, QG, GROUPS, BG, BQ)
        group, q, ok = tile_index(block, QG, GROUPS, FLAT, BG, BQ)
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
    column = tl.arange(0, COLUMNS)
    # The bias by itself: a vector is summed in pairs everywhere, columns one row after the other by the interpreter.
    sums = tl.where(column == TH * KW, tl.sum(bias, 0), tl.sum(join_all(acc, COLUMNS), 0))
    PAD: tl.constexpr = whole_sectors(TH * KW + 1)
    TILES: tl.constexpr = (KH + TH - 1) // TH
    row = partial_ptr + split.to(tl.int64) * (C * (TILES * PAD))
    tl.store(row + (c * TILES + tile) * PAD + column, sums, column < PAD)
