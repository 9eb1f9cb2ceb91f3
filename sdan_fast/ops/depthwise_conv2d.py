"""`depthwise_conv2d`: one depth-wise convolution, strip or square, with "same" zero padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _check
from ._conv import Conv, Shape, chain_backward, chain_backward_flops, conv_flops
from ._op import Op

Pair = Sequence[int]


def check(x: Any, weight: Any, bias: Any = None, *, dilation: Any = (1, 1)) -> None:
    _check.image("x", x)
    _check.depthwise("", weight, bias, x.shape[1], like=x)
    _check.dilations("dilation", dilation, 2)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: Pair = (1, 1),
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    convs = [Conv(weight, bias, reference.pair(dilation))]
    need_x, need_weight, need_bias = output_mask
    gx, [(gw, gb)] = chain_backward(grad, [x], convs, need_x, [(need_weight, need_bias)])
    return [gx, gw, gb]


def convolution_autocast(
    tensors: Sequence[Tensor], low: torch.dtype, device_type: str
) -> tuple[torch.dtype, torch.dtype]:
    """Autocast runs convolutions in the lower precision."""
    return low, low


def flops(x: Shape, weight: Shape, bias: Shape | None = None, **_: Any) -> int:
    return conv_flops(x, weight)


def backward_flops(
    x: Shape, weight: Shape, bias: Shape | None = None, *, output_mask: Sequence[bool], **_: Any
) -> int:
    return chain_backward_flops(x, [weight], output_mask[0], [(output_mask[1], output_mask[2])])


depthwise_conv2d = Op(
    name="depthwise_conv2d",
    arguments="Tensor x, Tensor weight, Tensor? bias=None, *, int[2] dilation=1",
    check=check,
    reference=reference.depthwise_conv2d,
    reference_backward=backward,
    autocast=convolution_autocast,
    flops=flops,
    backward_flops=backward_flops,
)


LARGE = 500_000  # elements from which oneDNN's own channels_last kernels are ahead where they are


def in_large_channels_last(x: Tensor) -> bool:
    """Whether x is a large float32 tensor in channels_last and nothing else."""
    return (
        not torch.compiler.is_compiling()  # first: a size looked at is a size that a graph is bound to
        and x.dtype is torch.float32
        and x.numel() >= LARGE
        and reference.output_format(x) is torch.channels_last
    )


def slower(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: Pair = (1, 1)) -> str | None:
    """Undilated kernels of few taps on large channels_last images: PyTorch's convolution is a tenth faster there, but
    for 3x3 and vertical strips."""
    kh, kw = weight.shape[2], weight.shape[3]
    few = kh <= 7 and 1 < kw <= (11 if kh == 1 else 7) and (kh, kw) != (3, 3)
    if few and tuple(reference.pair(dilation)) == (1, 1) and in_large_channels_last(x):
        return f"PyTorch's own convolution is faster with {kh}x{kw} taps in channels_last"
    return None


depthwise_conv2d.slower["cpu"] = slower
