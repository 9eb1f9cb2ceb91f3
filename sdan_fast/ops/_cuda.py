"""`mm_lka` on CUDA C++: the kernels of its parts in a row, as one overload, so that the backend runs whole networks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._conv import Conv
from ._op import LIBRARY, OPS, output_format
from .mm_lka import branches_of, split
from .strip_conv_chain import slot_masks

Mask = Sequence[bool]


def attach(backend: str = "cuda", key: str = "CUDA") -> None:
    """Register the overload of a backend that has those of the parts, and its backward, for a dispatch key."""
    LIBRARY.impl(f"mm_lka.{backend}", functools.partial(forward, backend), key)
    LIBRARY.impl(f"mm_lka_backward.{backend}", functools.partial(backward, backend), key)


def _is_pair(convs: Sequence[Conv]) -> bool:
    """Whether two convolutions are a 1xk and a kx1 strip."""
    return len(convs) == 2 and [c.weight.shape[2 + i] for i, c in enumerate(convs)] == [1, 1]


def _pieces(branch: Sequence[Conv]) -> list[list[Conv]]:
    """A branch cut into what one call computes: pairs of strips that follow each other, or one convolution."""
    pieces: list[list[Conv]] = []
    at = 0
    while at < len(branch):
        end = at
        while _is_pair(branch[end : end + 2]):
            end += 2
        end = max(end, at + 1)
        pieces.append(list(branch[at:end]))
        at = end
    return pieces


def _arguments(piece: Sequence[Conv]) -> tuple[str, list[Any], dict[str, Any]]:
    """(the op that computes a piece, its arguments after x, its keyword arguments)."""
    if len(piece) == 1:
        (conv,) = piece
        return "depthwise_conv2d", [conv.weight, conv.bias], {"dilation": list(conv.dilation)}
    weights, biases = [c.weight for c in piece], [c.bias for c in piece if c.bias is not None]
    mask, along = [c.bias is not None for c in piece], [c.dilation[1 - i % 2] for i, c in enumerate(piece)]
    return "strip_conv_chain", [weights, biases], {"bias_mask": mask, "dilations": along}


def _values(backend: str, x: Tensor, pieces: Sequence[Sequence[Conv]]) -> list[Tensor]:
    """The input of each piece, then the output of the last."""
    values = [x]
    for piece in pieces:
        name, arguments, options = _arguments(piece)
        values.append(OPS[name].overloads[backend](values[-1], *arguments, **options))
    return values


def _chunks(x: Tensor, branches: Sequence[Sequence[Conv]]) -> Sequence[Tensor]:
    """The channels of each branch, in x's memory format: a slice of channels_last would else pass for NCHW."""
    fmt = output_format(x)
    chunks = torch.split(x, [branch[0].weight.shape[0] for branch in branches], dim=1)
    return [chunk.contiguous(memory_format=fmt) for chunk in chunks]


def forward(
    backend: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None, *, bias_mask: Mask, dilations: Sequence[int], lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    """x * proj(concatenation of the branches)."""
    branches = branches_of(weights, biases, bias_mask, dilations, lengths)
    found = [
        _values(backend, chunk, _pieces(branch))[-1]
        for chunk, branch in zip(_chunks(x, branches), branches, strict=True)
    ]
    return OPS["pointwise_gate"].overloads[backend](x, torch.cat(found, dim=1), proj_weight, proj_bias)


def backward(
    backend: str, grad: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None, *, bias_mask: Mask, dilations: Sequence[int], lengths: Sequence[int],
    output_mask: Mask,
) -> list[Tensor]:  # fmt: skip
    """Gradients in [x, weights..., biases..., proj_weight, proj_bias] where `output_mask` asks for them.

    The branches are run again; what a chain has between its strips is its own backward's business.
    """
    need_x, need_pw, need_pb = output_mask[0], output_mask[-2], output_mask[-1]
    branches = branches_of(weights, biases, bias_mask, dilations, lengths)
    masks = split(slot_masks(output_mask[1:], len(weights), bias_mask), lengths)
    need_t = need_x or any(any(any(mask) for mask in branch) for branch in masks)
    pieces = [_pieces(branch) for branch in branches]
    values = [_values(backend, chunk, p) for chunk, p in zip(_chunks(x, branches), pieces, strict=True)]
    t = torch.cat([v[-1] for v in values], dim=1)
    found = iter(
        OPS["pointwise_gate"].backward_overloads[backend](
            grad, x, t, proj_weight, proj_bias, output_mask=[need_x, need_t, need_pw, need_pb]
        )
    )
    gx, gt, gpw, gpb = (next(found) if need else None for need in (need_x, need_t, need_pw, need_pb))
    through, gws, gbs = [], [], []
    if gt is not None:
        for g, v, p, mask in zip(_chunks(gt, branches), values, pieces, masks, strict=True):
            below, gw, gb = _branch_backward(backend, g, v, p, mask, need_x)
            through.append(below)
            gws += gw
            gbs += gb
    if gx is not None:
        gx = gx + torch.cat(through, dim=1)
    return [g for g in (gx, *gws, *gbs, gpw, gpb) if g is not None]


def _branch_backward(
    backend: str,
    grad: Tensor,
    values: Sequence[Tensor],
    pieces: Sequence[Sequence[Conv]],
    masks: Sequence[tuple[bool, bool]],
    need_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(gradient in the branch's input if `need_x`, those of its weights, those of its biases, as asked for)."""
    gws: list[Tensor] = []
    gbs: list[Tensor] = []
    end = len(masks)
    for x, piece in zip(reversed(values[:-1]), reversed(pieces), strict=True):
        start = end - len(piece)
        need_below = need_x or any(any(mask) for mask in masks[:start])
        own = masks[start:end]
        if not need_below and not any(any(mask) for mask in own):
            break
        name, arguments, options = _arguments(piece)
        biases = [b for (_, b), conv in zip(own, piece, strict=True) if conv.bias is not None]
        if name == "depthwise_conv2d":
            biases = biases or [False]  # the slot of the absent one
        found = OPS[name].backward_overloads[backend](
            grad, x, *arguments, **options, output_mask=[need_below, *(w for w, _ in own), *biases]
        )
        grad = found[0] if need_below else grad
        found = found[need_below:]
        count = sum(w for w, _ in own)
        gws, gbs, end = found[:count] + gws, found[count:] + gbs, start
    return grad, gws, gbs
