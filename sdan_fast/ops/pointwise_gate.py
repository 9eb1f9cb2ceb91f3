"""`pointwise_gate`: u * (1x1 convolution of x), the product that ends an attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import _check
from ._conv import Shape, conv_backward, conv_backward_flops, conv_flops
from ._op import FLOATING, Op
from .depthwise_conv2d import in_large_channels_last


def check(u: Any, x: Any, weight: Any, bias: Any = None) -> None:
    try:  # small calls are mostly their checks: one look where nothing is wrong
        n, co, h, w = u.shape
        dtype, device = u.dtype, u.device
        if (
            dtype in FLOATING
            and x.dtype is dtype
            and weight.dtype is dtype
            and x.device == device
            and weight.device == device
            and u.layout is torch.strided
            and x.layout is torch.strided
            and weight.layout is torch.strided
            and x.shape == (n, weight.shape[1], h, w)
            and weight.shape == (co, x.shape[1], 1, 1)
            and 0 not in (co, h, w)
            and x.shape[1] > 0
            and (bias is None or (bias.shape == (co,) and bias.dtype is dtype and bias.device == device))
            and (bias is None or bias.layout is torch.strided)
        ):
            return
    except (AttributeError, ValueError):
        pass
    _check.image("u", u)
    _check.image("x", x, like=u, like_name="u")
    if u.shape[0] != x.shape[0] or u.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"u must agree with x in N, H and W, and their shapes are {_check.shape(u)} and {_check.shape(x)}"
        )
    _check.parameter("weight", weight, (u.shape[1], x.shape[1], 1, 1), like=u, like_name="u")
    if bias is not None:
        _check.parameter("bias", bias, (u.shape[1],), like=u, like_name="u")


def gate_backward(
    grad: Tensor, u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of u * conv1x1(x) with respect to u, x, weight and bias, those of `mask`."""
    gu = grad * F.conv2d(x, weight, bias) if mask[0] else None
    need = (mask[1], mask[2], mask[3])
    return [gu, *(conv_backward(grad * u, x, weight, need) if any(need) else (None, None, None))]


def backward(
    grad: Tensor,
    u: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    return gate_backward(grad, u, x, weight, bias, output_mask)


def gated_autocast(
    tensors: Sequence[Tensor], low: torch.dtype, device_type: str
) -> tuple[torch.dtype, torch.dtype]:
    """The convolution runs in the lower precision, and the product with the first tensor promotes."""
    dtype = torch.promote_types(tensors[0].dtype, low)
    return dtype, dtype


def flops(u: Shape, x: Shape, weight: Shape, bias: Shape | None = None, **_: Any) -> int:
    return conv_flops(x, weight)


def backward_flops(
    u: Shape, x: Shape, weight: Shape, bias: Shape | None = None, *, output_mask: Sequence[bool], **_: Any
) -> int:
    return conv_backward_flops(x, weight, (output_mask[1], output_mask[2], output_mask[3]))


pointwise_gate = Op(
    name="pointwise_gate",
    arguments="Tensor u, Tensor x, Tensor weight, Tensor? bias=None",
    check=check,
    reference=reference.pointwise_gate,
    reference_backward=backward,
    autocast=gated_autocast,
    flops=flops,
    backward_flops=backward_flops,
    kernel_checks=lambda *_, **__: True,
)


_WORK = 3_000_000  # multiply-adds from which PyTorch's product of bfloat16 is ahead


def slower(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """bfloat16 in channels_last, an odd number of inputs: they lie in no pairs, and this kernel multiplies float32."""
    inputs = weight.shape[1]
    if inputs % 2 == 1 and in_large_channels_last(u, torch.bfloat16, _WORK // inputs):
        return "PyTorch's own product is faster in channels_last and bfloat16 with an odd number of inputs"
    return None


pointwise_gate.slower["cpu"] = slower
