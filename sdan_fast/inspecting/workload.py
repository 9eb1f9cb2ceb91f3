"""The calls whose kernels are inspected: SDAN's own ops at its shapes, and the strips and squares of other models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdan_fast.modules import BRANCHES

from .arguments import attention_args, chain_args, gate_args, image, norm_args, normal, star_conv_args

PICTURE, PATCHES = (1, 180, 320), (8, 64, 64)  # N, H, W: one picture in inference, a batch in training
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
STRIPS = (3, 5, 7, 9, 11, 13, 17, 19, 21, 23, 31, 35)
# (k, dilation) of the stages of other models' chains: the strips of LSKA-23 and LSKA-35.
OTHER_CHAINS = {"lska23": [(5, 1), (7, 3)], "lska35": [(5, 1), (11, 3)]}


@dataclass(frozen=True)
class Case:
    """One call of an op.

    label: like "11x1 d6". make(): its positional and keyword arguments, new each time. ours: SDAN's own (56 channels,
    two branches), for which there are counts and modelled times. per_block: how often a block of SDAN makes the call.
    """

    op: str
    label: str
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    make: Callable[[], tuple[list[Any], dict[str, Any]]]
    ours: bool = False
    per_block: int = 0

    @property
    def name(self) -> str:
        dtype = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[self.dtype]
        words = (self.op, self.label, dtype, self.layout, "x".join(map(str, self.shape)))
        return " ".join(word for word in words if word)


def masks(op: str, args: list[Any]) -> list[list[bool]]:
    """The output masks of a backward that matter: everything (training), and x alone where that is another path."""
    slots = sum(len(a) if isinstance(a, list) else 1 for a in args)
    flat = [t for a in args for t in (a if isinstance(a, list) else [a])]
    everything = [t is not None for t in flat]
    if op in ("strip_conv_chain", "mm_lka"):
        return [everything, [True] + [False] * (slots - 1)]
    return [everything]


def convolutions(k: int, kind: str, dilation: int) -> list[tuple[int, int, int]]:
    """(kh, kw, dilation) of a "square" or "strip" stage."""
    return [(k, k, dilation)] if kind == "square" else [(1, k, dilation), (k, 1, dilation)]


def branches_of(groups: int) -> list[list[tuple[int, int, int]]]:
    """(kh, kw, dilation) of the convolutions of each branch of MM-LKA."""
    return [
        [*convolutions(k, local, 1), *convolutions(k, dilated, (k + 1) // 2)]
        for local, dilated, k in BRANCHES[groups]
    ]


def depthwise_args(shape: tuple[int, ...], kernel: tuple[int, int], dilation: int, dtype: torch.dtype,
                   fmt: torch.memory_format) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """Arguments of depthwise_conv2d."""
    weight = normal(shape[1], 1, *kernel, dtype=dtype, seed=1, scale=(kernel[0] * kernel[1]) ** -0.5)
    args = [image(*shape, dtype=dtype, fmt=fmt), weight, normal(shape[1], dtype=dtype, seed=2)]
    return args, {"dilation": [dilation, dilation]}


def star_args(shape: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format) -> list[Tensor]:
    """Arguments of star."""
    return [image(*shape, dtype=dtype, fmt=fmt, seed=s) for s in (0, 1)]


def own_cases(
    dtype: torch.dtype, layout: str, size: tuple[int, int, int], channels: int = 56
) -> Iterator[Case]:
    """The calls of one block of SDAN, with its default two branches, at one size."""
    fmt, n, h, w = FORMATS[layout], size[0], size[1], size[2]
    shape, half = (n, channels, h, w), (n, channels // 2, h, w)

    def case(op: str, label: str, make: Callable[[], Any], at: tuple[int, ...], per_block: int = 0) -> Case:
        return Case(op, label, dtype, layout, at, make, channels == 56, per_block)

    yield case("star", "gelu", lambda: (star_args(shape, dtype, fmt), {}), shape)
    yield case("layer_norm2d", "", lambda: (norm_args(shape, dtype, fmt), {}), shape, 1)
    yield case(
        "star_conv", f"to {channels}", lambda: (star_conv_args(shape, channels, dtype, fmt), {}), shape, 3
    )
    yield case(
        "star_conv", f"to {channels // 2}", lambda: (star_conv_args(shape, channels // 2, dtype, fmt), {}), shape, 1
    )  # fmt: skip
    yield case("pointwise_gate", "", lambda: (gate_args(shape, channels, dtype, fmt), {}), shape)
    yield case(
        "mm_lka",
        "2 groups",
        lambda: attention_args(shape, branches_of(2), dtype, fmt, biases_of_all=True),
        shape,
        1,
    )
    chain = ([(11, 1), (11, 6)], [True] * 4)
    yield case("strip_conv_chain", "11, 11 d6", lambda: chain_args(half, *chain, dtype, fmt), half)
    for kh, kw, d in [c for branch in branches_of(2) for c in branch] + [(3, 3, 1)]:
        label = f"{kh}x{kw}" + (f" d{d}" if d > 1 else "")
        yield case(
            "depthwise_conv2d", label,
            partial(depthwise_args, half, (kh, kw), d, dtype, fmt), half,
        )  # fmt: skip


def small_cases() -> Iterator[Case]:
    """SDAN's own calls on a tiny picture, whose PTX can be executed whole."""
    for dtype, layout in ((torch.float32, "nchw"), (torch.bfloat16, "nchw"), (torch.bfloat16, "nhwc")):
        yield from own_cases(dtype, layout, (1, 9, 24), 8)


def attentions(dtype: torch.dtype, layout: str) -> Iterator[Case]:
    """The attention with SDAN's other numbers of branches and channels, at the size of a picture."""
    for groups, channels in ((1, 56), (3, 48), (4, 56)):
        shape = (PICTURE[0], channels, *PICTURE[1:])
        make = partial(attention_args, shape, branches_of(groups), dtype, FORMATS[layout], biases_of_all=True)
        yield Case("mm_lka", f"{groups} groups", dtype, layout, shape, make)


def chains(dtype: torch.dtype, layout: str) -> Iterator[Case]:
    """Other models' chains, at the size of a picture."""
    shape = (PICTURE[0], 64, *PICTURE[1:])
    for label, stages in OTHER_CHAINS.items():
        make = partial(chain_args, shape, stages, [True] * 4, dtype, FORMATS[layout])
        yield Case("strip_conv_chain", label, dtype, layout, shape, make)


def other_cases(dtype: torch.dtype, layout: str) -> Iterator[Case]:
    """SDAN's other numbers of branches and channels, and other models' filters, at the size of a picture."""
    yield from attentions(dtype, layout)
    yield from chains(dtype, layout)
    shape = (PICTURE[0], 64, *PICTURE[1:])
    filters = [(a, b) for k in STRIPS for a, b in ((1, k), (k, 1))] + [(k, k) for k in (3, 5, 7, 9)]
    for kernel in filters:
        yield Case(
            "depthwise_conv2d", f"{kernel[0]}x{kernel[1]}", dtype, layout, shape,
            partial(depthwise_args, shape, kernel, 1, dtype, FORMATS[layout]),
        )  # fmt: skip
