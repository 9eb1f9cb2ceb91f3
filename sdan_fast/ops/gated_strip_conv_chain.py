"""`gated_strip_conv_chain`: u * strip_conv_chain(x), the product fused into the chain's last pass for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _check
from ._conv import Shape
from ._op import ComposedOp
from .depthwise_conv2d import in_large_channels_last, read_in_place
from .strip_conv_chain import check as check_chain
from .strip_conv_chain import flops as chain_flops
from .strip_conv_chain import strip_conv_chain


def check(u: Any, x: Any, weights: Any, biases: Any, *, bias_mask: Any, dilations: Any) -> None:
    _check.image("u", u)
    check_chain(x, weights, biases, bias_mask=bias_mask, dilations=dilations)
    _check.parameter("u", u, tuple(x.shape), like=x)


def compose(
    u: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bias_mask: Sequence[bool],
    dilations: Sequence[int],
) -> Tensor:
    """The chain, on a backend of its own, then the product."""
    y = u * strip_conv_chain(x, weights, biases, bias_mask=bias_mask, dilations=dilations)
    return y.contiguous(memory_format=reference.output_format(u))


def flops(u: Shape, x: Shape, weights: Sequence[Shape], biases: Sequence[Shape], **_: Any) -> int:
    return chain_flops(x, weights, biases)


gated_strip_conv_chain = ComposedOp(
    name="gated_strip_conv_chain",
    arguments="Tensor u, Tensor x, Tensor[] weights, Tensor[] biases, *, bool[] bias_mask, int[] dilations",
    check=check,
    reference=compose,
    flops=flops,
)


def slower(u: Tensor, *_: Any, **__: Any) -> str | None:
    """Large channels_last images: a second pass over whole pixels is cheaper than a gate read by groups of channels."""
    large = any(in_large_channels_last(u, dtype) for dtype in (torch.float32, torch.bfloat16))
    if large and not read_in_place(u):
        return "the chain and the product apart are faster in channels_last"
    return None


gated_strip_conv_chain.slower["cpu"] = slower
