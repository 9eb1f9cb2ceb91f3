"""`layer_norm2d`: LayerNorm over C at each pixel of an N x C x H x W tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _check
from ._op import Op

aten = torch.ops.aten


def check(x: Any, weight: Any, bias: Any, eps: Any = 1e-5) -> None:
    _check.image("x", x)
    _check.parameter("weight", weight, (x.shape[1],), like=x)
    if bias is not None:
        _check.parameter("bias", bias, (x.shape[1],), like=x)
    _check.epsilon(eps)


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """LN(x), and what its backward needs: x as N x H x W x C, the mean and 1/std of each pixel."""
    nhwc = x.permute(0, 2, 3, 1)
    z, mean, rstd = aten.native_layer_norm(nhwc, [x.shape[1]], weight, bias, eps)
    z = z.permute(0, 3, 1, 2).contiguous(
        memory_format=reference.output_format(x)
    )  # as the reference sequence has it
    return z, (nhwc, mean, rstd)


def normalize_backward(
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `normalize` with respect to x, weight and bias, those of `mask`."""
    if not any(mask):
        return None, None, None
    nhwc, mean, rstd = saved
    gx, gw, gb = aten.native_layer_norm_backward(
        grad.permute(0, 2, 3, 1), nhwc, [nhwc.shape[3]], mean, rstd, weight, bias, list(mask)
    )
    return (gx.permute(0, 3, 1, 2) if mask[0] else None), gw, gb


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    _, saved = normalize(x, weight, bias, eps)
    return list(normalize_backward(grad, saved, weight, bias, output_mask))


def autocast(
    tensors: Sequence[Tensor], low: torch.dtype, device_type: str
) -> tuple[torch.dtype, torch.dtype]:
    """Autocast runs layer_norm in float32 on a GPU, and leaves it alone on a CPU."""
    dtype = torch.float32 if device_type == "cuda" else tensors[0].dtype
    return dtype, dtype


layer_norm2d = Op(
    name="layer_norm2d",
    arguments="Tensor x, Tensor weight, Tensor? bias, float eps=1e-5",
    check=check,
    reference=reference.layer_norm2d,
    reference_backward=backward,
    autocast=autocast,
    flops=lambda *_, **__: 0,  # FlopCounterMode counts no normalization
    backward_flops=lambda *_, **__: 0,
    kernel_checks=lambda x, weight, bias, eps=1e-5: type(eps) is float and 0 < eps < float("inf"),
)


def cuda_norm_supports(x: Tensor, *_: Any, **__: Any) -> str | None:
    """None if the CUDA C++ kernel can normalize x, else the reason why not."""
    if x.shape[1] > 4096:
        return f"the CUDA C++ kernel takes at most 4096 channels, and this tensor has {x.shape[1]}"
    return None


layer_norm2d.supports["cuda"] = cuda_norm_supports
