"""`star_conv`: outer(GELU(DW(PW1 z)) * PW2 z) with z = LN(x), the star of SDM in one op."""

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
from .layer_norm2d import cuda_norm_supports, normalize, normalize_backward
from .star import ACTIVATIONS
from .star import backward as star_backward


def check(
    x: Any,
    norm_weight: Any,
    norm_bias: Any,
    pw1_weight: Any,
    dw_weight: Any,
    dw_bias: Any,
    pw2_weight: Any,
    *,
    outer: Any = "none",
    eps: Any = 1e-5,
) -> None:
    _check.image("x", x)
    channels = x.shape[1]
    _check.parameter("norm_weight", norm_weight, (channels,), like=x)
    if norm_bias is not None:
        _check.parameter("norm_bias", norm_bias, (channels,), like=x)
    out = _check.pointwise("pw1_weight", pw1_weight, channels, like=x)
    _check.depthwise("dw_", dw_weight, dw_bias, out, like=x)
    _check.parameter("pw2_weight", pw2_weight, (out, channels, 1, 1), like=x)
    _check.choice("outer", outer, ACTIVATIONS)
    _check.epsilon(eps)


def backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    pw1_weight: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw2_weight: Tensor,
    *,
    outer: str = "none",
    eps: float = 1e-5,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    need_x, need_nw, need_nb, need_pw1, need_dw, need_db, need_pw2 = output_mask
    need_z = need_x or need_nw or need_nb
    z, saved = normalize(x, norm_weight, norm_bias, eps)
    p = F.conv2d(z, pw1_weight)
    a = reference.depthwise_conv2d(p, dw_weight, dw_bias)
    b = F.conv2d(z, pw2_weight)
    need_p, need_b = need_z or need_pw1, need_z or need_pw2
    ga, gb = star_backward(
        grad, a, b, activation="gelu", outer=outer, output_mask=[need_p or need_dw or need_db, need_b]
    )
    gp = gdw = gdb = gz1 = gpw1 = gz2 = gpw2 = None
    if ga is not None:
        gp, gdw, gdb = conv_backward(ga, p, dw_weight, (need_p, need_dw, need_db), groups=p.shape[1])
    if gp is not None:
        gz1, gpw1, _ = conv_backward(gp, z, pw1_weight, (need_z, need_pw1, False))
    if gb is not None:
        gz2, gpw2, _ = conv_backward(gb, z, pw2_weight, (need_z, need_pw2, False))
    gx = gnw = gnb = None
    if gz1 is not None and gz2 is not None:
        gx, gnw, gnb = normalize_backward(
            gz1 + gz2, saved, norm_weight, norm_bias, (need_x, need_nw, need_nb)
        )
    return [gx, gnw, gnb, gpw1, gdw, gdb, gpw2]


def autocast(
    tensors: Sequence[Tensor], low: torch.dtype, device_type: str
) -> tuple[torch.dtype, torch.dtype]:
    """Both branches end in the lower precision. Normalizing a rounded float32 x would lose what LN is there for, and
    of two 16-bit dtypes each lacks what the other has: so it is computed in what holds both, and its result rounded.
    """
    return torch.promote_types(tensors[0].dtype, low), low


def flops(
    x: Shape, norm_weight: Shape, norm_bias: Shape | None, pw1: Shape, dw: Shape, dw_bias: Shape | None, pw2: Shape,
    **_: Any,
) -> int:  # fmt: skip
    p = [x[0], pw1[0], *x[2:]]
    return conv_flops(x, pw1) + conv_flops(p, dw) + conv_flops(x, pw2)


def backward_flops(
    x: Shape, norm_weight: Shape, norm_bias: Shape | None, pw1: Shape, dw: Shape, dw_bias: Shape | None, pw2: Shape,
    *, output_mask: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    need_x, need_nw, need_nb, need_pw1, need_dw, need_db, need_pw2 = output_mask
    need_z = need_x or need_nw or need_nb
    p = [x[0], pw1[0], *x[2:]]
    return (
        conv_backward_flops(p, dw, (need_z or need_pw1, need_dw, need_db))
        + conv_backward_flops(x, pw1, (need_z, need_pw1, False))
        + conv_backward_flops(x, pw2, (need_z, need_pw2, False))
    )


star_conv = Op(
    name="star_conv",
    arguments=(
        "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor pw1_weight, Tensor dw_weight, Tensor? dw_bias, "
        'Tensor pw2_weight, *, str outer="none", float eps=1e-5'
    ),
    check=check,
    reference=reference.star_conv,
    reference_backward=backward,
    autocast=autocast,
    flops=flops,
    backward_flops=backward_flops,
    output_shape=lambda x, norm_weight, norm_bias, pw1, *_, **__: [x.shape[0], pw1.shape[0], *x.shape[2:]],
)


def _cuda_supports(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    pw1_weight: Tensor,
    dw_weight: Tensor,
    *_: Any,
    **__: Any,
) -> str | None:
    """None if the CUDA C++ kernel can run this call, else the reason why not."""
    if tuple(dw_weight.shape[-2:]) != (3, 3):
        return "the CUDA C++ kernel of star_conv takes depth-wise weights of 3 x 3 taps only"
    return cuda_norm_supports(x)


star_conv.supports["cuda"] = _cuda_supports


_MOST_TAPS = 255  # of the CPU kernel, which keeps that many rows of a level


def cpu_taps_support(dw_weights: Sequence[Any]) -> str | None:
    """None if the CPU kernel can run star convolutions of these depth-wise weights, else the reason why not."""
    if any(isinstance(w, Tensor) and max(w.shape[-2:], default=0) > _MOST_TAPS for w in dw_weights):
        return (
            f"the CPU kernel of star_conv takes depth-wise weights of up to {_MOST_TAPS} x {_MOST_TAPS} taps"
        )
    return None


star_conv.supports["cpu"] = lambda x, nw, nb, pw1, dw_weight, *_, **__: cpu_taps_support([dw_weight])
