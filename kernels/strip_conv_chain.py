"""The strip chain on Triton: one branch of 1xk and kx1 convolutions over all channels; see branches.py.

Two stages H1 V1 H2 V2 are two launches, one pass over whole rows and one over whole columns, exactly: also at the
borders, and in both memory formats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import branches
from . import depthwise_conv2d as depthwise
from .branches import Conv
from .launch import output_format, unavailable


def _convs(
    weights: Sequence[Tensor], biases: Sequence[Tensor], bias_mask: Sequence[bool], dilations: Sequence[int]
) -> list[Conv]:
    present = iter(biases)
    return [
        Conv(w, next(present) if has else None, (d, d))
        for w, has, d in zip(weights, bias_mask, dilations, strict=True)
    ]


def supports(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bias_mask: Sequence[bool],
    dilations: Sequence[int],
) -> str | None:
    """None if the kernels can run this call, else the reason why not."""
    for weight in weights:
        if reason := depthwise.refuses_filter(weight):
            return reason
    return unavailable(x, *weights, *biases)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bias_mask: Sequence[bool],
    dilations: Sequence[int],
) -> Tensor:
    """The chain of x (N, C, H, W); weights (C, 1, 1, k), (C, 1, k, 1), ... in order; x's memory format.

    Two launches per two stages, and two for a last odd one. Workspace: see branches.run.
    """
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = torch.empty_like(x, memory_format=fmt)
    if y.numel() > 0:
        branches.run(x, [_convs(weights, biases, bias_mask, dilations)], y, fmt)
    return y


def backward(
    grad_output: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *,
    bias_mask: Sequence[bool], dilations: Sequence[int], output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in [x, weights..., biases...] where `output_mask` asks for them.

    x's alone is the forward's launches, with flipped filters. With filters the chain's intermediates are computed
    again, a launch per convolution, and each convolution takes one for its input's gradient and two for its own.
    """
    fmt = output_format(x)
    g, x = grad_output.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    chain = _convs(weights, biases, bias_mask, dilations)
    need_x, need_w = output_mask[0], output_mask[1 : 1 + len(weights)]
    need_present = iter(output_mask[1 + len(weights) :])
    need_b = [next(need_present) if has else False for has in bias_mask]
    gx = torch.empty_like(x, memory_format=fmt) if need_x else None
    grads = branches.gradients(g, x, [chain], need_w, need_b, gx, fmt)
    out = [gx] if gx is not None else []
    return out + [gw for gw, _ in grads if gw is not None] + [gb for _, gb in grads if gb is not None]
