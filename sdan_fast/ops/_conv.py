"""Gradients and FLOP counts of convolutions and chains of depth-wise ones, shared by the ops that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from ..reference import depthwise_conv2d

Mask = tuple[bool, bool, bool]  # input, weight, bias
Shape = Sequence[int]


class Conv(NamedTuple):
    """One depth-wise convolution of a chain; in FLOP formulas `weight` and `bias` are shapes."""

    weight: Tensor
    bias: Tensor | None
    dilation: tuple[int, int]


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    *,
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a "same" convolution with respect to input, weight and bias, those of `mask`."""
    if not any(mask):
        return None, None, None
    kh, kw = weight.shape[-2:]
    padding = (dilation[0] * (kh - 1) // 2, dilation[1] * (kw - 1) // 2)
    if x.device.type == "cpu" and x.element_size() == 2:
        # PyTorch's 16-bit channels_last path on the CPU returns unwritten memory as the weight gradient of a dilated
        # depth-wise convolution, and can crash (docs/decisions.md).
        grad, x = grad.contiguous(), x.contiguous()
    one_channel = weight.shape[0] == groups == 1 and x.device.type == "cpu"
    if one_channel and (mask[1] or mask[2]) and dilation[0] * (kh - 1) >= x.shape[2]:
        # A single channel is a dense convolution to PyTorch, whose weight gradient writes beyond its memory where the
        # kernel is much taller than the image (docs/decisions.md). The first of two equal channels is a depth-wise one.
        gx, _, _ = conv_backward(grad, x, weight, (mask[0], False, False), dilation=dilation)
        twice = grad.repeat(1, 2, 1, 1), x.repeat(1, 2, 1, 1), weight.repeat(2, 1, 1, 1)
        _, gw, _ = conv_backward(*twice, (False, mask[1], False), dilation=dilation, groups=2)
        return gx, None if gw is None else gw[:1], grad.sum((0, 2, 3)) if mask[2] else None
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [1, 1], padding, dilation, False, [0, 0], groups, mask
    )


def chain(x: Tensor, convs: Sequence[Conv]) -> list[Tensor]:
    """The input of each convolution of a depth-wise chain, then its output."""
    values = [x]
    for conv in convs:
        values.append(depthwise_conv2d(values[-1], conv.weight, conv.bias, dilation=conv.dilation))
    return values


def chain_backward(
    grad: Tensor,
    values: Sequence[Tensor],
    convs: Sequence[Conv],
    need_x: bool,
    masks: Sequence[tuple[bool, bool]],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """Gradients of a depth-wise chain: of its input, and (weight, bias) of each convolution.

    Args:
        grad: gradient of the chain's output.
        values: what `chain` returned; the last entry is not used.
        convs: the convolutions.
        need_x: whether the input's gradient is wanted.
        masks: (weight, bias) wanted, for each convolution.
    """
    grads: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(convs)
    for i, mask in reversed(list(enumerate(_masks(need_x, masks)))):
        conv = convs[i]
        gx, gw, gb = conv_backward(
            grad, values[i], conv.weight, mask, dilation=conv.dilation, groups=conv.weight.shape[0]
        )
        grads[i] = gw, gb
        if gx is None:
            return None, grads
        grad = gx
    return grad, grads


def _masks(need_x: bool, masks: Sequence[tuple[bool, bool]]) -> list[Mask]:
    """Autograd's own rule: a convolution's input needs a gradient if anything before it does."""
    out: list[Mask] = []
    for need_weight, need_bias in masks:
        out.append((need_x, need_weight, need_bias))
        need_x = need_x or need_weight or need_bias
    return out


def conv_flops(x: Shape, weight: Shape) -> int:
    """What FlopCounterMode reports for a "same" convolution of these shapes."""
    return conv_flop_count(list(x), list(weight), [x[0], weight[0], *x[2:]])


def conv_backward_flops(x: Shape, weight: Shape, mask: Mask) -> int:
    """What FlopCounterMode reports for that convolution's backward: a dense count even where groups make it sparse."""
    x, weight = list(x), list(weight)
    y = [x[0], weight[0], *x[2:]]
    total = conv_flop_count(y, weight, x, transposed=True) if mask[0] else 0
    if mask[1]:
        total += conv_flop_count(_swapped(x), _swapped(y), _swapped(weight))
    return total


def _swapped(shape: Shape) -> list[int]:
    return [shape[1], shape[0], *shape[2:]]


def chain_flops(x: Shape, weights: Sequence[Shape]) -> int:
    """FLOPs of a depth-wise chain on an input of the shape `x`."""
    return sum(conv_flops(x, weight) for weight in weights)


def chain_backward_flops(
    x: Shape, weights: Sequence[Shape], need_x: bool, masks: Sequence[tuple[bool, bool]]
) -> int:
    """FLOPs of a depth-wise chain's backward."""
    return sum(
        conv_backward_flops(x, weight, mask)
        for weight, mask in zip(weights, _masks(need_x, masks), strict=True)
    )


def paired(flat: Sequence[int]) -> list[tuple[int, int]]:
    """[a, b, c, d] as [(a, b), (c, d)]."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def with_absent(present: Sequence[Tensor], mask: Sequence[bool]) -> list[Tensor | None]:
    """The biases by position, None where `mask` is False; the inverse of dropping the absent ones."""
    it = iter(present)
    return [next(it) if there else None for there in mask]
