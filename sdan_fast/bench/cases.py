"""The registry of benchmark cases: every op at the sizes, kernels, dtypes and layouts that it is measured in.

One table, `SUBJECTS`, serves `sdan-fast bench ops`, the pytest-benchmark suite in benchmarks/ and the check on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sdan_fast import functional, reference
from sdan_fast.modules import MMLKA, RSDAM, SDM

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Draw = Callable[..., Tensor]  # (*shape) -> normally distributed values
Size = tuple[int, int]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "forward+backward")

CHANNELS = 56  # SDAN's
CHUNK = CHANNELS // 2  # what one branch of its attention sees

# Height x width. The thrifty set: what a cache holds and what it does not; the full one adds the ends.
SIZES: tuple[Size, ...] = ((64, 64), (180, 320))
FULL_SIZES: tuple[Size, ...] = ((16, 16), (64, 64), (180, 320), (341, 511), (1080, 1920))
GPU_SIZES: tuple[Size, ...] = ((180, 320), (720, 1280), (341, 511))
GPU_BATCHES = (8, 1, 4)  # of these sizes: SDAN's own, a large image, one whose rows start at odd addresses


@dataclass(frozen=True)
class Variant:
    """One setting of an op: what `make` of its subject takes, and a name for the tables.

    Attributes:
        name: as in "7x7 d4".
        options: keyword arguments of the subject's `make`.
        usual: part of the thrifty set.
        largest: pixels beyond which eager PyTorch takes minutes for this setting, so that it is not measured.
        channels: where they are not the subject's.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    usual: bool = True
    largest: int = 2**31
    channels: int | None = None


