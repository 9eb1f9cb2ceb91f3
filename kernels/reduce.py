"""The second stage of every weight gradient: partial sums added up in a fixed order, so results repeat bit by bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tl
from .launch import ceil_div, launch
from .phases import compile_time


@compile_time
def log2(n):
    """log2 of a power of two."""
    return n.bit_length() - 1


@compile_time
def with_axis(shape, n):
    """A shape with one axis more, of n."""
    return [*shape, n]


@compile_time
def whole_sectors(n):
    """The floats of the sectors of 32 bytes, which memory moves as one, that n floats lie in."""
    return (n + 7) // 8 * 8


@jit
def join_all(x, N: tl.constexpr):
    """Tensors of one shape, N (a power of two) at most, as one with an axis more, of N; missing ones are zero."""
    SHAPE: tl.constexpr = x[0].shape
    LEVELS: tl.constexpr = log2(N)
    for _ in tl.static_range(N - len(x)):
        x = x + (tl.zeros(SHAPE, tl.float32),)
    for level in tl.static_range(LEVELS):
        y = ()
        for i in tl.static_range(N >> (level + 1)):
            y = y + (tl.join(x[i], x[i + (N >> (level + 1))]),)
        x = y
    return tl.reshape(x[0], with_axis(SHAPE, N))


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
    partial_ptr, first_ptr, second_ptr, rows, columns, first, second, blocks, taps, line, run, pad, channel, second_at,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum partial [rows, columns] over its rows into two tensors of `first` and `second` numbers; see Sums for where.

    A program makes BLOCK numbers of one of them, the first `blocks` programs those of the first.
    """
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    tap = i % taps
    step = tap // line * tl.cdiv(line, run) + tap % line // run
    column = i // taps * channel + step * pad + tap % line % run
    after = i - blocks * BLOCK
    ok, after_ok = (pid < blocks) & (i < first), (after >= 0) & (after < second)
    column = tl.where(pid < blocks, column, second_at + after * channel)
    row = tl.arange(0, STEP)
    acc = tl.zeros((STEP, BLOCK), tl.float32)
    at = partial_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    for start in range(0, rows, STEP):
        acc += tl.load(at, (start + row < rows)[:, None] & (ok | after_ok)[None, :], other=0.0)
        at += STEP * columns
    total = tl.sum(acc, 0)
    tl.store(first_ptr + i, total.to(first_ptr.dtype.element_ty), ok)
    tl.store(second_ptr + after, total.to(second_ptr.dtype.element_ty), after_ok)


class Sums(NamedTuple):
    """Where a row of partial sums has its numbers: those of each program of a first stage fill whole sectors.

    A filter of `taps` for each channel is cut into lines, and these into runs, the last of a line being shorter. A run
    is what a program sums; it takes `pad` floats, those of a channel side by side. The channel's bias follows its first
    run. A matrix is one run, after which a vector follows.
    """

    taps: int
    line: int
    run: int
    pad: int
    dense: bool = False

    @classmethod
    def filters(cls, taps: int, line: int, run: int) -> Sums:
        """Of a depth-wise filter and its bias."""
        return cls(taps, line, run, whole_sectors(run + 1))

    @classmethod
    def matrix(cls, numbers: int) -> Sums:
        """Of so many numbers in a row, then some more."""
        return cls(numbers, numbers, numbers, numbers, True)

    @property
    def channel(self) -> int:
        """Floats from one channel to the next; of a matrix, from one number of what follows to the next."""
        return 1 if self.dense else self.taps // self.line * ceil_div(self.line, self.run) * self.pad

    def empty(self, like: Tensor, rows: Any, channels: int) -> Tensor:
        """An uninitialised workspace of `rows` rows for the filters, or of what follows a matrix, of `channels`."""
        columns = self.run + channels if self.dense else channels * self.channel
        return like.new_empty((rows, columns), dtype=torch.float32)


def finish(partial: Tensor, sums: Sums, first: Tensor, second: Tensor | None = None) -> None:
    """first, second = the sums of partial [rows, columns] (float32) over its rows; one launch."""
    rows, columns = partial.shape
    block = 16  # a sector of 16 bits
    # Many rows at once, since a program waits for memory at each step; two or three steps at SDAN's sizes.
    step = next((n for n in (16, 64, 256) if rows <= n), 512)
    while step * columns >= 2**31:  # the kernel's way from one step to the next, in 32 bits
        step //= 2
    blocks, after = ceil_div(first.numel(), block), 0 if second is None else second.numel()
    launch(reduce_rows, (blocks + ceil_div(after, block),), partial, first, first if second is None else second, rows,
           columns, first.numel(), after, blocks, sums.taps, sums.line, sums.run, sums.pad, sums.channel, sums.run,
           STEP=step, BLOCK=block, num_warps=max(4, step // 32))  # fmt: skip
