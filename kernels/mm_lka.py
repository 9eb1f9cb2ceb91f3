"""Large-kernel attention on Triton: all branches side by side, then projection, bias and gate: four launches at most.

A branch reads its slice of the channels of x and writes its slice of the concatenation where they lie: nothing is
split or concatenated. What the branches do in the same step is one launch; two strip stages are two steps, see
branches.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import branches as branching
from . import depthwise_conv2d as depthwise
from . import pointwise
from .branches import Conv
from .launch import image_layout, output_format, unavailable, wide_plane


def _branches(
    weights: Sequence[Tensor], biases: Sequence[Tensor], bias_mask: Sequence[bool], dilations: Sequence[int],
    lengths: Sequence[int],
) -> list[list[Conv]]:  # fmt: skip
    present = iter(biases)
    convs = [
        Conv(w, next(present) if has else None, (dilations[2 * i], dilations[2 * i + 1]))
        for i, (w, has) in enumerate(zip(weights, bias_mask, strict=True))
    ]
    out, at = [], 0
    for length in lengths:
        out.append(convs[at : at + length])
        at += length
    return out


def supports(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None, *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int],
) -> str | None:  # fmt: skip
    """None if the kernels can run this call, else the reason why not."""
    for weight in weights:
        if reason := depthwise.refuses_filter(weight):
            return reason
    return unavailable(x, *weights, *biases, proj_weight, proj_bias)


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None, *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    """x * proj(concatenation of the branches): x (N, C, H, W), x's memory format; see the op's schema for the lists.

    One launch for each step of the longest branch, and one for projection, bias and gate. Workspace: the concatenation,
    and what branches.run needs.
    """
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = torch.empty_like(x, memory_format=fmt)
    if y.numel() > 0:
        merged = torch.empty_like(x, memory_format=fmt)
        branching.run(x, _branches(weights, biases, bias_mask, dilations, lengths), merged, fmt)
        lay = image_layout(fmt, merged, x, y)
        pointwise.product(merged, proj_weight, y, lay, lay, bias=proj_bias, gate=x, wide=wide_plane(x))
    return y


def backward(
    grad_output: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None, *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int],
    output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in [x, weights..., biases..., proj_weight, proj_bias] where `output_mask` asks for them.

    The branches are run again; then the gated projection's gradients (one launch each for x and the concatenation,
    two for its parameters) and the branches', which are added to x's where they are computed.
    """
    fmt = output_format(x)
    g, x = grad_output.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    branches = _branches(weights, biases, bias_mask, dilations, lengths)
    present = iter(output_mask[1 + len(weights) : 1 + len(weights) + len(biases)])
    need_x, need_w = output_mask[0], output_mask[1 : 1 + len(weights)]
    need_b = [next(present) if has else False for has in bias_mask]
    need_pw, need_pb = output_mask[-2:]
    wanted = [w or b for w, b in zip(need_w, need_b, strict=True)]
    gx = torch.empty_like(x, memory_format=fmt) if need_x else None
    gw, gb = proj_weight.new_empty(proj_weight.shape), proj_weight.new_empty(proj_weight.shape[:1])
    if g.numel() == 0:
        grads = branching.gradients(g, x, branches, need_w, need_b, gx, fmt)
        gw.zero_()
        gb.zero_()
    else:
        lay, wide = image_layout(fmt, g, x), wide_plane(x)
        inputs = None
        if need_x or need_pw or need_pb:
            merged = torch.empty_like(x, memory_format=fmt)
            if any(wanted):
                inputs = branching.levels(x, branches, [len(branch) for branch in branches], merged, fmt)
            else:
                branching.run(x, branches, merged, fmt)
            if gx is not None:
                pointwise.product(merged, proj_weight, gx, lay, lay, bias=proj_bias, gate=g, wide=wide)
            if need_pw or need_pb:
                pointwise.weight_grad(g, merged, gw, gb, lay, lay, factor=x, wide=wide)
        grads = [(None, None)] * len(weights)
        if need_x or any(wanted):
            through = torch.empty_like(x, memory_format=fmt)
            pointwise.product(g, proj_weight, through, lay, lay, factor=x, transposed=True, wide=wide)
            grads = branching.gradients(
                through, x, branches, need_w, need_b, gx, fmt, add=True, inputs=inputs
            )
    out = [gx] if gx is not None else []
    out += [w for w, _ in grads if w is not None] + [b for _, b in grads if b is not None]
    return out + [t for t, need in ((gw, need_pw), (gb, need_pb)) if need]
