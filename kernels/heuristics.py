"""Block sizes and warps of every kernel, from channel counts and filter sizes alone.

Image sizes enter only through a few coarse steps: a compiled function with dynamic sizes then guards on a threshold, and does
not recompile for each size.
"""

from __future__ import annotations


def elementwise_block() -> tuple[int, int]:
    """(elements per program, warps) of an element-wise kernel: 8 per thread, 128 bits of a 16-bit type."""
    return 1024, 4


class Settings(dict):
    """Settings of one launch, by name."""

    __getattr__ = dict.__getitem__


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, between low and high."""
    p = low
    while p < n and p < high:
        p *= 2
    return p


def row_vector(width: int, itemsize: int, aligned: bool) -> tuple[int, bool]:
    """(pixels V of a thread, whether they are one load): 16 bytes, or 8 of a 16-bit type, where rows allow it."""
    if aligned:
        for v in (16 // itemsize, 4):
            if width % v == 0:
                return v, True
    return 4, False


def conv_nchw(kh: int, kw: int, dh: int, width: int, height: int, itemsize: int, aligned: bool) -> Settings:
    """A depth-wise convolution in NCHW.

    1xk and squares: 128 consecutive vectors of a plane, one row each. kx1: R rows a thread, and programs of whole
    columns (up to 256 R rows) of four vectors, so that no column is read by two programs.
    """
    v, vector = row_vector(width, itemsize, aligned)
    if kw > 1 or kh == 1:
        if kh == 1:
            r = 1 if height == 1 else itemsize
        else:
            r = 1 if kh * kw > 49 else (4 if kh * kw <= 25 else 2)
        return Settings(V=v, VECTOR=vector, R=r, BG=128, BQ=1, FLAT=True, warps=4)
    r = 4
    groups = power_of_two(-(-height // (r * dh)) * dh, 8, 64)
    if groups * r < height:  # tall images
        r = 8
        groups = power_of_two(-(-height // (r * dh)) * dh, 64, 256)
    bq = 4 if groups <= 64 else 2
    return Settings(V=v, VECTOR=vector, R=r, BG=groups, BQ=bq, FLAT=False, warps=max(1, groups * bq // 32))


def wgrad_nchw(kh: int, kw: int, width: int, itemsize: int, aligned: bool) -> Settings:
    """First stage of a weight gradient in NCHW: up to 81 taps in registers, four chunks of 128 vectors a program."""
    v, vector = row_vector(width, itemsize, aligned)
    th = kh if kh * kw <= 81 else max(1, 63 // kw)
    r = 4 if kw == 1 and kh > 1 else (2 if kh * kw <= 31 else 1)
    columns = power_of_two(th * kw + 1, 2, 128)
    return Settings(V=v, VECTOR=vector, R=r, TH=th, COLUMNS=columns, BLOCK=128, CHUNKS=4, warps=4)


def channel_tile(channels: int) -> int:
    """Channels of a program: the power of two from 16 to 64 that wastes least, the larger one on a tie."""
    return min((64, 32, 16), key=lambda b: (-(-channels // b) * b, -b))


def conv_nhwc(taps: int, channels: int, itemsize: int, vector: int) -> Settings:
    """A depth-wise convolution in channels_last: four positions and 16 bytes of channels a thread."""
    bc = channel_tile(channels)
    per_thread = 16 // itemsize
    kt = taps if taps <= 11 else 8
    return Settings(P=4, KT=kt, BC=bc, BP=128 * per_thread // bc, VEC=vector, warps=4)


def wgrad_nhwc(taps: int, channels: int, itemsize: int, vector: int) -> Settings:
    """First stage of a weight gradient in channels_last: up to 7 taps in registers."""
    bc = channel_tile(channels)
    per_thread = 16 // itemsize
    kt = taps if taps <= 7 else (5 if taps in (9, 19, 25) else 6)
    return Settings(P=4, KT=kt, BC=bc, BP=128 * per_thread // bc, VEC=vector, CHUNKS=4, warps=4)
