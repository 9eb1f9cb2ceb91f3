"""`sdan`: the whole network; fused for inference, with only block-boundary images in memory, its parts otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import pixel_shuffle
from . import _check
from ._conv import Shape, conv_flops
from ._op import ComposedOp
from .depthwise_conv2d import depthwise_conv2d
from .mm_lka import cpu_supports as cpu_branches_support
from .pointwise_conv2d import pointwise_conv2d
from .rsdam import check as check_rsdam
from .rsdam import flops as rsdam_flops
from .rsdam import rsdam


class Block(NamedTuple):
    """The tensors of one block, as `rsdam` takes them; in FLOP formulas their shapes."""

    distill: Sequence[Any]
    star: Sequence[Any]
    fuse: Sequence[Any]
    weights: Sequence[Any]
    biases: Sequence[Any]
    attn_proj: Sequence[Any]
    proj: Sequence[Any]
    norm: Sequence[Any]


def blocks_of(blocks: Sequence[Any], count: int, convs: int) -> list[Block]:
    """The flat list, in state-dict order, by block: 6 + 24 + 2 tensors of SDM, 2 for each convolution, 6."""
    if count < 1 or len(blocks) != count * (38 + 2 * convs):
        raise ValueError(
            f"blocks must hold {38 + 2 * convs} tensors for each of {count} blocks, and it holds {len(blocks)}"
        )
    out = []
    for i in range(0, len(blocks), 38 + 2 * convs):
        b, end = blocks[i : i + 38 + 2 * convs], 32 + 2 * convs
        sdm = b[:6], b[6:30], b[30:32]
        out.append(
            Block(*sdm, b[32:end:2], b[33:end:2], b[end : end + 2], b[end + 2 : end + 4], b[end + 4 :])
        )
    return out


def _layout(dilations: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    return {"bias_mask": [True] * sum(lengths), "dilations": dilations, "lengths": lengths}


def check(
    x: Any, head: Any, blocks: Any, fuse: Any, tail: Any, up: Any,
    *, scale: Any, block_count: Any, dilations: Any, lengths: Any, eps: Any = 1e-5,
) -> None:  # fmt: skip
    _check.image("x", x)
    channels, repeated = head[0].shape[:2]
    if repeated % x.shape[1]:
        raise ValueError(f"x must have a divisor of {repeated} channels, and it has {x.shape[1]}")
    _check.parameter("head pw weight", head[0], (channels, repeated, 1, 1), like=x)
    _check.depthwise("head dw ", head[1], head[2], channels, like=x, kernel=(3, 3))
    f = x.new_empty((0, channels, 1, 1))
    for block in blocks_of(blocks, block_count, sum(lengths)):
        check_rsdam(f, *block, **_layout(dilations, lengths), eps=eps)
    _check.parameter("fuse weight", fuse[0], (channels, block_count * channels, 1, 1), like=x)
    _check.parameter("fuse bias", fuse[1], (channels,), like=x)
    _check.parameter("tail pw weight", tail[0], (channels, channels, 1, 1), like=x)
    _check.depthwise("tail dw ", tail[1], tail[2], channels, like=x, kernel=(3, 3))
    _check.parameter("up weight", up[0], (up[0].shape[0], channels, 3, 3), like=x)
    _check.parameter("up bias", up[1], (up[0].shape[0],), like=x)
    if scale < 1 or up[0].shape[0] % (scale * scale):
        raise ValueError(f"scale^2 must divide the {up[0].shape[0]} outputs of up, and scale is {scale}")


def compose(
    x: Tensor, head: Sequence[Tensor], blocks: Sequence[Tensor], fuse: Sequence[Tensor], tail: Sequence[Tensor],
    up: Sequence[Tensor],
    *, scale: int, block_count: int, dilations: Sequence[int], lengths: Sequence[int], eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """The network as its parts, each on a backend of its own."""
    repeated = x.repeat(1, head[0].shape[1] // x.shape[1], 1, 1)
    shallow = depthwise_conv2d(pointwise_conv2d(repeated, head[0]), head[1], head[2], dilation=[1, 1])
    deep = [shallow]
    for block in blocks_of(blocks, block_count, sum(lengths)):
        deep.append(rsdam(deep[-1], *block, **_layout(dilations, lengths), eps=eps))
    f = pointwise_conv2d(torch.cat(deep[1:], dim=1), fuse[0], fuse[1], activation="gelu")
    f = depthwise_conv2d(pointwise_conv2d(f, tail[0]), tail[1], tail[2], dilation=[1, 1]) + shallow
    return pixel_shuffle(F.conv2d(f, up[0], up[1], padding=1), scale)


def flops(
    x: Shape, head: Any, blocks: Any, fuse: Any, tail: Any, up: Any,
    *, block_count: int, lengths: Sequence[int], **_: Any,
) -> int:  # fmt: skip
    n, _c, h, w = x
    f = [n, head[0][0], h, w]
    total = conv_flops([n, head[0][1], h, w], head[0]) + conv_flops(f, head[1])
    total += sum(rsdam_flops(f, *block) for block in blocks_of(blocks, block_count, sum(lengths)))
    total += conv_flops([n, fuse[0][1], h, w], fuse[0]) + conv_flops(f, tail[0]) + conv_flops(f, tail[1])
    return total + conv_flops(f, up[0])


def output_shape(
    x: Tensor, head: Any, blocks: Any, fuse: Any, tail: Any, up: Any, *, scale: int, **_: Any
) -> list[Any]:
    n, _c, h, w = x.shape
    return [n, up[0].shape[0] // (scale * scale), h * scale, w * scale]


sdan = ComposedOp(
    name="sdan",
    arguments=(
        "Tensor x, Tensor[] head, Tensor[] blocks, Tensor[] fuse, Tensor[] tail, Tensor[] up, *, int scale, "
        "int block_count, int[] dilations, int[] lengths, float eps=1e-5"
    ),
    check=check,
    reference=compose,
    flops=flops,
    output_shape=output_shape,
)


_LARGEST_SCALE = 16


def _cpu_supports(*_: Any, scale: int, lengths: Sequence[int], **__: Any) -> str | None:
    """None if the CPU kernel can run the network, else the reason why not. The arguments may not be checked yet."""
    if scale > _LARGEST_SCALE:
        return f"the CPU kernel takes scales up to {_LARGEST_SCALE}"
    return cpu_branches_support((), (), lengths)


sdan.supports["cpu"] = _cpu_supports
