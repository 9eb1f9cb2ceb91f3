"""Rows of an NCHW image as `V` phase tensors: a thread owns V neighbouring pixels and shifts become register names.

A horizontal tap at distance e needs pixel V q + r + e for each phase r of vector q. Vector q + (r + e) div V holds it
as phase (r + e) mod V, so all taps come from a few aligned 128-bit loads, and no shifted, unaligned load is ever
made.
"""

from __future__ import annotations

from typing import Any

from ._triton import jit, tl, triton

if triton is not None:
    compile_time: Any = triton.constexpr_function
else:

    def compile_time(fn: Any) -> Any:
        """Stand in for `triton.constexpr_function`."""
        return fn


@compile_time
def reach(k, d, v):
    """How many whole vectors of v pixels a centred filter of k taps at dilation d reaches to each side."""
    return ((k // 2) * d + v - 1) // v


@compile_time
def first_tap(delta, v, k, d, v_count):
    """The first tap of phase v that falls into the vector `delta` vectors away; see last_tap."""
    return min(max(-((v - delta * v_count) // d) + k // 2, 0), k)


@compile_time
def last_tap(delta, v, k, d, v_count):
    """One past the last such tap; not above first_tap where there is none."""
    return min(max(-((v - (delta + 1) * v_count) // d) + k // 2, 0), k)


@compile_time
def needed(delta, k, d, v, m=1, s=1):
    """Whether any tap of any phase of m vectors, s apart, falls into the vector `delta` vectors away from the first."""
    return any(
        (delta - i * s) * v - v < (t - k // 2) * d < (delta - i * s) * v + v
        for t in range(k)
        for i in range(m)
    )


@jit
def put(x, I: tl.constexpr, value):
    """The tuple x with its element I replaced."""
    return x[:I] + (value,) + x[I + 1 :]


@jit
def split_phases(x, V: tl.constexpr):
    """The columns of x [BLOCK, V] as a tuple of V tensors [BLOCK]; no data moves when a thread holds a whole row."""
    BLOCK: tl.constexpr = x.shape[0]
    if V == 1:
        out = (tl.reshape(x, (BLOCK,)),)
    elif V == 2:
        out = tl.split(x)
    elif V == 4:
        e, o = tl.split(tl.reshape(x, (BLOCK, 2, 2)))
        x0, x2 = tl.split(e)
        x1, x3 = tl.split(o)
        out = (x0, x1, x2, x3)
    else:
        e, o = tl.split(tl.reshape(x, (BLOCK, 2, 2, 2)))
        e0, e1 = tl.split(e)
        o0, o1 = tl.split(o)
        x0, x4 = tl.split(e0)
        x2, x6 = tl.split(e1)
        x1, x5 = tl.split(o0)
        x3, x7 = tl.split(o1)
        out = (x0, x1, x2, x3, x4, x5, x6, x7)
    return out


@jit
def join_phases(x, V: tl.constexpr):
    """The inverse of split_phases: a tuple of V (a power of two) tensors [BLOCK] as the columns of one [BLOCK, V]."""
    BLOCK: tl.constexpr = x[0].shape[0]
    if V == 1:
        out = tl.reshape(x[0], (BLOCK, 1))
    elif V == 2:
        out = tl.join(x[0], x[1])
    elif V == 4:
        out = tl.reshape(tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])), (BLOCK, 4))
    else:
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
        out = tl.reshape(tl.join(even, odd), (BLOCK, 8))
    return out


@jit
def load_phases(ptr, row, q, ok, W, QW, DELTA: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr):
    """Pixels V (q + DELTA) ... + V - 1 of a row, as V float32 tensors; zero outside the image and where not ok.

    row: offset of the row's first pixel. VECTOR: rows start at multiples of V pixels and V divides W = V QW, so that a
    vector is one load; else it is V loads.
    """
    out = ()
    if VECTOR:
        good = ok
        if DELTA != 0:
            good = ok & ((q + DELTA).to(tl.uint32, bitcast=True) < QW)  # negative ones are large
        # DELTA is added to the pointer, not to the offset, where it becomes one 64-bit addition.
        if ptr.dtype.element_ty == tl.bfloat16:
            # Two values a word: each is one shift or mask away from float32.
            at = tl.multiple_of((row >> 1) + q * (V // 2), V // 2)
            words = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (
                at[:, None] + tl.arange(0, V // 2)[None, :]
            )
            pairs = split_phases(tl.load(words + DELTA * (V // 2), good[:, None], other=0), V // 2)
            for i in tl.static_range(V // 2):
                low, high = pairs[i] << 16, pairs[i] & -65536
                out = out + (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
        else:
            at = tl.multiple_of(row + q * V, V)
            pixels = ptr + (at[:, None] + tl.arange(0, V)[None, :])
            phases = split_phases(tl.load(pixels + DELTA * V, good[:, None], other=0.0), V)
            for v in tl.static_range(V):
                out = out + (phases[v].to(tl.float32),)
    else:
        for v in tl.static_range(V):
            column = (q + DELTA) * V + v
            x = tl.load(ptr + (row + column), ok & (column.to(tl.uint32, bitcast=True) < W), other=0.0)
            out = out + (x.to(tl.float32),)
    return out


@jit
def load_row(ptr, row, q, ok, W, QW, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, VECTOR: tl.constexpr):
    """All phases that K taps at dilation D need around vector q, from vector -reach to +reach (0.0 for unneeded
    ones).
    """
    REACH: tl.constexpr = reach(K, D, V)
    out = ()
    for delta in tl.static_range(-REACH, REACH + 1):
        if needed(delta, K, D, V):
            out = out + load_phases(ptr, row, q, ok, W, QW, delta, V, VECTOR)
        else:
            out = out + (0.0,) * V
    return out


@jit
def store_phases(ptr, row, q, ok, W, x, V: tl.constexpr, VECTOR: tl.constexpr):
    """Store the tuple x of V tensors [BLOCK] as pixels V q ... V q + V - 1 of a row."""
    block = join_phases(x, V).to(ptr.dtype.element_ty)
    lane = tl.arange(0, V)[None, :]
    if VECTOR:
        at = tl.multiple_of(row + q * V, V)
        tl.store(ptr + (at[:, None] + lane), block, ok[:, None])
    else:
        column = (q * V)[:, None] + lane
        tl.store(ptr + (row[:, None] + column), block, ok[:, None] & (column < W))
