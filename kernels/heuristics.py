"""Block sizes and warps of every kernel, from channel counts and filter sizes alone.

Image sizes enter only through a few coarse steps: a compiled function with dynamic sizes then guards on a threshold,
and does not recompile for each size. What `tuned` is asked for, a device's settings file may replace.
"""

from __future__ import annotations

from .device_settings import tuned
from .phases import compile_time


def elementwise_block() -> tuple[int, int]:
    """(elements per program, warps) of an element-wise kernel: 8 per thread, 128 bits of a 16-bit type."""
    t = tuned("star", "all", BLOCK=1024, warps=4)
    return t["BLOCK"], t["warps"]


class Settings(dict):
    """Settings of one launch, by name."""

    __getattr__ = dict.__getitem__


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, between low and high."""
    p = low
    while p < n and p < high:
        p *= 2
    return p


PROGRAMS = 1056  # two waves of four programs on each of an H100's 132 multiprocessors


def in_a_row(units: int, most: int, least: int = 1) -> int:
    """How many of so many units of work a program does one after the other: `most`, if enough programs are left."""
    n = most
    while n > least and units < n * PROGRAMS:
        n //= 2
    return n


def row_vector(width: int, itemsize: int, aligned: bool) -> tuple[int, bool]:
    """(pixels V of a thread, whether they are one load): 16 bytes, or 8 of a 16-bit type, where rows allow it."""
    if aligned:
        for v in (16 // itemsize, 4):
            if width % v == 0:
                return v, True
    return 4, False


def row_vectors(kw: int, dw: int, width: int, v: int, itemsize: int) -> tuple[int, int]:
    """(vectors M of a thread along a row, S apart) of a 1xk filter: each loaded vector then serves more outputs.

    Of a long reach (dilated filters) that saves most loads, of a short filter the few that it has are most of the work;
    else M is 1, because loads shifted by an odd number of vectors use half of their sectors. S vectors are a sector of
    32 bytes, so that the threads of a warp read whole sectors where they are not shifted.
    """
    s = max(1, 32 // (v * itemsize))
    m = 16 // v
    worth = kw <= 5 or (dw > 1 and (kw // 2) * dw > 2 * v)
    return (m, s) if worth and width >= 2 * m * s * v else (1, 1)


def conv_nchw(
    kh: int, kw: int, dh: int, width: int, height: int, itemsize: int, aligned: bool, dw: int = 1
) -> Settings:
    """A depth-wise convolution in NCHW.

    1xk: M vectors of one row a thread. Squares: R rows of one vector. 128 threads for consecutive places of a plane.
    kx1: R rows a thread, and programs of whole columns (up to 256 R rows) of four vectors, so that no column is read
    by two programs.
    """
    v, vector = row_vector(width, itemsize, aligned)
    calls = f"{kh}x{kw} d{dh}, {itemsize} bytes"
    if kh == 1:
        m, s = row_vectors(kw, dw, width, v, itemsize)
        r = 1 if height == 1 else (4 if kw <= 5 else itemsize if m == 1 else 1)
        if m > 1:
            t = tuned("conv_nchw_rows", f"{kh}x{kw} d{dw}, {itemsize} bytes", R=r, M=m, warps=4)
            r, m, warps = t["R"], t["M"], t["warps"]
        else:
            warps = 4
        return Settings(V=v, VECTOR=vector, R=r, M=m, S=s, BG=32 * warps, BQ=1, FLAT=True, warps=warps)
    if kw > 1:
        t = tuned("conv_nchw_squares", calls, R=1 if kh * kw > 49 else (4 if kh * kw <= 25 else 2), warps=4)
        return Settings(
            V=v, VECTOR=vector, R=t["R"], M=1, S=1, BG=32 * t["warps"], BQ=1, FLAT=True, warps=t["warps"]
        )
    r = tuned("conv_nchw_columns", calls, R=8 if (kh <= 5 or kh > 35) and height >= 16 * dh else 4)["R"]
    groups = power_of_two(-(-height // (r * dh)) * dh, 8, 64)
    if groups * r < height:  # tall images
        r = 8
        groups = power_of_two(-(-height // (r * dh)) * dh, 64, 256)
    bq = 4 if groups <= 64 else 2
    return Settings(
        V=v, VECTOR=vector, R=r, M=1, S=1, BG=groups, BQ=bq, FLAT=False, warps=max(1, groups * bq // 32)
    )


def wgrad_nchw(kh: int, kw: int, width: int, itemsize: int, aligned: bool, dw: int = 1) -> Settings:
    """First stage of a weight gradient in NCHW: up to 81 taps in registers, CHUNKS chunks of 128 threads a program.

    kx1: chunks of 8 or 16 vectors by as many row groups, down whole columns, so that no column is read by two programs.
    """
    v, vector = row_vector(width, itemsize, aligned)
    th = -(-kh // 4) if kw == 1 and kh > 35 else kh if kh * kw <= 81 else max(1, 63 // kw)
    m, s = row_vectors(kw, dw, width, v, itemsize) if kh == 1 else (1, 1)
    if kh == 1:
        r = 1 if not vector else (4 if v == 4 else 2) if m == 1 else 4 if kw <= 5 else 1
    elif kw == 1:
        r = 8 if kh <= 5 else 4
    else:
        r = 4 if kh * kw <= 9 and vector else 2 if kh * kw <= 49 else 1
    columns = power_of_two(th * kw + 1, 2, 128)
    # 128 roundings of float32 in a row; less than twice that where whole columns are more chunks.
    chunks = min(8, 128 // (r * m * v)) if itemsize == 4 else 8
    if kw == 1 < kh:
        bg, bq = (8, 8) if r == 8 else (16, 4)
    else:
        bg, bq = (
            64 if r * m * v == 64 else 128,
            1,
        )  # of more threads with 64 pixels each ptxas spills for occupancy
    # The last sums over threads cost as much as a chunk or two, whose arithmetic is to be most of it.
    least = 2 if kh == 1 or not vector or itemsize == 4 else 1
    least = 4 if kh * kw > 25 else least
    chunks = tuned("wgrad_nchw", f"{kh}x{kw}, {itemsize} bytes", CHUNKS=chunks)["CHUNKS"]
    return Settings(
        V=v, VECTOR=vector, R=r, M=m, S=s, TH=th, COLUMNS=columns, BG=bg, BQ=bq, FLAT=bq == 1, CHUNKS=chunks,
        LEAST=least, warps=bg * bq // 32,
    )  # fmt: skip


def channel_tile(channels: int, largest: int = 64) -> int:
    """Channels of a program: the power of two from 16 up that wastes least, the larger one on a tie."""
    return min((b for b in (64, 32, 16) if b <= largest), key=lambda b: (-(-channels // b) * b, -b))


def taps_at_a_time(taps: int, most: int) -> int:
    """How many taps to hold in registers: `most` decides in how many passes, which share the taps out evenly."""
    passes = -(-taps // most)
    return -(-taps // passes)


def positions(length: int, dilation: int, most: int) -> int:
    """Outputs of a thread along the filter's main axis, `dilation` apart: fewer where they would overreach."""
    return next((p for p in (16, 8) if p <= most and length >= 2 * p * dilation), 4)


