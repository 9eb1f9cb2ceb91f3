"""`sdm`: the whole star distillation module; fused for inference, its parts otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._conv import Shape, conv_flops
from ._op import ComposedOp
from .pointwise_conv2d import pointwise_conv2d
from .star_conv import check as check_star_conv
from .star_conv import cpu_taps_support, star_conv
from .star_conv import flops as star_conv_flops

PER_LEVEL = 6  # norm weight and bias, pw1, dw weight and bias, pw2


def levels_of(star: Sequence[Any]) -> list[Sequence[Any]]:
    """The flat list of star parameters by level."""
    return [star[i : i + PER_LEVEL] for i in range(0, len(star), PER_LEVEL)]


def check(x: Any, distill: Any, star: Any, fuse: Any, *, eps: Any = 1e-5) -> None:
    _check.image("x", x)
    if len(star) % PER_LEVEL or not star or len(distill) % 2 or len(distill) // 2 > len(star) // PER_LEVEL:
        raise ValueError(
            f"star must hold {PER_LEVEL} tensors for each of one or more levels and distill a weight and a bias for "
            f"each of no more levels, and they hold {len(star)} and {len(distill)}"
        )
    gathered, level_input = 0, x
    for i, level in enumerate(levels_of(star)):
        channels = level_input.shape[1]
        if 2 * i < len(distill):
            weight, bias = distill[2 * i : 2 * i + 2]
            out = _check.pointwise(f"distill[{i}] weight", weight, channels, like=x)
            _check.parameter(f"distill[{i}] bias", bias, (out,), like=x)
            gathered += out
        check_star_conv(level_input, *level, eps=eps)
        level_input = x.new_empty((0, level[2].shape[0], 1, 1))
    out = _check.pointwise("fuse weight", fuse[0], gathered + level_input.shape[1], like=x)
    _check.parameter("fuse bias", fuse[1], (out,), like=x)


def compose(
    x: Tensor, distill: Sequence[Tensor], star: Sequence[Tensor], fuse: Sequence[Tensor], *, eps: float = 1e-5
) -> Tensor:
    """SDM as its parts, each on a backend of its own."""
    parts = []
    for i, level in enumerate(levels_of(star)):
        if 2 * i < len(distill):
            parts.append(pointwise_conv2d(x, distill[2 * i], distill[2 * i + 1], activation="gelu"))
        x = star_conv(x, *level, outer="gelu", eps=eps)
    return pointwise_conv2d(torch.cat([*parts, x], dim=1), fuse[0], fuse[1])


def flops(x: Shape, distill: Sequence[Shape], star: Sequence[Shape], fuse: Sequence[Shape], **_: Any) -> int:
    n, c, h, w = x
    total = 0
    for i, level in enumerate(levels_of(star)):
        if 2 * i < len(distill):
            total += conv_flops([n, c, h, w], distill[2 * i])
        total += star_conv_flops([n, c, h, w], *level)
        c = level[2][0]
    return total + conv_flops(x, fuse[0])


sdm = ComposedOp(
    name="sdm",
    arguments="Tensor x, Tensor[] distill, Tensor[] star, Tensor[] fuse, *, float eps=1e-5",
    check=check,
    reference=compose,
    flops=flops,
    output_shape=lambda x, distill, star, fuse, **_: [x.shape[0], fuse[0].shape[0], *x.shape[2:]],
)


_MOST_LEVELS = 8


def cpu_supports(x: Tensor, distill: Sequence[Any], star: Sequence[Any], *_: Any, **__: Any) -> str | None:
    """None if the CPU kernel can run these levels, else the reason why not. The arguments may not be checked yet."""
    levels = len(star) // PER_LEVEL
    if len(distill) // 2 != levels - 1 or levels > _MOST_LEVELS:
        return f"the CPU kernel takes up to {_MOST_LEVELS} levels, of which all but the last distil"
    return cpu_taps_support(star[3::PER_LEVEL])


sdm.supports["cpu"] = cpu_supports
