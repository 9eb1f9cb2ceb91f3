"""depthwise_nchw for channels_last: a thread owns P positions along the filter's main axis x V neighbouring channels.

Filter taps are vectors.
"""

from __future__ import annotations

from ._triton import jit, tl
from .depthwise_nchw import down_columns, first_row
from .phases import put
from .reduce import join_all, total, whole_sectors
from .star import activate, activate_grad


# tile_index gives a thread its row group, vector and whether they are in range; here it is the first of P positions, DA
# apart, on the filter's main axis, the position on the other one, and whether they are in range.
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
    KT: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BG: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
    VEC: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, STAR: tl.constexpr, OUTER: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """conv_nchw for channels_last: channel c of pixel i of image n at n x_batch + i x_pixel VEC + c, C = CV VEC
    channels.

    The filter has KA taps along its main axis, which is H if ALONG_H, and KB along the other; it is stored as
    [KH, KW, C]. KT of the KA are in registers at a time. A thread's positions are S DA apart, those of S neighbouring
    threads between each other, so that they store pixels side by side. gate, grad and gate_grad lie as y does.
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
    a0, b, ok = pixel_tile((pid // tiles) % blocks, GROUPS, LINES, P, S * DA, BG, BL, ALONG_H)
    x_ptr += n * x_batch
    # From one tap to the next. Each address is made of the first: of a chain of additions AMD's compiler asks at every
    # link what the whole may be, which takes it minutes and gigabytes.
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
        for e in tl.static_range((P - 1) * S + KT):
            x = load_pixel(at + e * hop, mask, inside(a + e * DA, LA))
            for p in tl.static_range(P):
                if e - p * S >= 0 and e - p * S < KT:
                    acc = put(acc, p, acc[p] + weights[e - p * S] * x)
    y_ptr += n * y_batch
    at = pixel_offsets(a0, b, c, SA, SB, y_pixel, VEC, WIDE)
    hop = S * DA * SA * y_pixel * VEC
    mask = ok[:, None] & c_ok[None, :]
    for p in tl.static_range(P):
        good = a0 + p * (S * DA) < LA
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
    g_ptr, x_ptr, partial_ptr, N, CV, H, W, GROUPS, LINES, g_batch, g_pixel, x_batch, x_pixel, chunks, depth, splits,
    tiles,
    KA: tl.constexpr, KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, ALONG_H: tl.constexpr,
    KT: tl.constexpr, TB: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, BG: tl.constexpr, BL: tl.constexpr,
    BC: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """wgrad_nchw for channels_last: program (split, channel tile, TB x KT taps) sums `depth` chunks of BG BL groups of
    P pixels: down a column, along a row, and of a square's from line to line.
    """
    BP: tl.constexpr = BG * BL
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
    for chunk in range(split * depth, min(split * depth + depth, N * chunks)):
        n = (chunk // chunks).to(tl.int64)
        block = chunk % chunks
        if KB == 1:  # along the strip first
            block = down_columns(block, LINES, GROUPS, BG, BL)
        a0, b, ok = pixel_tile(block, GROUPS, LINES, P, DA, BG, BL, ALONG_H)
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
    sums = ()
    for t in tl.static_range(TB * KT):
        sums = sums + (tl.sum(acc[t], 0),)
    sums = join_all(sums + (tl.sum(bias, 0),), COLUMNS)
    PAD: tl.constexpr = whole_sectors(TB * KT + 1)
    STEPS: tl.constexpr = ((KB + TB - 1) // TB) * NT
    out = partial_ptr + split.to(tl.int64) * (C * (STEPS * PAD))
    column = tl.arange(0, COLUMNS)
    at = ((c * STEPS + step) * PAD)[:, None] + column[None, :]
    tl.store(out + at, sums, c_ok[:, None] & (column < PAD)[None, :])