@compile_time
def interleaved(taps, dilation, pixel_bytes):
    """How far apart, in dilations, a thread's pixels along a row are in channels_last: 1, or 2 for whole sectors.

    Undilated, its neighbour's would be several pixels away, and a pixel of 28 channels in 16 bits alone fills 70 % of
    its sectors. Two side by side fill 87 %, for half as many loads again; of few taps twice as many, which stay at 1.
    """
    return 2 if taps > 5 and dilation == 1 and pixel_bytes < 64 and pixel_bytes % 32 else 1


def conv_nhwc(
    taps: int,
    across: int,
    length: int,
    dilation: int,
    channels: int,
    vector: int,
    along_h: bool,
    itemsize: int,
) -> Settings:
    """A depth-wise convolution in channels_last: a thread owns `vector` channels of P positions along the main axis.

    A program owns BG groups of P positions by BL lines. taps: along the main axis; across: the others, 1 of a strip.
    The groups of a strip reach so far that a quarter of what is read is read twice at most, or over the whole axis.
    """
    bc = max(channel_tile(channels, 32 if vector == 4 else 64), vector)
    kt = taps_at_a_time(taps, 6 if vector == 8 or across > 1 else 11)
    s = 1 if along_h else interleaved(taps, dilation, channels * itemsize)
    p = positions(length, s * dilation, 16 if taps <= 5 and across == 1 and vector <= 4 else 8)
    t = tuned("conv_nhwc", f"{taps} taps d{dilation}, {channels} channels by {vector}", P=p, warps=4)
    p = t["P"]
    threads = bc // vector  # of a pixel
    # Of more threads ptxas wants fewer registers than the values need.
    if vector == 8:
        block = 128 if across > 1 and taps <= 3 else 256
    else:
        block = 512 if across == 1 or 3 < taps <= 5 else 256
    most = max(1, block // threads)
    if across == 1:
        overlap = 4 * (taps - 1) * dilation // p
        bg = power_of_two(min(overlap, -(-length // (p * s * dilation)) * s * dilation), s, min(64, most))
        bl = min(4, most // bg) if along_h and channels % 16 else 1  # lines share sectors
    else:
        bl = min(16, max(1, most // 2))
        bg = min(4, most // bl)
    while bg * bl * threads < 32 * t["warps"]:
        bl *= 2
    return Settings(P=p, S=s, KT=kt, BC=bc, BG=bg, BL=bl, VEC=vector, warps=bg * bl * threads // 32)


def wgrad_nhwc(
    taps: int, rows: int, length: int, dilation: int, channels: int, vector: int, along_h: bool
) -> Settings:
    """First stage of a weight gradient in channels_last: all of a 3x3's taps, else one or two of the filter's rows."""
    bc = max(channel_tile(channels), vector)
    kt = taps_at_a_time(taps, 11 if vector < 8 else 5 if taps <= 11 else 4)
    tb = rows if rows * kt <= 9 else 2 if rows > 1 and kt == taps <= 7 and vector <= 4 else 1
    most = 8
    if vector == 8 and (tb > 1 or kt == 5 < taps):
        most = 4
    elif vector <= 4 and rows * kt <= 5:
        most = 16
    p = positions(length, dilation, most)
    groups = 128 * vector // bc  # of P positions, of all channels, that 128 threads hold
    # A program goes along a whole dilated row, which one line's chunks fit best.
    lines = min(groups, 4 if tb > 1 else 1 if rows == 1 and not along_h and (taps - 1) * dilation > 32 else 2)
    t = tuned("wgrad_nhwc", f"{rows}x{taps} d{dilation}, {channels} channels by {vector}", P=p, CHUNKS=8)
    return Settings(
        P=t["P"],
        KT=kt,
        TB=tb,
        BC=bc,
        BG=groups // lines,
        BL=lines,
        VEC=vector,
        CHUNKS=t["CHUNKS"],
        LEAST=4 if tb == rows > 1 else 2,
        COLUMNS=power_of_two(tb * kt + 1, 2, 64),
        warps=4,
    )


def pixels(channels: int, backward: bool = False, planes: bool = True) -> Settings:
    """LayerNorm, which holds all channels of BP pixels: about `elements` values a program, TILES times at most.

    32 of them a thread: a pixel's sums are every thread's work, which few values a thread do not repay. Backward in
    channels_last (not `planes`) 16, where a thread has fewer pixels and ptxas would spill.
    """
    kernel = "layer_norm2d_backward" if backward else "layer_norm2d"
    elements = tuned(kernel, f"{channels} channels", elements=2048 if backward and not planes else 4096)[
        "elements"
    ]
    bc = power_of_two(channels, 1, 1024)
    bp = power_of_two(elements // bc, 16, 256)
    return Settings(BC=bc, BP=bp, TILES=4, warps=4 if bc * bp <= 4096 else 8)


def dot_tile(n: int, largest: int) -> int:
    """A side of a tl.dot: the power of two from 16 that wastes least of the last tile, the larger one on a tie."""
    sides = [b for b in (256, 128, 64, 32, 16) if b <= largest]
    return min(sides, key=lambda b: (-(-n // b) * b, -b))


def pointwise(out_channels: int, in_channels: int, itemsize: int) -> Settings:
    """A 1x1 convolution as a product: 40 and 48 channels become tiles of 16, 28 one of 32, 56 one of 64."""
    bo, bi = dot_tile(out_channels, 64), dot_tile(in_channels, 64)
    bp = 128 if bo <= 32 else 64
    if itemsize == 4:  # plain FMAs with both operands in registers
        bo, bi, bp = min(bo, 32), min(bi, 16), 64
    calls = f"{in_channels} to {out_channels} channels, {itemsize} bytes"
    return Settings(tuned("pointwise", calls, BO=bo, BI=bi, BP=bp, warps=4))


def pointwise_wgrad(out_channels: int, in_channels: int, itemsize: int) -> Settings:
    """First stage of its weight gradient, as a product."""
    bo, bi = dot_tile(out_channels, 64), dot_tile(in_channels, 64)
    bp, tiles = 64, 4
    if itemsize == 4:
        bo, bi, bp, tiles = min(bo, 32), min(bi, 32), 32, 8
    calls = f"{in_channels} to {out_channels} channels, {itemsize} bytes"
    return Settings(tuned("pointwise_wgrad", calls, BP=bp, TILES=tiles), BO=bo, BI=bi, warps=4)


def pointwise_wgrad_planes(out_channels: int, in_channels: int) -> Settings:
    """The same for float32 in NCHW: 8 x 8 sums of each thread in registers, at most 128 roundings of each."""
    calls = f"{in_channels} to {out_channels} channels"
    return Settings(tuned("pointwise_wgrad_planes", calls, CHUNKS=8), TO=8, TI=8, BLOCK=128)


def stacked_side(channels: int, bc: int, outputs: int) -> int:
    """The largest side of a tl.dot that leaves less than a third of it empty, beside bc rows for `channels`."""
    filled = {b: channels * outputs / (bc * -(-outputs // b) * b) for b in (64, 32, 16)}
    return next((b for b, share in filled.items() if share >= 2 / 3), max(filled, key=lambda b: filled[b]))


def norm_pointwise(
    channels: int, out1: int, out2: int, itemsize: int, backward: bool = False, planes: bool = True
) -> Settings:
    """LayerNorm and two 1x1 convolutions from one tile of all channels of BP pixels, or the gradient of that.

    planes: NCHW, where plain FMAs of 64 pixels share what they read from shared memory; in channels_last they spill.
    """
    bc = power_of_two(channels, 16, 256)
    bo = stacked_side(channels, bc, out1 + out2)
    if itemsize == 4:
        bo, bp = min(bo, 32), 16 if bc > 64 else 64 if planes else 32
    else:
        bo, bp = min(bo, 32) if bc > 64 else bo, 32 if bc > 64 else 64
    # Where ptxas would spill to save a step of occupancy:
    if backward and bc == 16:
        bo, bp = min(bo, 32), 16
    elif not (backward or planes) and itemsize == 2:
        bp = {16: 128, 32: 32}.get(bo, bp)
    kernel = "norm_pointwise_grad" if backward else "norm_pointwise"
    calls = f"{channels} to {out1} and {out2} channels, {itemsize} bytes"
    t = tuned(kernel, calls, BO=bo, BP=bp)
    tiles = 4 if backward else 1
    # Of pixels that are no whole sectors 16 channels are not either: then all are formed, and stored at once.
    if not (backward or planes) and itemsize == 2 and t["BO"] == 16 and (out1 % 16 or out2 % 16):
        tiles = -(-(out1 + out2) // 16)
    return Settings(t, BC=bc, TILES=tiles, warps=4)
