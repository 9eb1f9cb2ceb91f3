"""Large-kernel attention on Triton: the branches' convolutions on channel slices in place, then projection, bias and
gate.

A branch reads its chunk of x and writes its chunk of the concatenation where they lie: nothing is split or
concatenated. A two-stage strip branch is two launches, every other convolution one, projection with bias and gate one
more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import depthwise_conv2d as depthwise
from . import pointwise, strip_conv_chain
from .launch import image_layout, output_format, unavailable, wide_plane
from .strip_conv_chain import Strip


def _branches(
    weights: Sequence[Tensor], biases: Sequence[Tensor], bias_mask: Sequence[bool], dilations: Sequence[int],
    lengths: Sequence[int],
) -> list[list[Strip]]:  # fmt: skip
    present = iter(biases)
    convs = [
        Strip(w, next(present) if has else None, (dilations[2 * i], dilations[2 * i + 1]))
        for i, (w, has) in enumerate(zip(weights, bias_mask, strict=True))
    ]
    out, at = [], 0
    for length in lengths:
        out.append(convs[at : at + length])
        at += length
    return out


def _chunks(x: Tensor, branches: Sequence[Sequence[Strip]]) -> list[Tensor]:
    """The branches' slices of the channels of x: views."""
    return list(torch.split(x, [branch[0].weight.shape[0] for branch in branches], dim=1))


def _concatenation(x: Tensor, branches: Sequence[Sequence[Strip]], fmt: torch.memory_format) -> Tensor:
    """The branches' results side by side."""
    out = torch.empty_like(x, memory_format=fmt)
    for chunk, result, branch in zip(_chunks(x, branches), _chunks(out, branches), branches, strict=True):
        strip_conv_chain.run(chunk, branch, result)
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

    Workspace: the concatenation, and up to three tensors of a chunk.
    """
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = torch.empty_like(x, memory_format=fmt)
    if y.numel() > 0:
        merged = _concatenation(x, _branches(weights, biases, bias_mask, dilations, lengths), fmt)
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
    two for its parameters) and each branch's, as in strip_conv_chain.
    """
    fmt = output_format(x)
    g, x = grad_output.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    branches = _branches(weights, biases, bias_mask, dilations, lengths)
    present = iter(output_mask[1 + len(weights) : 1 + len(weights) + len(biases)])
    need_x, need_w = output_mask[0], output_mask[1 : 1 + len(weights)]
    need_b = [next(present) if has else False for has in bias_mask]
    need_pw, need_pb = output_mask[-2:]
    gx = torch.empty_like(x, memory_format=fmt)
    gw, gb = proj_weight.new_empty(proj_weight.shape), proj_weight.new_empty(proj_weight.shape[:1])
    grads: list[tuple[Tensor | None, Tensor | None]] = []
    if g.numel() == 0:
        gw.zero_()
        gb.zero_()
        grads = [
            (torch.zeros_like(t.weight) if w else None, t.weight.new_zeros(t.weight.shape[0]) if b else None)
            for t, w, b in zip([t for branch in branches for t in branch], need_w, need_b, strict=True)
        ]
    else:
        lay, wide = image_layout(fmt, g, x, gx), wide_plane(x)
        if need_x or need_pw or need_pb:
            merged = _concatenation(x, branches, fmt)
            if need_x:
                pointwise.product(merged, proj_weight, gx, lay, lay, bias=proj_bias, gate=g, wide=wide)
            if need_pw or need_pb:
                pointwise.weight_grad(g, merged, gw, gb, lay, lay, factor=x, wide=wide)
        through = torch.empty_like(x, memory_format=fmt)
        pointwise.product(g, proj_weight, through, lay, lay, factor=x, transposed=True, wide=wide)
        below = torch.empty_like(x, memory_format=fmt) if need_x else x
        at = 0
        parts = zip(
            _chunks(through, branches), _chunks(x, branches), _chunks(below, branches), branches, strict=True
        )
        for through_chunk, chunk, below_chunk, branch in parts:
            end = at + len(branch)
            _, part = strip_conv_chain.gradients(
                through_chunk,
                chunk,
                branch,
                need_x,
                need_w[at:end],
                need_b[at:end],
                below_chunk if need_x else None,
            )
            grads += part
            at = end
        if need_x:
            gx.add_(below)
    out = [gx] if need_x else []
    out += [w for w, _ in grads if w is not None] + [b for _, b in grads if b is not None]
    return out + [t for t, need in ((gw, need_pw), (gb, need_pb)) if need]
