"""`depthwise_conv2d`: one depth-wise convolution, strip or square, with "same" zero padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _check
from ._conv import Conv, Shape, chain_backward, chain_backward_flops, conv_flops
from ._op import Op

Pair = Sequence[int]


def check(x: Any, weight: Any, bias: Any = None, *, dilation: Any = (1, 1)) -> None:
    _check.image("x", x)
    _check.depthwise("", weight, bias, x.shape[1], like=x)
    _check.dilations("dilation", dilation, 2)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: Pair = (1, 1),
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    convs = [Conv(weight, bias, reference.pair(dilation))]
    need_x, need_weight, need_bias = output_mask
    gx, [(gw, gb)] = chain_backward(grad, [x], convs, need_x, [(need_weight, need_bias)])
    return [gx, gw, gb]


def convolution_autocast(
    tensors: Sequence[Tensor], low: torch.dtype, device_type: str
) -> tuple[torch.dtype, torch.dtype]:
    """Autocast runs convolutions in the lower precision."""
    return low, low


def flops(x: Shape, weight: Shape, bias: Shape | None = None, **_: Any) -> int:
    return conv_flops(x, weight)


def backward_flops(
    x: Shape, weight: Shape, bias: Shape | None = None, *, output_mask: Sequence[bool], **_: Any
) -> int:
    return chain_backward_flops(x, [weight], output_mask[0], [(output_mask[1], output_mask[2])])


depthwise_conv2d = Op(
    name="depthwise_conv2d",
    arguments="Tensor x, Tensor weight, Tensor? bias=None, *, int[2] dilation=1",
    check=check,
    reference=reference.depthwise_conv2d,
    reference_backward=backward,
    autocast=convolution_autocast,
    flops=flops,
    backward_flops=backward_flops,
)
