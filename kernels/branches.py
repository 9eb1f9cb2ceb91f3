"""Branches of depth-wise convolutions over channel slices, run side by side: launches, gradients, workspaces.

A branch is a sequence of convolutions of one slice of channels. What branches do in the same step is one launch, up to
four jobs of it: a program takes its job from a table, by its number. On a zero-padded grid 1xk and kx1 convolutions
commute, so the chain H1 V1 H2 V2 (biases b1 .. b4) is two steps and not four: m = H2 (H1 x + b1), whole rows at a time,
then y = V2 (V1 m + b2 F + b3) + b4, whole columns at a time, with F = H2 1, what H2 makes of a row of ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import depthwise_conv2d as depthwise
from . import heuristics
from .branches_nchw import branches_nchw, kind_of
from .branches_nhwc import branches_nhwc, tiles_of
from .launch import ceil_div, channel_vector, is_aligned, launch, wide_plane

JOBS = 4  # that a launch has room for
BLOCK = 256  # threads of a program
KINDS = {kind_of((number,)): number for number in range(3)}


@dataclass
class Conv:
    """One depth-wise convolution: weight (C, 1, kh, kw), bias (C,) or None, dilations along H and W."""

    weight: Tensor
    bias: Tensor | None
    dilations: tuple[int, int]

    @property
    def axis(self) -> str:
        """ "w" for 1xk, "h" for kx1, else "hw"."""
        kh, kw = self.weight.shape[2:]
        return "w" if kh == 1 else "h" if kw == 1 else "hw"

    @property
    def taps(self) -> int:
        """Taps of the whole filter."""
        return self.weight.shape[2] * self.weight.shape[3]

    @property
    def dilation(self) -> int:
        """Dilation of a strip along its axis."""
        return self.dilations[1] if self.axis == "w" else self.dilations[0]


class Step(NamedTuple):
    """What one job computes: `last` + c2 (`first` + `by_field` F + c1 x), or c1 x + `last` if it is one convolution."""

    convs: tuple[Conv, ...]
    first: Tensor | None = None
    by_field: Tensor | None = None
    last: Tensor | None = None
    writes_field: bool = False


class Job(NamedTuple):
    """A step of a slice of channels, from one tensor into another, with a third between two strips (or the result)."""

    step: Step
    channel: int
    source: Tensor
    middle: Tensor | None
    result: Tensor
    add: bool = False  # to what the result holds


def steps_of(branch: Sequence[Conv], *, fused: bool, flip: bool) -> list[Step]:
    """The steps of one branch: with `fused` H1 V1 H2 V2 are two. flip: those of its input's gradient."""
    steps, at = [], 0
    if flip:
        branch = [Conv(c.weight, None, c.dilations) for c in reversed(branch)]
    pattern = ["h", "w", "h", "w"] if flip else ["w", "h", "w", "h"]
    while at < len(branch):
        four = branch[at : at + 4]
        if fused and [c.axis for c in four] == pattern:
            h1, v1, h2, v2 = (four[i] for i in ((1, 0, 3, 2) if flip else range(4)))
            steps.append(Step((h1, h2), first=h1.bias, writes_field=v1.bias is not None))
            steps.append(Step((v1, v2), first=h2.bias, by_field=v1.bias, last=v2.bias))
            at += 4
        else:
            steps.append(Step((branch[at],), last=branch[at].bias))
            at += 1
    return steps


class Shape(NamedTuple):
    """How the threads of a program share out a job; the fields are those of the kernels' tables."""

    kind: str
    per_thread: int  # R rows, or P positions
    lines: int
    groups: int
    loop: bool
    blocks: int


