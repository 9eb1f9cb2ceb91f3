"""branches_nchw for channels_last: a thread owns P positions along the filter's longer axis x V neighbouring channels.

Its values are P V tensors, one per position and channel, so that a vector of channels is one load and a tap a register;
a filter is read where it lies, [C, taps], one value for each channel and tap, and a window of P taps is kept.
"""

from __future__ import annotations

from ._triton import jit, tl
from .branches_nchw import groups_of, kind_of, length, rounds_of
from .depthwise_nchw import first_row
from .heuristics import interleaved
from .phases import compile_time, load_phases, put, store_phases


@compile_time
def tiles_of(job, v):
    """Into how many tiles of GROUPS groups of v channels a job's channels are cut."""
    return -(-(job[2] // v) // job[14])


@compile_time
def apart(kind, taps, dilation, pixel_bytes):
    """How far apart, in dilations, the positions of a thread of a job are."""
    return interleaved(taps, dilation, pixel_bytes) if kind == "rows" else 1


@jit
def locate_pixels(
    block, step, H, W, KIND: tl.constexpr, LINES: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(first of P positions, D apart, on the filter's main axis, position on the other, channel group, in range).

    A program of "square" owns BLOCK consecutive items of an image, of "rows" LINES whole rows, of "columns" LINES whole
    columns, each for GROUPS groups of channels, which vary fastest.
    """
    i = step * BLOCK + tl.arange(0, BLOCK)
    if KIND == "square":
        i += block * BLOCK
    channel = i % GROUPS
    i = i // GROUPS
    if KIND == "columns":
        b = i % LINES
        group = i // LINES
        ok = group < groups_of(H, P, D)
        b += block * LINES
        ok = ok & (b < W)
    else:
        groups = groups_of(W, P, D)
        b = i // groups
        group = i - b * groups
        if KIND == "rows":
            ok = b < LINES
            b += block * LINES
            ok = ok & (b < H)
        else:
            ok = b < H
    return first_row(group, P, D), b, channel, ok


@jit
def accumulate_pixels(
    x_ptr, w_ptr, a, b, channel, ok, H, W, PIXEL: tl.constexpr, COLUMNS: tl.constexpr, KA: tl.constexpr,
    KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, P: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    FLIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A convolution at positions a, a + S DA, ... (P of them) on the main axis, columns or rows, and b on the other.

    PIXEL: elements from pixel to pixel. KA taps along the main axis, KB along the other. Returns P V tensors, float32.
    """
    BLOCK: tl.constexpr = a.shape[0]
    acc = (tl.zeros((BLOCK,), tl.float32),) * (P * V)
    extent_a, extent_b, stride_a, stride_b = W, H, 1, W
    if COLUMNS:
        extent_a, extent_b, stride_a, stride_b = H, W, W, 1
    w_ptr += channel * (V * KA * KB)
    rows = KB
    if V <= 2:  # the same, but AMD's compiler cannot know and unroll it: it would spill
        rows = tl.minimum(KB, KB + H)
    for kb in range(rows):
        bb = b + (kb - KB // 2) * DB
        good = ok & (bb.to(tl.uint32, bitcast=True) < extent_b)
        if WIDE:
            row = (a.to(tl.int64) * stride_a + bb.to(tl.int64) * stride_b) * PIXEL
        else:
            row = (a * stride_a + bb * stride_b) * PIXEL
        weights = ()
        for e in tl.static_range((P - 1) * S + KA):
            if e < KA:
                tap = kb * KA + e
                if FLIP:
                    tap = KA * KB - 1 - tap
                for v in tl.static_range(V):
                    weights = weights + (tl.load(w_ptr + (v * KA * KB + tap)).to(tl.float32),)
            position = a + (e - KA // 2) * DA
            inside = good & (position.to(tl.uint32, bitcast=True) < extent_a)
            # The distance is added to the pointer, not to the offset: one 64-bit addition.
            away = (e - KA // 2) * DA * stride_a * PIXEL
            x = load_phases(x_ptr + away, row, channel, inside, PIXEL, 0, 0, V, V > 1)
            for p in tl.static_range(P):
                if e - p * S >= 0 and e - p * S < KA:
                    for v in tl.static_range(V):
                        acc = put(acc, p * V + v, acc[p * V + v] + weights[(e - p * S) * V + v] * x[v])
    return acc


@jit
def load_channels(ptr, channel, V: tl.constexpr):
    """V float32 values of each thread's group of channels."""
    out = ()
    for v in tl.static_range(V):
        out = out + (tl.load(ptr + channel * V + v).to(tl.float32),)
    return out


@jit
def convolve_pixels(
    x_ptr, y_ptr, w_ptr, bias_ptr, field_bias_ptr, field_ptr, block, step, first_group, H, W, PIXEL: tl.constexpr,
    KIND: tl.constexpr, LINES: tl.constexpr, GROUPS: tl.constexpr, ALL_GROUPS: tl.constexpr, KA: tl.constexpr,
    KB: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, P: tl.constexpr, S: tl.constexpr, FLIP: tl.constexpr,
    BIAS: tl.constexpr, FIELD: tl.constexpr, ADD: tl.constexpr, IN_PLACE: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One step of y [+]= w * x [+ field_bias field] [+ bias] on one image; IN_PLACE: y is x, read before written."""
    a, b, channel, ok = locate_pixels(block, step, H, W, KIND, LINES, GROUPS, P, S * DA, BLOCK)
    channel += first_group
    if ALL_GROUPS % GROUPS:
        ok = ok & (channel < ALL_GROUPS)
        channel = tl.minimum(channel, ALL_GROUPS - 1)
    acc = accumulate_pixels(
        x_ptr, w_ptr, a, b, channel, ok, H, W, PIXEL, KIND == "columns", KA, KB, DA, DB, P, S, V, FLIP, WIDE
    )
    if FIELD:
        shift = load_channels(field_bias_ptr, channel, V)
        field = load_phases(field_ptr, b * PIXEL, channel, ok, PIXEL, 0, 0, V, V > 1)
        for i in tl.static_range(P * V):
            acc = put(acc, i, acc[i] + shift[i % V] * field[i % V])
    if BIAS:
        bias = load_channels(bias_ptr, channel, V)
        for i in tl.static_range(P * V):
            acc = put(acc, i, acc[i] + bias[i % V])
    if IN_PLACE:
        tl.debug_barrier()
    for p in tl.static_range(P):
        position = a + p * (S * DA)
        if KIND == "columns":
            good = ok & (position < H)
            pixel = position.to(tl.int64) * W + b if WIDE else position * W + b
        else:
            good = ok & (position < W)
            pixel = b.to(tl.int64) * W + position if WIDE else b * W + position
        y = acc[p * V : (p + 1) * V]
        if ADD:
            before = load_phases(y_ptr, pixel * PIXEL, channel, good, PIXEL, 0, 0, V, V > 1)
            for v in tl.static_range(V):
                y = put(y, v, y[v] + before[v])
        store_phases(y_ptr, pixel * PIXEL, channel, good, PIXEL, y, V, V > 1)


@jit
def write_field_pixels(w_ptr, field_ptr, step, first_group, W, PIXEL: tl.constexpr, GROUPS: tl.constexpr,
                       ALL_GROUPS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
                       BLOCK: tl.constexpr, FLIP: tl.constexpr):  # fmt: skip
    """What a 1xk filter makes of a row of ones, for each column and channel: float32, as a row of the image lies."""
    i = step * BLOCK + tl.arange(0, BLOCK)
    channel = first_group + i % GROUPS
    column = i // GROUPS
    ok = column < W
    if ALL_GROUPS % GROUPS:
        ok = ok & (channel < ALL_GROUPS)
        channel = tl.minimum(channel, ALL_GROUPS - 1)
    w_ptr += channel * (V * K)
    field = (tl.zeros((BLOCK,), tl.float32),) * V
    for k in tl.static_range(K):
        position = column + (k - K // 2) * D
        inside = position.to(tl.uint32, bitcast=True) < W
        for v in tl.static_range(V):
            weight = tl.load(w_ptr + (v * K + (K - 1 - k if FLIP else k))).to(tl.float32)
            field = put(field, v, field[v] + tl.where(inside, weight, 0.0))
    store_phases(field_ptr, column * PIXEL, channel, ok, PIXEL, field, V, V > 1)


@jit
def run_job_nhwc(
    pid, blocks, buffers, pointers, field_ptr, H, W,
    C: tl.constexpr,
    JOBS: tl.constexpr, J: tl.constexpr, FLIP: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program `pid` of a job, which has `blocks` programs for each image and tile of GROUPS groups of V channels."""
    KIND: tl.constexpr = kind_of(JOBS[J])
    FIRST_CHANNEL: tl.constexpr = JOBS[J][1]
    CHANNELS: tl.constexpr = JOBS[J][2]
    SRC: tl.constexpr = JOBS[J][3]
    TMP: tl.constexpr = JOBS[J][4]
    DST: tl.constexpr = JOBS[J][5]
    KH: tl.constexpr = JOBS[J][6]
    KW: tl.constexpr = JOBS[J][7]
    DH: tl.constexpr = JOBS[J][8]
    DW: tl.constexpr = JOBS[J][9]
    K2: tl.constexpr = JOBS[J][10]
    D2: tl.constexpr = JOBS[J][11]
    P: tl.constexpr = JOBS[J][12]
    LINES: tl.constexpr = JOBS[J][13]
    GROUPS: tl.constexpr = JOBS[J][14]
    LOOP: tl.constexpr = JOBS[J][15]
    BIAS1: tl.constexpr = JOBS[J][16]
    FIELD: tl.constexpr = JOBS[J][17]
    BIAS2: tl.constexpr = JOBS[J][18]
    ADD: tl.constexpr = JOBS[J][19]
    WRITE_FIELD: tl.constexpr = JOBS[J][20]
    PIXEL_BYTES: tl.constexpr = C * buffers[0].dtype.element_ty.primitive_bitwidth // 8
    ALL_GROUPS: tl.constexpr = CHANNELS // V
    TILES: tl.constexpr = tiles_of(JOBS[J], V)
    w1_ptr, w2_ptr, b1_ptr, field_bias_ptr, b2_ptr = pointers
    first_group = (pid % TILES) * GROUPS
    block = pid // TILES % blocks
    n = pid // TILES // blocks
    offset = n.to(tl.int64) * H * W * C + FIRST_CHANNEL
    source = buffers[SRC] + offset
    result = buffers[DST] + offset
    field_ptr += FIRST_CHANNEL
    S1: tl.constexpr = apart(KIND, KW, DW, PIXEL_BYTES)
    S2: tl.constexpr = apart(KIND, K2, D2, PIXEL_BYTES)
    if KIND == "columns":
        KA: tl.constexpr = KH
        DA: tl.constexpr = DH
        KB: tl.constexpr = 1
        items = groups_of(H, P, DA) * (LINES * GROUPS)
        items2 = groups_of(H, P, D2) * (LINES * GROUPS)
    else:
        KA: tl.constexpr = KW
        DA: tl.constexpr = DW
        KB: tl.constexpr = KH
        items = groups_of(W, P, S1 * DA) * (LINES * GROUPS)
        items2 = groups_of(W, P, S2 * D2) * (LINES * GROUPS)
    steps = rounds_of(items, BLOCK, LOOP)
    if K2 == 0:
        for step in range(steps):
            convolve_pixels(
                source, result, w1_ptr, b2_ptr, b2_ptr, field_ptr, block, step, first_group, H, W, C, KIND, LINES,
                GROUPS, ALL_GROUPS, KA, KB, DA, DH, P, S1, FLIP, BIAS2, False, ADD, False, V, BLOCK, WIDE,
            )  # fmt: skip
    else:
        middle = buffers[TMP] + offset
        for step in range(steps):
            convolve_pixels(
                source, middle, w1_ptr, b1_ptr, field_bias_ptr, field_ptr, block, step, first_group, H, W, C, KIND,
                LINES, GROUPS, ALL_GROUPS, KA, 1, DA, 1, P, S1, FLIP, BIAS1, FIELD, False, False, V, BLOCK, WIDE,
            )  # fmt: skip
        tl.debug_barrier()  # what other threads of the program wrote is read from here on
        for step in range(rounds_of(items2, BLOCK, LOOP)):
            convolve_pixels(
                middle, result, w2_ptr, b2_ptr, b2_ptr, field_ptr, block, step, first_group, H, W, C, KIND, LINES,
                GROUPS, ALL_GROUPS, K2, 1, D2, 1, P, S2, FLIP, BIAS2, False, ADD, TMP == DST, V, BLOCK, WIDE,
            )  # fmt: skip
        if WRITE_FIELD:  # noqa: SIM102 - known at compile time, the condition inside is not
            if (n == 0) & (block == 0):
                for step in range(tl.cdiv(W * GROUPS, BLOCK)):
                    write_field_pixels(
                        w2_ptr, field_ptr, step, first_group, W, C, GROUPS, ALL_GROUPS, K2, D2, V, BLOCK, FLIP
                    )


@jit
def branches_nhwc(
    a_ptr, b_ptr, c_ptr, d_ptr, field_ptr,
    w1_0, w2_0, b1_0, bf_0, b2_0, w1_1, w2_1, b1_1, bf_1, b2_1,
    w1_2, w2_2, b1_2, bf_2, b2_2, w1_3, w2_3, b1_3, bf_3, b2_3,
    blocks_0, blocks_1, blocks_2, blocks_3, N, H, W,
    C: tl.constexpr, JOBS: tl.constexpr, FLIP: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """branches_nchw for N images of H x W pixels of C channels; blocks: a job's programs for each image and tile."""
    pid = tl.program_id(0)
    buffers = (a_ptr, b_ptr, c_ptr, d_ptr)
    pointers = (
        (w1_0, w2_0, b1_0, bf_0, b2_0),
        (w1_1, w2_1, b1_1, bf_1, b2_1),
        (w1_2, w2_2, b1_2, bf_2, b2_2),
        (w1_3, w2_3, b1_3, bf_3, b2_3),
    )
    blocks = (blocks_0, blocks_1, blocks_2, blocks_3)
    first = 0
    for j in tl.static_range(length(JOBS)):
        programs = N * tiles_of(JOBS[j], V) * blocks[j]
        if (pid >= first) & (pid < first + programs):
            run_job_nhwc(
                pid - first,
                blocks[j],
                buffers,
                pointers[j],
                field_ptr,
                H,
                W,
                C,
                JOBS,
                j,
                FLIP,
                V,
                BLOCK,
                WIDE,
            )
        first += programs
