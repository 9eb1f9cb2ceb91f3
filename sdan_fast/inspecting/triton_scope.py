"""Which calls the table of Triton kernels is made of, and for which targets each is compiled.

What differs between targets is the code generator and not the kernel. sm_80 gets every dtype and layout, the other
targets SDAN's own calls and the strips in bfloat16 NCHW, and of everything else each filter, axis and layout, with
the dtypes in rotation. Filters' lengths that are not in EVERYWHERE go to sm_80 alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from sdan_fast.kernels.star import ACTIVATIONS

from . import workload
from .arguments import gate_args, norm_args, star_conv_args
from .triton_kernels import TARGETS
from .workload import FORMATS, PATCHES, PICTURE, Case

Target = int | str
# Calls, targets, and whose launches in their backwards count: the beginning of kernels' names, None for no backward.
Scope = tuple[Iterable[Case], tuple[Target, ...], str | None]

EVERYWHERE = (3, 7, 9, 11, 23, 63)
ELSEWHERE = (5, 13, 17, 19, 21, 31, 35)  # on sm_80 alone
SQUARES = (3, 5, 7, 9)
CHANNELS = ((48, 48), (48, 24), (28, 28), (12, 28))  # of star_conv beside SDAN's 56 and 28


def strips(dtype: torch.dtype, layout: str, lengths: Iterable[int]) -> Iterator[Case]:
    """1xk and kx1 filters of 64 channels, of 3 and 11 taps also dilated; and of an image whose rows are not aligned."""
    for k in lengths:
        for kernel in ((1, k), (k, 1)):
            dilations = (1, (k + 1) // 2) if k in (3, 11) else (1,)
            for d in dilations:
                yield depthwise(dtype, layout, kernel, d, (PICTURE[0], 64, *PICTURE[1:]))
    if 11 in lengths:
        for kernel in ((1, 11), (11, 1), (3, 3)):
            yield depthwise(dtype, layout, kernel, 1, (2, 3, 20, 33))


def depthwise(
    dtype: torch.dtype, layout: str, kernel: tuple[int, int], d: int, shape: tuple[int, ...]
) -> Case:
    """One call of depthwise_conv2d."""
    label = f"{kernel[0]}x{kernel[1]}" + (f" d{d}" if d > 1 else "")
    make = partial(workload.depthwise_args, shape, kernel, d, dtype, FORMATS[layout])
    return Case("depthwise_conv2d", label, dtype, layout, shape, make)


def squares(dtype: torch.dtype, layout: str) -> Iterator[Case]:
    """KxK filters of 64 channels."""
    for k in SQUARES:
        yield depthwise(dtype, layout, (k, k), 1, (PICTURE[0], 64, *PICTURE[1:]))


def products(dtype: torch.dtype, layout: str, channel_counts: Iterable[tuple[int, int]]) -> Iterator[Case]:
    """The ops that hold all channels of a pixel, with other numbers of channels than SDAN's 56."""
    fmt = FORMATS[layout]
    for channels, out in channel_counts:
        shape = (PICTURE[0], channels, *PICTURE[1:])

        def case(op: str, label: str, make: object, shape: tuple[int, ...] = shape) -> Case:
            return Case(op, label, dtype, layout, shape, lambda: (make(), {}))  # type: ignore[operator]

        yield case("star_conv", f"to {out}", partial(star_conv_args, shape, out, dtype, fmt))
        if channels == out or channels == 12:
            yield case("layer_norm2d", "", partial(norm_args, shape, dtype, fmt))
            yield case("pointwise_gate", f"to {out}", partial(gate_args, shape, out, dtype, fmt))


def stars(dtype: torch.dtype, every: bool) -> Iterator[Case]:
    """The star with its activations: every pair in float32, a few in the other dtypes."""
    shape = (PICTURE[0], 56, *PICTURE[1:])
    for kind in ACTIVATIONS if every else ("gelu", "relu6", "silu"):
        for outer in ACTIVATIONS if every and dtype == torch.float32 else sorted({"none", kind}):

            def make(kind: str = kind, outer: str = outer) -> tuple[list[object], dict[str, object]]:
                args = workload.star_args(shape, dtype, torch.contiguous_format)
                return list(args), {"activation": kind, "outer": outer}

            yield Case("star", f"{kind} {outer}", dtype, "nchw", shape, make)


def scope() -> Iterator[Scope]:
    """Some 2,500 configurations, of two seconds each. An input's gradient is the forward kernel, its filter flipped."""
    sm_80 = (80,)
    half, single = torch.bfloat16, torch.float32
    yield workload.own_cases(half, "nchw", PICTURE), TARGETS, ""
    yield strips(half, "nchw", EVERYWHERE), TARGETS, None
    for dtype in (half, single, torch.float16):
        yield stars(dtype, True), sm_80, ""
    for layout in FORMATS:
        yield workload.own_cases(torch.float16, layout, PICTURE), sm_80, None
    for n, (dtype, layout) in enumerate(itertools.product((half, single), FORMATS)):
        # One dtype of each layout for each of the other targets; sm_80 has all four.
        rotation = tuple(t for i, t in enumerate(TARGETS) if t == 80 or (i + n // 2 + n % 2) % 2)
        yield workload.own_cases(dtype, layout, PICTURE), rotation, None
        yield strips(dtype, layout, EVERYWHERE), rotation, "wgrad"
        yield squares(dtype, layout), rotation, "wgrad"
        yield products(dtype, layout, CHANNELS[:2]), rotation, None
        yield workload.attentions(dtype, layout), rotation, None
        yield workload.chains(dtype, layout), rotation, None
        yield workload.own_cases(dtype, layout, PICTURE), sm_80, ""
        yield workload.own_cases(dtype, layout, PATCHES), sm_80, ""
        yield products(dtype, layout, CHANNELS), sm_80, ""
        if n in (0, 3):
            yield strips(dtype, layout, ELSEWHERE), sm_80, "wgrad"
            yield workload.attentions(dtype, layout), sm_80, ""
