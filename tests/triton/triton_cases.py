"""References of the ops that the interpreted and the PTX tests share; their inputs are the package's own."""

from __future__ import annotations

from sdan_fast import reference
from sdan_fast.inspecting.arguments import (
    attention_args,
    chain_args,
    gate_args,
    image,
    norm_args,
    normal,
    star_conv_args,
)

__all__ = [
    "BRANCHES", "CHAINS", "STRIPS", "attention_args", "attention_reference", "chain_args", "chain_reference",
    "gate_args", "image", "norm_args", "normal", "star_conv_args",
]  # fmt: skip

# stages of (k, dilation), biases present
CHAINS = [
    ([(3, 1)], [True, True]),
    ([(3, 1), (3, 2)], [True, True, True, True]),
    ([(5, 1), (3, 2)], [False, True, False, True]),
    ([(3, 1), (3, 2)], [False, False, True, False]),
    ([(3, 1), (3, 2), (3, 1)], [True, False, True, True, False, True]),
]
# convolutions of (kh, kw, dilation), branch by branch
STRIPS = [(1, 3, 1), (3, 1, 1), (1, 3, 2), (3, 1, 2)]
BRANCHES = [[(3, 3, 1), (3, 3, 2)], STRIPS]


def chain_reference(x, weights, biases, *, bias_mask, dilations):
    """The chain, convolution by convolution."""
    present = iter(biases)
    for weight, has, d in zip(weights, bias_mask, dilations, strict=True):
        x = reference.depthwise_conv2d(x, weight, next(present) if has else None, dilation=d)
    return x


def attention_reference(x, weights, biases, proj_weight, proj_bias=None, *, bias_mask, dilations, lengths):
    """mm_lka with the branches put together again."""
    present = iter(biases)
    convs = [
        (w, next(present) if has else None, (dilations[2 * i], dilations[2 * i + 1]))
        for i, (w, has) in enumerate(zip(weights, bias_mask, strict=True))
    ]
    branches, at = [], 0
    for length in lengths:
        branches.append(convs[at : at + length])
        at += length
    return reference.mm_lka(x, branches, proj_weight, proj_bias)
