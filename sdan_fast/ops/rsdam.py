"""`rsdam`: x + LN(proj(MMLKA(SDM(x)))), a whole block of SDAN; fused for inference, its parts otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _check
from ._conv import Shape, conv_flops
from ._op import ComposedOp
from .layer_norm2d import layer_norm2d
from .mm_lka import check as check_mm_lka
from .mm_lka import cpu_supports as cpu_branches_support
from .mm_lka import flops as mm_lka_flops
from .mm_lka import mm_lka
from .pointwise_conv2d import pointwise_conv2d
from .sdm import check as check_sdm
from .sdm import cpu_supports as cpu_levels_support
from .sdm import flops as sdm_flops
from .sdm import sdm


def check(
    x: Any, distill: Any, star: Any, fuse: Any, weights: Any, biases: Any, attn_proj: Any, proj: Any, norm: Any,
    *, bias_mask: Any, dilations: Any, lengths: Any, eps: Any = 1e-5,
) -> None:  # fmt: skip
    check_sdm(x, distill, star, fuse, eps=eps)
    channels = x.shape[1]
    _check.parameter("fuse weight", fuse[0], (channels, fuse[0].shape[1], 1, 1), like=x)
    check_mm_lka(x, weights, biases, *attn_proj, bias_mask=bias_mask, dilations=dilations, lengths=lengths)
    _check.parameter("proj weight", proj[0], (channels, channels, 1, 1), like=x)
    _check.parameter("proj bias", proj[1], (channels,), like=x)
    _check.parameter("norm weight", norm[0], (channels,), like=x)
    _check.parameter("norm bias", norm[1], (channels,), like=x)


def compose(
    x: Tensor, distill: Sequence[Tensor], star: Sequence[Tensor], fuse: Sequence[Tensor], weights: Sequence[Tensor],
    biases: Sequence[Tensor], attn_proj: Sequence[Tensor], proj: Sequence[Tensor], norm: Sequence[Tensor],
    *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int], eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """The block as its parts, each on a backend of its own."""
    t = sdm(x, distill, star, fuse, eps=eps)
    t = mm_lka(t, weights, biases, *attn_proj, bias_mask=bias_mask, dilations=dilations, lengths=lengths)
    return x + layer_norm2d(pointwise_conv2d(t, proj[0], proj[1]), *norm, eps)


def flops(
    x: Shape, distill: Any, star: Any, fuse: Any, weights: Any, biases: Any, attn_proj: Any, proj: Any, norm: Any,
    **_: Any,
) -> int:  # fmt: skip
    attention = mm_lka_flops(x, weights, biases, *attn_proj)
    return sdm_flops(x, distill, star, fuse) + attention + conv_flops(x, proj[0])


rsdam = ComposedOp(
    name="rsdam",
    arguments=(
        "Tensor x, Tensor[] distill, Tensor[] star, Tensor[] fuse, Tensor[] weights, Tensor[] biases, "
        "Tensor[] attn_proj, Tensor[] proj, Tensor[] norm, *, bool[] bias_mask, int[] dilations, int[] lengths, "
        "float eps=1e-5"
    ),
    check=check,
    reference=compose,
    flops=flops,
)


def _cpu_supports(
    x: Tensor, distill: Sequence[Tensor], star: Sequence[Tensor], fuse: Any, weights: Sequence[Tensor], *_: Any,
    dilations: Sequence[int], lengths: Sequence[int], **__: Any,
) -> str | None:  # fmt: skip
    return cpu_levels_support(x, distill, star) or cpu_branches_support(weights, dilations, lengths)


rsdam.supports["cpu"] = _cpu_supports