@dataclass
class Images:
    """Dense N x C x H x W tensors of one memory format, and the vectors of V values in which kernels read them."""

    fmt: torch.memory_format
    x: Tensor
    v: int
    vector: bool

    @classmethod
    def of(cls, x: Tensor, y: Tensor, branches: Sequence[Sequence[Conv]], fmt: torch.memory_format) -> Images:
        """What x, y and workspaces beside them have in common."""
        if fmt == torch.contiguous_format:
            return cls(fmt, x, *heuristics.row_vector(x.shape[3], x.element_size(), is_aligned(x, y)))
        v = channel_vector(x, y)
        while any(channels % v for channels in widths(branches)):
            v //= 2
        return cls(fmt, x, v, True)

    @property
    def nchw(self) -> bool:
        """Whether rows are contiguous, not pixels."""
        return self.fmt == torch.contiguous_format

    def empty(self) -> Tensor:
        """A workspace tensor."""
        return torch.empty_like(self.x, memory_format=self.fmt)

    def field(self) -> Tensor:
        """What strips make of ones, for every channel and column: float32."""
        return self.x.new_empty((self.x.shape[1] * self.x.shape[3],), dtype=torch.float32)

    def shape(self, step: Step) -> Shape:
        """How a program's threads share out a step."""
        return self._shape_nchw(step) if self.nchw else self._shape_nhwc(step)

    def _shape_nchw(self, step: Step) -> Shape:
        """Squares: one to four rows a thread. 1xk: whole rows. kx1: columns, 32 bytes of them at least."""
        _, _, H, W = self.x.shape
        conv, QW = step.convs[0], ceil_div(W, self.v)
        if conv.axis == "hw":
            r = 1 if conv.taps > 49 else (4 if conv.taps <= 25 else 2)
            groups = ceil_div(H, r * conv.dilations[0]) * conv.dilations[0] if r > 1 else H
            return Shape("square", r, 1, 1, False, ceil_div(groups * QW, BLOCK))
        if conv.axis == "w":
            r = 1 if H == 1 else 4  # two rows of 16 bits: ptxas spills to save a step of occupancy
            rows = 1 if QW >= BLOCK else BLOCK // QW
            return Shape("rows", r, 1, 1, QW > BLOCK, ceil_div(ceil_div(H, r), rows))
        for r, most in ((4, 8), (4, 4), (4, 2), (8, 2), (4, 4)):
            lines = heuristics.power_of_two(QW, 1, most)
            groups = max(ceil_div(H, r * c.dilation) * c.dilation for c in step.convs)
            if groups * lines <= BLOCK:
                break
        return Shape("columns", r, lines, 1, groups * lines > BLOCK, ceil_div(QW, lines))

    def _shape_nhwc(self, step: Step) -> Shape:
        """20 to 32 values a thread (as many as no target spills), up to 128 bytes of channels a program; whole rows, or
        128 bytes of columns.
        """
        _, _, H, W = self.x.shape
        conv, itemsize = step.convs[0], self.x.element_size()
        channels = conv.weight.shape[0]
        p = 24 // self.v if self.v > 2 else 7 if itemsize == 2 else 5
        if conv.axis == "hw" and self.v == 8:
            p = 4
        elif conv.axis == "h" and self.v == 4 and itemsize == 2:
            p = 5
        if conv.axis != "hw" and max(max(c.weight.shape[2:]) for c in step.convs) <= 5:
            p = min(16, (64 if itemsize == 2 else 48) // self.v)  # of few taps a thread needs few registers
        tiles = ceil_div(channels * itemsize, 128)
        groups = ceil_div(channels // self.v, tiles)
        along = H if conv.axis == "h" else W
        dilations = [conv.dilations[1]] if conv.axis == "hw" else [c.dilation for c in step.convs]
        if conv.axis == "w":
            pixel = self.x.shape[1] * itemsize
            apart = [heuristics.interleaved(c.taps, c.dilation, pixel) for c in step.convs]
            dilations = [c.dilation * s for c, s in zip(step.convs, apart, strict=True)]
            if max(apart) > 1:  # a warp holds whole pixels, whose sectors two warps would each move
                groups = heuristics.power_of_two(groups, 1, 32)
        items = max(ceil_div(along, p * d) * d for d in dilations) * groups
        if conv.axis == "hw":
            return Shape("square", p, 1, groups, False, ceil_div(H * items, BLOCK))
        fitting = power_of_two_below(BLOCK // items)
        if conv.axis == "w":
            return Shape("rows", p, fitting, groups, items > BLOCK, ceil_div(H, fitting))
        wide = ceil_div(128, groups * self.v * itemsize) if channels == self.x.shape[1] else 1
        lines = min(max(fitting, heuristics.power_of_two(wide, 1, 64)), heuristics.power_of_two(W, 1, 64))
        return Shape("columns", p, lines, groups, items * lines > BLOCK, ceil_div(W, lines))


def power_of_two_below(n: int) -> int:
    """The largest power of two up to n; 1 at least."""
    p = 1
    while 2 * p <= n:
        p *= 2
    return p


def widths(branches: Sequence[Sequence[Conv]]) -> list[int]:
    """The channels of each branch."""
    return [branch[0].weight.shape[0] for branch in branches]


def slices(x: Tensor, branches: Sequence[Sequence[Conv]]) -> list[Tensor]:
    """The branches' slices of the channels of x: views."""
    return list(torch.split(x, widths(branches), dim=1))


def run_jobs(jobs: Sequence[Job], images: Images, field: Tensor | None = None, *, flip: bool = False) -> None:
    """Launch jobs that do not depend on each other, four at a time.

    field: C x W floats for the jobs that write or read it. flip: all filters flipped.
    """
    for at in range(0, len(jobs), JOBS):
        _launch(jobs[at : at + JOBS], images, field, flip)


def _launch(jobs: Sequence[Job], images: Images, field: Tensor | None, flip: bool) -> None:
    N, C, H, W = images.x.shape
    tensors: list[Tensor] = []

    def number(t: Tensor | None) -> int:
        """A tensor's number among those that this launch is given."""
        for i, known in enumerate(tensors):
            if known is t:
                return i
        if t is not None:
            tensors.append(t)
        return -1 if t is None else len(tensors) - 1

    table: list[tuple[int, ...]] = []
    pointers: list[Tensor] = []
    blocks: list[int] = []
    programs = 0
    for job in jobs:
        step, shape = job.step, images.shape(job.step)
        conv, second = step.convs[0], step.convs[1] if len(step.convs) == 2 else None
        channels, _, kh, kw = conv.weight.shape
        entry = (
            KINDS[shape.kind], job.channel, channels,
            number(job.source), number(job.middle), number(job.result), kh, kw,
            conv.dilations[0] if kh > 1 else 1, conv.dilations[1] if kw > 1 else 1, second.taps if second else 0,
            second.dilation if second else 1, shape.per_thread, shape.lines, shape.groups, shape.loop,
            step.first is not None, step.by_field is not None, step.last is not None, job.add, step.writes_field,
        )  # fmt: skip
        entry = tuple(map(int, entry))  # of a traced weight they are symbols
        table.append(entry)
        pointers += [conv.weight.contiguous(), (second or conv).weight.contiguous()]
        pointers += [
            conv.weight if t is None else t.contiguous() for t in (step.first, step.by_field, step.last)
        ]
        blocks.append(shape.blocks)
        programs += N * shape.blocks * (channels if images.nchw else tiles_of(entry, images.v))
    pointers += pointers[:5] * (JOBS - len(jobs))
    blocks += [1] * (JOBS - len(jobs))
    tensors += tensors[:1] * (JOBS - len(tensors))
    where = [*tensors, tensors[0] if field is None else field, *pointers, *blocks, N]
    flags = dict(JOBS=tuple(table), FLIP=flip, V=images.v, BLOCK=BLOCK, WIDE=wide_plane(images.x),
                 num_warps=BLOCK // 32)  # fmt: skip
    if images.nchw:
        launch(
            branches_nchw, (programs,), *where, C, H, W, ceil_div(W, images.v), VECTOR=images.vector, **flags
        )
    else:
        launch(branches_nhwc, (programs,), *where, H, W, C=C, **flags)


def run(x: Tensor, branches: Sequence[Sequence[Conv]], y: Tensor, fmt: torch.memory_format, *, flip: bool = False,
        add: bool = False) -> None:  # fmt: skip
    """y [+]= what each branch makes of its slice of x; flip: the gradient in x of that, from x = its result's gradient.

    As many launches as the longest branch has steps. x and y are dense in the format `fmt`. Workspace: one tensor like
    x and C x W floats; one more for a branch of three steps, one more where two strips do not fit into one program.
    """
    images = Images.of(x, y, branches, fmt)
    plans = [steps_of(branch, fused=True, flip=flip) for branch in branches]
    space: dict[int, Tensor] = {}

    def workspace(i: int) -> Tensor:
        if i not in space:
            space[i] = images.empty()
        return space[i]

    field = images.field() if any(step.writes_field for plan in plans for step in plan) else None
    for i in range(max(map(len, plans))):
        jobs, channel = [], 0
        for width, plan in zip(widths(branches), plans, strict=True):
            if i < len(plan):
                last = i == len(plan) - 1
                result = y if last else workspace(i % 2)
                middle = None
                if len(plan[i].convs) == 2:
                    apart = images.shape(plan[i]).loop or (
                        add and last
                    )  # then the result cannot hold the middle
                    middle = workspace(i % 2 if last else 2) if apart else result
                source = x if i == 0 else workspace((i - 1) % 2)
                jobs.append(Job(plan[i], channel, source, middle, result, add and last))
            channel += width
        run_jobs(jobs, images, field, flip=flip)


def levels(
    x: Tensor,
    branches: Sequence[Sequence[Conv]],
    counts: Sequence[int],
    y: Tensor | None,
    fmt: torch.memory_format,
) -> list[Tensor]:
    """What the convolutions of the branches read, by their places in the branches, a launch for each place.

    counts: how many convolutions of each branch to run. y: where a branch's result goes when all of them are.
    """
    inputs = [x]
    images = Images.of(x, x if y is None else y, branches, fmt)
    for i in range(max(counts)):
        jobs, channel = [], 0
        after = None
        for width, branch, n in zip(widths(branches), branches, counts, strict=True):
            if i < n:
                result = y if i == len(branch) - 1 else after
                if result is None:
                    result = after = images.empty()
                jobs.append(Job(Step((branch[i],), last=branch[i].bias), channel, inputs[-1], None, result))
            channel += width
        run_jobs(jobs, images)
        if after is not None:
            inputs.append(after)
    return inputs


Gradients = list[tuple[Tensor | None, Tensor | None]]


def gradients(
    g: Tensor, x: Tensor, branches: Sequence[Sequence[Conv]], need_w: Sequence[bool], need_b: Sequence[bool],
    gx: Tensor | None, fmt: torch.memory_format, *, add: bool = False, inputs: Sequence[Tensor] | None = None,
) -> Gradients:  # fmt: skip
    """The gradients of every convolution's filter and bias, as asked for, branch by branch; gx [+]= the input's.

    inputs: what `levels` gave, if it is known. If no filter or bias is asked for, this is the fused launches of `run`.
    Otherwise one launch for each place in the branches, again as many if `inputs` have to be computed, and two for each
    convolution's own gradients.
    """
    grads: Gradients = [(None, None)] * len(need_w)
    wanted = [w or b for w, b in zip(need_w, need_b, strict=True)]
    if not any(wanted) or g.numel() == 0:
        if gx is not None and g.numel() > 0:
            run(g, branches, gx, fmt, flip=True, add=add)
        weights = [conv.weight for branch in branches for conv in branch]
        return [
            (torch.zeros_like(t) if w else None, t.new_zeros(t.shape[:1]) if b else None)
            for t, w, b in zip(weights, need_w, need_b, strict=True)
        ]
    first = [sum(map(len, branches[:b])) for b in range(len(branches))]
    if inputs is None:
        inputs = levels(x, branches, last_wanted(branches, wanted), None, fmt)
    images = Images.of(g, g if gx is None else gx, branches, fmt)
    above = g
    for i in reversed(range(max(map(len, branches)))):
        below, jobs, channel = (gx if i == 0 else None), [], 0
        for start, width, branch in zip(first, widths(branches), branches, strict=True):
            at = start + i
            if i < len(branch):
                source = g if i == len(branch) - 1 else above
                if wanted[at]:
                    part, below_it = (t[:, channel : channel + width] for t in (source, inputs[i]))
                    grads[at] = depthwise.weight_grad(
                        part, below_it, branch[i].weight, branch[i].dilations, need_w[at], need_b[at]
                    )
                if gx is not None or any(wanted[start:at]):
                    if below is None:
                        below = images.empty()
                    step = Step((Conv(branch[i].weight, None, branch[i].dilations),))
                    jobs.append(Job(step, channel, source, None, below, add and i == 0))
            channel += width
        run_jobs(jobs, images, flip=True)
        above = g if below is None else below
    return grads


def last_wanted(branches: Sequence[Sequence[Conv]], wanted: Sequence[bool]) -> list[int]:
    """For each branch the place of the last convolution whose own gradients are wanted; 0 if there is none."""
    places, at = [], 0
    for branch in branches:
        places.append(max((i for i in range(len(branch)) if wanted[at + i]), default=0))
        at += len(branch)
    return places