@dataclass(frozen=True)
class Subject:
    """One op as it is measured: its name in `functional` and `reference`, its channels, arguments and settings."""

    op: str
    channels: int
    make: Callable[..., Arguments]
    variants: tuple[Variant, ...] = (Variant(""),)

    @property
    def ours(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(functional, self.op)
        return function

    @property
    def plain(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(reference, self.op)
        return function


@dataclass(frozen=True)
class Case:
    """One call to be measured, in one dtype: the layouts compete within it."""

    subject: Subject
    variant: Variant
    size: Size
    dtype: str = "float32"
    batch: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.variant.channels or self.subject.channels, *self.size)

    @property
    def name(self) -> str:
        """Such as "depthwise_conv2d 7x7 d4, 1x28x180x320, float32"."""
        return f"{self.title}, {'x'.join(map(str, self.shape))}, {self.dtype}"

    @property
    def title(self) -> str:
        """The op and its setting."""
        return f"{self.subject.op} {self.variant.name}".strip()

    def arguments(self, layout: str = "NCHW", device: str = "cpu") -> Arguments:
        """The same numbers on every machine, in one memory layout."""
        drawn = _drawn(self.subject.make, self.shape, tuple(self.variant.options.items()))
        return moved(drawn, device, DTYPES[self.dtype], layout)


# One case is asked for in several layouts, and large ones take a second to draw.
@functools.lru_cache(maxsize=1)
def _drawn(
    make: Callable[..., Arguments], shape: tuple[int, ...], options: tuple[tuple[str, Any], ...]
) -> Arguments:
    """A case's arguments in float32 on the CPU; nobody may write to them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return make(draw, shape, **dict(options))


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of an argument tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def moved(arguments: Arguments, device: str, dtype: torch.dtype, layout: str) -> Arguments:
    """The same values on a device, in a dtype; 4-D tensors in a memory layout, as `module.to` would have them."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().to(device, dtype)
        return leaf.contiguous(memory_format=LAYOUTS[layout]) if leaf.dim() == 4 else leaf

    result: Arguments = pytree.tree_map(move, arguments)
    return result


# --- arguments of each op ----------------------------------------------------------------------------------------


def _depthwise(
    draw: Draw, shape: Sequence[int], kernel: Size = (3, 3), dilation: int | Size = 1
) -> Arguments:
    weight = draw(shape[1], 1, *kernel) / math.sqrt(math.prod(kernel))
    return (draw(*shape), weight, draw(shape[1])), {"dilation": dilation}


def _strips(draw: Draw, channels: int, k: int, dilation: int) -> tuple[Any, ...]:
    horizontal, vertical = (draw(channels, 1, *kernel) / math.sqrt(k) for kernel in ((1, k), (k, 1)))
    return horizontal, draw(channels), vertical, draw(channels), dilation


def _chain(draw: Draw, shape: Sequence[int], k: int = 11, dilation: int | None = None) -> Arguments:
    second = (k + 1) // 2 if dilation is None else dilation
    return (draw(*shape), [_strips(draw, shape[1], k, d) for d in (1, second)]), {}


def _gated_chain(draw: Draw, shape: Sequence[int], k: int = 11) -> Arguments:
    (x, stages), kwargs = _chain(draw, shape, k)
    return (draw(*shape), x, stages), kwargs


def _star(draw: Draw, shape: Sequence[int], activation: str = "gelu", outer: str = "none") -> Arguments:
    return (draw(*shape), draw(*shape)), {"activation": activation, "outer": outer}


def _norm(draw: Draw, shape: Sequence[int]) -> Arguments:
    return (draw(*shape), draw(shape[1]), draw(shape[1])), {}


def _pointwise(draw: Draw, shape: Sequence[int], activation: str = "none") -> Arguments:
    c = shape[1]
    return (draw(*shape), draw(c, c, 1, 1) / math.sqrt(c), draw(c)), {"activation": activation}


def _gate(draw: Draw, shape: Sequence[int]) -> Arguments:
    c = shape[1]
    return (draw(*shape), draw(*shape), draw(c, c, 1, 1) / math.sqrt(c), draw(c)), {}


def _star_conv(draw: Draw, shape: Sequence[int], out: int = CHANNELS, outer: str = "gelu") -> Arguments:
    c = shape[1]
    first, second = (draw(out, c, 1, 1) / math.sqrt(c) for _ in range(2))
    filters = (draw(c), draw(c), first, draw(out, 1, 3, 3) / 3, draw(out), second)
    return (draw(*shape), *filters), {"outer": outer}


def _filled(module: torch.nn.Module, draw: Draw) -> Any:
    """The module with random parameters that keep activations near 1."""
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() == 4 else 1
        parameter.data = draw(*parameter.shape) / math.sqrt(fan_in)
    return module.requires_grad_(False)


def _mm_lka(draw: Draw, shape: Sequence[int], groups: int = 2) -> Arguments:
    attention = _filled(MMLKA(shape[1], groups), draw)
    parameters = (attention.branches_in_order(), attention.proj.weight, attention.proj.bias)
    return (draw(*shape), *parameters), {}


def _sdm(draw: Draw, shape: Sequence[int]) -> Arguments:
    return (draw(*shape), *_filled(SDM(shape[1]), draw).parameters_in_order()), {}


def _rsdam(draw: Draw, shape: Sequence[int], groups: int = 2) -> Arguments:
    return (draw(*shape), *_filled(RSDAM(shape[1], groups), draw).parameters_in_order()), {}


# --- the table ---------------------------------------------------------------------------------------------------

_KERNELS = (3, 5, 7, 9, 11, 13, 17, 21, 25, 31, 35)
_DILATIONS = (1, 2, 3, 4, 5, 6)


def _filters() -> Iterator[Variant]:
    """Strips of every length and dilation, squares as far as they are used, and the largest of all."""
    usual = {((3, 3), 1), ((7, 7), 1), ((7, 7), 4), ((1, 11), 1), ((1, 11), 6), ((11, 1), 6)}
    for k in _KERNELS:
        for dilation in _DILATIONS:
            kernels: list[Size] = [(1, k), (k, 1)]
            if k <= 13 or dilation in (1, 6):
                kernels.append((k, k))
            for kh, kw in kernels:
                name = f"{kh}x{kw}" + (f" d{dilation}" if dilation > 1 else "")
                taps = kh * kw
                yield Variant(
                    name,
                    {"kernel": (kh, kw), "dilation": dilation},
                    usual=((kh, kw), dilation) in usual,
                    largest=2**31 if taps <= 49 else 341 * 511 if taps <= 169 else 64 * 64,
                )


def _chains() -> Iterator[Variant]:
    for k in _KERNELS:
        yield Variant(f"k{k} d1, d{(k + 1) // 2}", {"k": k}, usual=k == 11)
        for dilation in _DILATIONS:
            if dilation != (k + 1) // 2:
                yield Variant(f"k{k} d1, d{dilation}", {"k": k, "dilation": dilation}, usual=False)


SUBJECTS: dict[str, Subject] = {
    subject.op: subject
    for subject in (
        Subject("depthwise_conv2d", CHUNK, _depthwise, tuple(_filters())),
        Subject("strip_conv_chain", CHUNK, _chain, tuple(_chains())),
        Subject(
            "gated_strip_conv_chain",
            CHUNK,
            _gated_chain,
            tuple(Variant(f"k{k}", {"k": k}, usual=k == 11) for k in (11, 21, 35)),
        ),
        Subject(
            "star",
            CHANNELS,
            _star,
            (Variant("gelu"), Variant("relu6, outer gelu", {"activation": "relu6", "outer": "gelu"}, False)),
        ),
        Subject("layer_norm2d", CHANNELS, _norm),
        Subject(
            "pointwise_conv2d",
            CHANNELS,
            _pointwise,
            (Variant(""), Variant("gelu", {"activation": "gelu"}, False)),
        ),
        Subject("pointwise_gate", CHANNELS, _gate),
        Subject(
            "star_conv",
            CHANNELS,
            _star_conv,
            (Variant(f"to {CHANNELS}"), Variant(f"to {CHUNK}", {"out": CHUNK}, False)),
        ),
        Subject(
            "mm_lka",
            CHANNELS,
            _mm_lka,
            tuple(
                Variant(f"groups={g}", {"groups": g}, g == 2, channels=54 if g == 3 else None)
                for g in (1, 2, 3, 4)
            ),
        ),
        Subject("sdm", CHANNELS, _sdm),
        Subject(
            "rsdam",
            CHANNELS,
            _rsdam,
            tuple(Variant(f"groups={g}", {"groups": g}, g == 2) for g in (1, 2, 4)),
        ),
    )
}


def cases(
    *,
    ops: Iterable[str] | None = None,
    sizes: Iterable[Size] | None = None,
    dtypes: Iterable[str] = ("float32",),
    full: bool = False,
    batch: int = 1,
) -> list[Case]:
    """The cases of some ops, or of all.

    Args:
        ops: names of `SUBJECTS`; None for all.
        sizes: (height, width) each; None for the thrifty set, or the full one.
        dtypes: names of `DTYPES`.
        full: every kernel size and dilation, and not only those of SDAN.
        batch: N.

    Raises:
        ValueError: for an op or a dtype that is not in the tables.
    """
    chosen = list(SUBJECTS) if ops is None else list(ops)
    for name, known in [*((op, list(SUBJECTS)) for op in chosen), *((d, list(DTYPES)) for d in dtypes)]:
        if name not in known:
            raise ValueError(f"must be one of {', '.join(known)}, and it is {name!r}")
    sizes = list(sizes or (FULL_SIZES if full else SIZES))
    return [
        Case(SUBJECTS[op], variant, size, dtype, batch)
        for op in chosen
        for variant in SUBJECTS[op].variants
        if full or variant.usual
        for size in sizes
        if math.prod(size) <= variant.largest
        for dtype in dtypes
    ]


# Inductor takes a minute to compile the backward of these, which are several ops in a row.
_LONG = ("sdm", "rsdam")


def jobs(chosen: Iterable[Case], direction: str = "both") -> list[tuple[Case, str]]:
    """Cases with the passes to measure: with "both", backward at the smallest size of each op alone, where it is short.

    Args:
        chosen: as `cases` gives them.
        direction: one of `PASSES`, which is taken literally, or "both".
    """
    chosen = list(chosen)
    if direction != "both":
        return [(case, direction) for case in chosen]
    smallest = min((math.prod(case.size) for case in chosen), default=0)
    result = []
    for case in chosen:
        result.append((case, PASSES[0]))
        if math.prod(case.size) == smallest and case.subject.op not in _LONG:
            result.append((case, PASSES[1]))
    return result
