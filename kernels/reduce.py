"""The second stage of every weight gradient: partial sums added up in a fixed order, so results repeat bit by bit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._triton import jit, tl
from .launch import ceil_div, launch
from .phases import compile_time


@compile_time
def log2(n):
    """log2 of a power of two."""
    return n.bit_length() - 1


@jit
def join_all(x, N: tl.constexpr):
    """Tensors [BLOCK], N (a power of two) at most, as the columns of one [BLOCK, N]; missing ones are zero."""
    BLOCK: tl.constexpr = x[0].shape[0]
    LEVELS: tl.constexpr = log2(N)
    for _ in tl.static_range(N - len(x)):
        x = x + (tl.zeros((BLOCK,), tl.float32),)
    for level in tl.static_range(LEVELS):
        y = ()
        for i in tl.static_range(N >> (level + 1)):
            y = y + (tl.join(x[i], x[i + (N >> (level + 1))]),)
        x = y
    return tl.reshape(x[0], (BLOCK, N))


@jit
def total(x):
    """The sum of a tuple of a power of two tensors, in pairs: fewer roundings in a row than one after the other."""
    LEVELS: tl.constexpr = log2(len(x))
    for _ in tl.static_range(LEVELS):
        y = ()
        for i in tl.static_range(len(x) // 2):
            y = y + (x[2 * i] + x[2 * i + 1],)
        x = y
    return x[0]


@jit
def reduce_rows(
    partial_ptr, first_ptr, second_ptr, rows, columns, first,
    STEP: tl.constexpr, BLOCK: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Sum partial [rows, columns] over its rows; columns below `first` go to one tensor, the rest (SECOND) to
    another.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, STEP)
    ok = column < columns
    acc = tl.zeros((STEP, BLOCK), tl.float32)
    for row in range(0, rows, STEP):
        at = (row + step).to(tl.int64)[:, None] * columns + column[None, :]
        acc += tl.load(partial_ptr + at, (row + step < rows)[:, None] & ok[None, :], other=0.0)
    total = tl.sum(acc, 0)
    tl.store(first_ptr + column, total.to(first_ptr.dtype.element_ty), ok & (column < first))
    if SECOND:
        tl.store(second_ptr + (column - first), total.to(second_ptr.dtype.element_ty), ok & (column >= first))


def finish(partial: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """first, second = the sums of partial [rows, columns] (float32) over its rows, split after first.numel() columns.

    Columns beyond both are ignored. One launch.
    """
    rows, columns = partial.shape
    wanted: Any = first.numel() if second is None else columns
    block, step = 64, 16
    launch(reduce_rows, (ceil_div(wanted, block),), partial, first, first if second is None else second, rows, columns,
           first.numel(), STEP=step, BLOCK=block, SECOND=second is not None, num_warps=4)  # fmt: skip
