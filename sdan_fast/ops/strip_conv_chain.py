"""`strip_conv_chain`: stages of a 1xk and a kx1 depth-wise convolution; with one stage it is `separable_conv2d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._conv import Conv, Shape, chain, chain_backward, chain_backward_flops, chain_flops, with_absent
from ._op import Op
from .depthwise_conv2d import (
    AMX,
    AVX2,
    HUGE,
    LARGE,
    convolution_autocast,
    in_large_channels_last,
    read_in_place,
    short,
)


def check(x: Any, weights: Any, biases: Any, *, bias_mask: Any, dilations: Any) -> None:
    _check.image("x", x)
    if len(weights) == 0 or len(weights) % 2:
        raise ValueError(
            f"weights must alternate 1xk and kx1, two for each of one or more stages, and there are {len(weights)}"
        )
    if len(bias_mask) != len(weights) or sum(bias_mask) != len(biases):
        raise ValueError(
            f"bias_mask must say for each of the {len(weights)} weights whether one of the {len(biases)} biases is "
            f"its own, and it is {list(bias_mask)}"
        )
    for i, (weight, bias) in enumerate(zip(weights, with_absent(biases, bias_mask), strict=True)):
        axis = "v" if i % 2 else "h"
        _check.tensor(f"stages[{i // 2}].weight_{axis}", weight, like=x)
        k = weight.shape[2 if i % 2 else 3] if weight.dim() == 4 else 0
        expected = [x.shape[1], 1, k, 1] if i % 2 else [x.shape[1], 1, 1, k]
        if weight.dim() != 4 or list(weight.shape) != expected or k % 2 == 0:
            form = "k, 1" if i % 2 else "1, k"
            raise ValueError(
                f"stages[{i // 2}].weight_{axis} must have the shape [{x.shape[1]}, 1, {form}] with k odd, and its "
                f"shape is {_check.shape(weight)}"
            )
        if bias is not None:
            _check.parameter(f"stages[{i // 2}].bias_{axis}", bias, (x.shape[1],), like=x)
    _check.dilations("dilation", dilations, len(weights))


def convolutions(weights: Sequence[Any], biases: Sequence[Any], dilations: Sequence[int]) -> list[Conv]:
    """The stages as a chain of depth-wise convolutions, each dilated along its own axis."""
    return [
        Conv(weight, bias, (dilation, 1) if i % 2 else (1, dilation))
        for i, (weight, bias, dilation) in enumerate(zip(weights, biases, dilations, strict=True))
    ]


def run_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bias_mask: Sequence[bool],
    dilations: Sequence[int],
) -> Tensor:
    return chain(x, convolutions(weights, with_absent(biases, bias_mask), dilations))[-1]


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bias_mask: Sequence[bool],
    dilations: Sequence[int],
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    convs = convolutions(weights, with_absent(biases, bias_mask), dilations)
    values = chain(x, convs[:-1])  # the last output is not needed
    masks = slot_masks(output_mask[1:], len(weights), bias_mask)
    gx, grads = chain_backward(grad, values, convs, output_mask[0], masks)
    return [
        gx,
        *(gw for gw, _ in grads),
        *(gb for (_, gb), there in zip(grads, bias_mask, strict=True) if there),
    ]


def slot_masks(slots: Sequence[bool], count: int, bias_mask: Sequence[bool]) -> list[tuple[bool, bool]]:
    """(weight, bias) wanted for each of `count` convolutions; the slots are all weights, then the biases there are."""
    it = iter(slots[count : count + sum(bias_mask)])
    return [(slots[i], next(it) if bias_mask[i] else False) for i in range(count)]


def flops(x: Shape, weights: Sequence[Shape], biases: Sequence[Shape], **_: Any) -> int:
    return chain_flops(x, weights)


def backward_flops(
    x: Shape,
    weights: Sequence[Shape],
    biases: Sequence[Shape],
    *,
    bias_mask: Sequence[bool],
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    return chain_backward_flops(
        x, weights, output_mask[0], slot_masks(output_mask[1:], len(weights), bias_mask)
    )


strip_conv_chain = Op(
    name="strip_conv_chain",
    arguments="Tensor x, Tensor[] weights, Tensor[] biases, *, bool[] bias_mask, int[] dilations",
    check=check,
    reference=run_reference,
    reference_backward=backward,
    autocast=convolution_autocast,
    flops=flops,
    backward_flops=backward_flops,
    kernel_checks=lambda *_, dilations, **__: all(type(d) is int for d in dilations),
)


def slower(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    bias_mask: Sequence[bool],
    dilations: Sequence[int],
) -> str | None:
    """Few taps on large channels_last images: PyTorch's convolutions one after the other are faster there."""
    taps = max(weights[0].shape[3], weights[1].shape[2])
    if len(weights) == 2:
        few = taps <= 11 and max(dilations) == 1 or taps <= 3 and not AVX2
    else:
        few = AVX2 and len(weights) == 4 and taps <= 3 and max(dilations) <= 2
    if few and in_large_channels_last(x, torch.float32) and not read_in_place(x):
        return f"PyTorch's own convolutions are faster with {taps} taps in channels_last"
    taps = max(max(weight.shape[2], weight.shape[3]) for weight in weights)
    stages, most, least = (1, 5, HUGE) if AMX else (2, 11, LARGE)
    few = len(weights) <= 2 * stages and taps <= most and short(taps, max(dilations))
    if few and in_large_channels_last(x, torch.bfloat16, least):
        return f"PyTorch's own convolutions are faster with {taps} taps in channels_last and bfloat16"
    return None


strip_conv_chain.slower["cpu"] = slower
