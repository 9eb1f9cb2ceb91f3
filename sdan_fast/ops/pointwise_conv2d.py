"""`pointwise_conv2d`: activation(1x1 convolution of x), what lies between the other ops of the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import _check
from ._conv import Shape, conv_backward, conv_backward_flops, conv_flops
from ._op import Op
from .depthwise_conv2d import AMX, convolution_autocast, in_large_channels_last
from .star import ACTIVATIONS, activation_backward


def check(x: Any, weight: Any, bias: Any = None, *, activation: Any = "none") -> None:
    _check.image("x", x)
    out = _check.pointwise("weight", weight, x.shape[1], like=x)
    if bias is not None:
        _check.parameter("bias", bias, (out,), like=x)
    _check.choice("activation", activation, ACTIVATIONS)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    if activation != "none":
        grad = activation_backward(activation, grad, F.conv2d(x, weight, bias))
    need_x, need_weight, need_bias = output_mask
    return list(conv_backward(grad, x, weight, (need_x, need_weight, need_bias)))


def flops(x: Shape, weight: Shape, bias: Shape | None = None, **_: Any) -> int:
    return conv_flops(x, weight)


def backward_flops(
    x: Shape, weight: Shape, bias: Shape | None = None, *, output_mask: Sequence[bool], **_: Any
) -> int:
    return conv_backward_flops(x, weight, (output_mask[0], output_mask[1], output_mask[2]))


pointwise_conv2d = Op(
    name="pointwise_conv2d",
    arguments='Tensor x, Tensor weight, Tensor? bias=None, *, str activation="none"',
    check=check,
    reference=reference.pointwise_conv2d,
    reference_backward=backward,
    autocast=convolution_autocast,
    flops=flops,
    backward_flops=backward_flops,
    output_shape=lambda x, weight, *_, **__: [x.shape[0], weight.shape[0], *x.shape[2:]],
    plain_elsewhere=True,
    kernel_checks=lambda *_, **__: True,
)


_LARGE = 2_000_000  # elements from which oneDNN's products of matrix tiles are ahead


def slower(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> str | None:
    """Large channels_last images of bfloat16 and nothing after the product, where that is one of matrix tiles."""
    if AMX and activation == "none" and in_large_channels_last(x, torch.bfloat16, _LARGE):
        return "PyTorch's own product is faster in channels_last and bfloat16 without an activation"
    return None


pointwise_conv2d.slower["cpu"] = slower
