"""Triton kernels of the gated 1x1 convolution u * (W x + b): bias and gate in the product's epilogue; its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import pointwise
from .launch import image_layout, output_format, unavailable, wide_plane


def supports(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """None if the kernels can run this call, else the reason why not."""
    return unavailable(u, x, weight, bias)


def forward(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """u * (1x1 convolution of x): u (N, Co, H, W), x (N, Ci, H, W), weight (Co, Ci, 1, 1); u's memory format; one
    launch.
    """
    fmt = output_format(u)
    u, x = u.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    y = torch.empty_like(u, memory_format=fmt)
    if y.numel() > 0:
        pointwise.product(
            x,
            weight,
            y,
            image_layout(fmt, x),
            image_layout(fmt, y, u),
            bias=bias,
            gate=u,
            wide=wide_plane(u, x),
        )
    return y


def backward(
    grad_output: Tensor, u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in [u, x, weight, bias] where `output_mask` asks: one launch each for u and x, two for weight and bias.

    u's is the forward kernel with the gradient in u's place; x's the product of W^T with g * u, formed on the way.
    """
    need_u, need_x, need_weight, need_bias = output_mask
    fmt = output_format(u)
    g, u, x = (t.contiguous(memory_format=fmt) for t in (grad_output, u, x))
    grads = []
    empty = g.numel() == 0 or x.numel() == 0
    lay, out_lay, wide = image_layout(fmt, x), image_layout(fmt, g, u), wide_plane(u, x)
    if need_u:
        gu = torch.empty_like(u, memory_format=fmt)
        if not empty:
            pointwise.product(x, weight, gu, lay, out_lay, bias=bias, gate=g, wide=wide)
        grads.append(gu)
    if need_x:
        gx = torch.empty_like(x, memory_format=fmt)
        if not empty:
            pointwise.product(g, weight, gx, out_lay, lay, factor=u, transposed=True, wide=wide)
        grads.append(gx)
    if need_weight or need_bias:
        gw, gb = weight.new_empty(weight.shape), weight.new_empty((weight.shape[0],))
        if empty:
            gw.zero_()
            gb.zero_()
        else:
            pointwise.weight_grad(g, x, gw, gb, out_lay, lay, factor=u, wide=wide)
        grads += [t for t, need in ((gw, need_weight), (gb, need_bias)) if need]
    return grads
