"""`mm_lka`: x * proj(concat of depth-wise branches over channel chunks), the multi-scale large-kernel attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _check
from ._conv import (
    Conv,
    Shape,
    chain,
    chain_backward,
    chain_backward_flops,
    conv_backward_flops,
    conv_flops,
    paired,
    with_absent,
)
from ._op import Op
from .pointwise_gate import gate_backward, gated_autocast
from .strip_conv_chain import slot_masks


def check(
    x: Any, weights: Any, biases: Any, proj_weight: Any, proj_bias: Any = None,
    *, bias_mask: Any, dilations: Any, lengths: Any,
) -> None:  # fmt: skip
    _check.image("x", x)
    if not lengths or any(n < 1 for n in lengths) or sum(lengths) != len(weights):
        raise ValueError(
            f"branches must each have at least one convolution, and {len(weights)} are split as {list(lengths)}"
        )
    if len(bias_mask) != len(weights) or sum(bias_mask) != len(biases):
        raise ValueError(
            f"bias_mask must say for each of the {len(weights)} weights whether one of the {len(biases)} biases is "
            f"its own, and it is {list(bias_mask)}"
        )
    _check.dilations("dilation", dilations, 2 * len(weights))
    present = with_absent(biases, bias_mask)
    covered = start = 0
    for b, length in enumerate(lengths):
        channels = 0
        for j, i in enumerate(range(start, start + length)):
            name = f"branches[{b}][{j}]."
            _check.tensor(f"{name}weight", weights[i], like=x)
            if j == 0 and weights[i].dim() == 4:
                channels = weights[i].shape[0]
            _check.depthwise(name, weights[i], present[i], channels, like=x)
        covered, start = covered + channels, start + length
    if covered != x.shape[1]:
        raise ValueError(f"branches must cover the {x.shape[1]} channels of x, and they cover {covered}")
    _check.parameter("proj_weight", proj_weight, (x.shape[1], x.shape[1], 1, 1), like=x)
    if proj_bias is not None:
        _check.parameter("proj_bias", proj_bias, (x.shape[1],), like=x)


def split(convs: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """The flat convolutions (or anything else, one per convolution) by branch."""
    it = iter(convs)
    return [[next(it) for _ in range(length)] for length in lengths]


def branches_of(
    weights: Sequence[Any], biases: Sequence[Any], bias_mask: Sequence[bool], dilations: Sequence[int],
    lengths: Sequence[int],
) -> list[list[Conv]]:  # fmt: skip
    """The branches of the flat schema, each a list of convolutions."""
    flat = zip(weights, with_absent(biases, bias_mask), paired(dilations), strict=True)
    return split([Conv(*conv) for conv in flat], lengths)


def run_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    branches = branches_of(weights, biases, bias_mask, dilations, lengths)
    return reference.mm_lka(x, branches, proj_weight, proj_bias)


def backward(
    grad: Tensor,
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int], output_mask: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    need_x, need_pw, need_pb = output_mask[0], output_mask[-2], output_mask[-1]
    masks = slot_masks(output_mask[1:], len(weights), bias_mask)
    need_t = need_x or any(map(any, masks))
    branches = branches_of(weights, biases, bias_mask, dilations, lengths)
    sizes = [branch[0].weight.shape[0] for branch in branches]
    values = [
        chain(chunk, branch) for chunk, branch in zip(torch.split(x, sizes, dim=1), branches, strict=True)
    ]
    t = torch.cat([v[-1] for v in values], dim=1)
    gx, gt, gpw, gpb = gate_backward(grad, x, t, proj_weight, proj_bias, [need_x, need_t, need_pw, need_pb])
    grads: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(weights)
    if gt is not None:
        parts, grads = [], []
        for g, v, branch, mask in zip(
            torch.split(gt, sizes, dim=1), values, branches, split(masks, lengths), strict=True
        ):
            part, conv_grads = chain_backward(g, v, branch, need_x, mask)
            parts.append(part)
            grads += conv_grads
        if gx is not None:
            gx = gx + torch.cat([part for part in parts if part is not None], dim=1)
    return [
        gx,
        *(gw for gw, _ in grads),
        *(gb for (_, gb), there in zip(grads, bias_mask, strict=True) if there),
        gpw,
        gpb,
    ]


def flops(
    x: Shape, weights: Sequence[Shape], biases: Sequence[Shape], proj_weight: Shape, proj_bias: Shape | None = None,
    **_: Any,
) -> int:  # fmt: skip
    n, _c, h, w = x
    return sum(conv_flops([n, weight[0], h, w], weight) for weight in weights) + conv_flops(x, proj_weight)


def backward_flops(
    x: Shape, weights: Sequence[Shape], biases: Sequence[Shape], proj_weight: Shape, proj_bias: Shape | None = None,
    *, bias_mask: Sequence[bool], lengths: Sequence[int], output_mask: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    n, _c, h, w = x
    masks = slot_masks(output_mask[1:], len(weights), bias_mask)
    need_t = output_mask[0] or any(map(any, masks))
    total = conv_backward_flops(x, proj_weight, (need_t, output_mask[-2], output_mask[-1]))
    for branch, mask in zip(split(weights, lengths), split(masks, lengths), strict=True):
        total += chain_backward_flops([n, branch[0][0], h, w], branch, output_mask[0], mask)
    return total


mm_lka = Op(
    name="mm_lka",
    arguments=(
        "Tensor x, Tensor[] weights, Tensor[] biases, Tensor proj_weight, Tensor? proj_bias=None, *, "
        "bool[] bias_mask, int[] dilations, int[] lengths"
    ),
    check=check,
    reference=run_reference,
    reference_backward=backward,
    autocast=gated_autocast,
    flops=flops,
    backward_flops=backward_flops,
)


_MOST_CONVS = 16
_FARTHEST = 1 << 20


def cpu_supports(weights: Sequence[Any], dilations: Sequence[int], lengths: Sequence[int]) -> str | None:
    """None if the CPU kernel can run these branches, else the reason why not. The arguments may not be checked yet."""
    if any(length > _MOST_CONVS for length in lengths):
        return f"the CPU kernel takes at most {_MOST_CONVS} convolutions a branch"
    if max(dilations, default=1) > 1024 and any(
        dilation * taps >= _FARTHEST
        for weight, pair in zip(weights, paired(dilations), strict=False)
        for dilation, taps in zip(pair, weight.shape[-2:], strict=True)
    ):
        return f"the CPU kernel takes dilated kernels shorter than {_FARTHEST}"
    return None


mm_lka.supports["cpu"] = lambda x, weights, *_, dilations, lengths, **__: cpu_supports(
    weights, dilations, lengths
)
