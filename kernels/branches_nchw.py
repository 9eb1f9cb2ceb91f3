"""Depth-wise convolutions of several branches in one NCHW launch: a program takes one job of a table by its number.

A job (see branches.py) is one convolution of a slice of channels, or two strips along the same axis. Of two strips a
program owns whole rows or whole columns: it writes the first one's result to memory, meets itself at a barrier, and
reads it back from cache.
"""

from __future__ import annotations

from ._triton import jit, tl
from .depthwise_nchw import accumulate, first_row
from .phases import compile_time, load_phases, put, store_phases


@compile_time
def kind_of(job):
    """Which pixels a program of a job owns, by name; its table has the number, since tuples take no strings."""
    return ("square", "rows", "columns")[job[0]]


@compile_time
def length(jobs):
    """How many jobs a table has."""
    return len(jobs)


@jit
def groups_of(extent, R: tl.constexpr, D: tl.constexpr):
    """Groups of R positions, D apart, that cover an axis."""
    groups = extent
    if R > 1:
        groups = tl.cdiv(extent, R * D) * D
    return groups


@jit
def rounds_of(items, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    """How often a program of BLOCK threads goes around to see all items; 1 at compile time unless LOOP."""
    steps = 1
    if LOOP:
        steps = tl.cdiv(items, BLOCK)
    return steps


@jit
def locate(block, step, H, QW, KIND: tl.constexpr, LINES: tl.constexpr, R: tl.constexpr, DH: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """(first of R rows, vector, in range) of each thread in one step of a program.

    A program of "square" owns BLOCK consecutive vectors of a plane, of "rows" as many groups of R whole rows as BLOCK
    holds, of "columns" LINES vectors of all rows.
    """
    groups = groups_of(H, R, DH)
    i = tl.arange(0, BLOCK)
    if KIND == "square":
        i += block * BLOCK
        group = i // QW
        q = i - group * QW
        ok = group < groups
    elif KIND == "rows":
        rows = tl.maximum(BLOCK // QW, 1)
        i += step * BLOCK
        local = i // QW
        q = i - local * QW
        group = block * rows + local
        ok = (local < rows) & (group < groups)
    else:
        group = step * (BLOCK // LINES) + i // LINES
        q = block * LINES + i % LINES
        ok = (group < groups) & (q < QW)
    return first_row(group, R, DH), q, ok


@jit
def convolve_step(
    x_ptr, y_ptr, w_ptr, bias_ptr, field_bias_ptr, field_ptr, block, step, H, W, QW,
    KIND: tl.constexpr, LINES: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, FIELD: tl.constexpr, ADD: tl.constexpr,
    IN_PLACE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One step of y [+]= w * x [+ field_bias field] [+ bias] on one plane; IN_PLACE: y is x, read before written."""
    h, q, ok = locate(block, step, H, QW, KIND, LINES, R, DH, BLOCK)
    acc = accumulate(x_ptr, w_ptr, h, q, ok, H, W, QW, KH, KW, DH, DW, R, V, FLIP, VECTOR, WIDE)
    if FIELD:
        shift = tl.load(field_bias_ptr).to(tl.float32)
        field = load_phases(field_ptr, 0 * q, q, ok, W, QW, 0, V, VECTOR)
        for i in tl.static_range(R * V):
            acc = put(acc, i, acc[i] + shift * field[i % V])
    if BIAS:
        bias = tl.load(bias_ptr).to(tl.float32)
        for i in tl.static_range(R * V):
            acc = put(acc, i, acc[i] + bias)
    if IN_PLACE:
        tl.debug_barrier()
    for r in tl.static_range(R):
        row = h + r * DH
        at = row.to(tl.int64) * W if WIDE else row * W
        good = ok & (row < H)
        y = acc[r * V : (r + 1) * V]
        if ADD:
            before = load_phases(y_ptr, at, q, good, W, QW, 0, V, VECTOR)
            for v in tl.static_range(V):
                y = put(y, v, y[v] + before[v])
        store_phases(y_ptr, at, q, good, W, y, V, VECTOR)


@jit
def write_field(w_ptr, field_ptr, step, W, QW, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
                BLOCK: tl.constexpr, FLIP: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """What a 1xk filter makes of a row of ones, W floats: where taps fall outside of the image it is less."""
    q = step * BLOCK + tl.arange(0, BLOCK)
    field = (tl.zeros((BLOCK,), tl.float32),) * V
    for k in tl.static_range(K):
        weight = tl.load(w_ptr + (K - 1 - k if FLIP else k)).to(tl.float32)
        for v in tl.static_range(V):
            column = q * V + (v + (k - K // 2) * D)
            inside = column.to(tl.uint32, bitcast=True) < W
            field = put(field, v, field[v] + tl.where(inside, weight, 0.0))
    store_phases(field_ptr, 0 * q, q, q < QW, W, field, V, VECTOR)


@jit
def run_job(
    pid, blocks, buffers, pointers, field_ptr, C, H, W, QW,
    JOBS: tl.constexpr, J: tl.constexpr, FLIP: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program `pid` of a job, which has `blocks` programs for each plane."""
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
    R: tl.constexpr = JOBS[J][12]
    LINES: tl.constexpr = JOBS[J][13]
    LOOP: tl.constexpr = JOBS[J][15]
    BIAS1: tl.constexpr = JOBS[J][16]
    FIELD: tl.constexpr = JOBS[J][17]
    BIAS2: tl.constexpr = JOBS[J][18]
    ADD: tl.constexpr = JOBS[J][19]
    WRITE_FIELD: tl.constexpr = JOBS[J][20]
    w1_ptr, w2_ptr, b1_ptr, field_bias_ptr, b2_ptr = pointers
    plane = pid // blocks
    block = pid % blocks
    n, c = plane // CHANNELS, plane % CHANNELS
    # Whole vectors in a row, then this product tells the compiler that planes start at multiples of V.
    offset = (n * C + FIRST_CHANNEL + c).to(tl.int64) * H * (QW * V if VECTOR else W)
    source = buffers[SRC] + offset
    result = buffers[DST] + offset
    field_ptr += (FIRST_CHANNEL + c).to(tl.int64) * (QW * V if VECTOR else W)
    if KIND == "columns":
        steps = rounds_of(groups_of(H, R, DH) * LINES, BLOCK, LOOP)
    else:
        steps = rounds_of(QW, BLOCK, LOOP)
    if K2 == 0:
        for step in range(steps):
            convolve_step(
                source, result, w1_ptr + c * (KH * KW), b2_ptr + c, b2_ptr, field_ptr, block, step, H, W, QW,
                KIND, LINES, KH, KW, DH, DW, R, FLIP, BIAS2, False, ADD, False, V, BLOCK, VECTOR, WIDE,
            )  # fmt: skip
    else:
        middle = buffers[TMP] + offset
        for step in range(steps):
            convolve_step(
                source, middle, w1_ptr + c * (KH * KW), b1_ptr + c, field_bias_ptr + c, field_ptr, block, step, H, W,
                QW, KIND, LINES, KH, KW, DH, DW, R, FLIP, BIAS1, FIELD, False, False, V, BLOCK, VECTOR, WIDE,
            )  # fmt: skip
        tl.debug_barrier()  # what other threads of the program wrote is read from here on
        KH2: tl.constexpr = 1 if KIND == "rows" else K2
        KW2: tl.constexpr = K2 if KIND == "rows" else 1
        DH2: tl.constexpr = 1 if KIND == "rows" else D2
        DW2: tl.constexpr = D2 if KIND == "rows" else 1
        if KIND == "columns":
            steps = rounds_of(groups_of(H, R, DH2) * LINES, BLOCK, LOOP)
        for step in range(steps):
            convolve_step(
                middle, result, w2_ptr + c * K2, b2_ptr + c, b2_ptr, field_ptr, block, step, H, W, QW,
                KIND, LINES, KH2, KW2, DH2, DW2, R, FLIP, BIAS2, False, ADD, TMP == DST, V, BLOCK, VECTOR, WIDE,
            )  # fmt: skip
        if WRITE_FIELD:  # noqa: SIM102 - known at compile time, the condition inside is not
            if (n == 0) & (block == 0):
                for step in range(steps):
                    write_field(w2_ptr + c * K2, field_ptr, step, W, QW, K2, D2, V, BLOCK, FLIP, VECTOR)


@jit
def branches_nchw(
    a_ptr, b_ptr, c_ptr, d_ptr, field_ptr,
    w1_0, w2_0, b1_0, bf_0, b2_0, w1_1, w2_1, b1_1, bf_1, b2_1,
    w1_2, w2_2, b1_2, bf_2, b2_2, w1_3, w2_3, b1_3, bf_3, b2_3,
    blocks_0, blocks_1, blocks_2, blocks_3, N, C, H, W, QW,
    JOBS: tl.constexpr, FLIP: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Up to four jobs on N images of C planes of H x W, in QW vectors of V pixels a row; FLIP: all filters flipped.

    a .. d: the tensors that the table numbers. w1, w2: a job's filters. b1: the bias between them, bf the one that is
    multiplied by the field [C, W], b2 the last. blocks: a job's programs for each plane.
    """
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
        programs = N * JOBS[j][2] * blocks[j]
        if (pid >= first) & (pid < first + programs):
            run_job(
                pid - first, blocks[j], buffers, pointers[j], field_ptr, C, H, W, QW, JOBS, j, FLIP, V, BLOCK, VECTOR,
                WIDE,
            )  # fmt: skip
        first += programs
