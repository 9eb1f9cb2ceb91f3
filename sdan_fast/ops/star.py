"""`star`: outer(activation(a) * b), the element-wise product of an activated and a linear branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _check
from ._op import FLOATING, Op

aten = torch.ops.aten
ACTIVATIONS = tuple(reference.ACTIVATIONS)


def check(a: Any, b: Any, *, activation: Any = "gelu", outer: Any = "none") -> None:
    try:  # the cheapest op pays for its checks the most: one look where nothing is wrong
        if (
            a.shape == b.shape
            and a.dtype is b.dtype
            and a.dtype in FLOATING
            and a.device == b.device
            and activation in ACTIVATIONS
            and outer in ACTIVATIONS
            and a.layout is torch.strided
            and b.layout is torch.strided
        ):
            return
    except AttributeError:
        pass
    _check.tensor("a", a)
    _check.tensor("b", b, like=a, like_name="a")
    if a.shape != b.shape:
        raise ValueError(f"b must have the shape {_check.shape(a)} of a, and its shape is {_check.shape(b)}")
    _check.choice("activation", activation, ACTIVATIONS)
    _check.choice("outer", outer, ACTIVATIONS)


def activation_backward(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of an activation at `x`."""
    if name == "gelu":
        return aten.gelu_backward(grad, x)
    if name == "relu6":
        return aten.hardtanh_backward(grad, x, 0.0, 6.0)
    if name == "relu":
        return aten.threshold_backward(grad, x, 0.0)
    if name == "silu":
        if torch.is_grad_enabled():  # aten's own has no derivative
            s = torch.sigmoid(x)
            return grad * s * (1 + x * (1 - s))
        return aten.silu_backward(grad, x)
    return grad


def backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    activation: str = "gelu",
    outer: str = "none",
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    s = reference.ACTIVATIONS[activation](a)
    if outer != "none":
        grad = activation_backward(outer, grad, s * b)
    return [
        activation_backward(activation, grad * b, a) if output_mask[0] else None,
        grad * s if output_mask[1] else None,
    ]


def autocast(
    tensors: Sequence[Tensor], low: torch.dtype, device_type: str
) -> tuple[torch.dtype, torch.dtype]:
    """Element-wise ops follow type promotion."""
    dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    return dtype, dtype


star = Op(
    name="star",
    arguments='Tensor a, Tensor b, *, str activation="gelu", str outer="none"',
    check=check,
    reference=reference.star,
    reference_backward=backward,
    autocast=autocast,
    flops=lambda *_, **__: 0,  # FlopCounterMode counts no element-wise op
    backward_flops=lambda *_, **__: 0,
    kernel_checks=lambda *_, **__: True,
)
