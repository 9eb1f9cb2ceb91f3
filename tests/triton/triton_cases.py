"""Inputs and references of the ops that the interpreted and the PTX tests share."""

from __future__ import annotations

import torch

from sdan_fast import reference


def normal(*shape, dtype, seed, scale=1.0):
    """Normal numbers of a dtype from a seed of their own."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def image(*shape, dtype, fmt=torch.contiguous_format, seed=0, offset=0.0):
    """An N x C x H x W input in a memory format."""
    return (normal(*shape, dtype=torch.float32, seed=seed) + offset).to(dtype).contiguous(memory_format=fmt)


def norm_args(shape, dtype, fmt, bias=True):
    """Arguments of layer_norm2d."""
    x = image(*shape, dtype=dtype, fmt=fmt, offset=1.0)
    return [x, normal(shape[1], dtype=dtype, seed=1), normal(shape[1], dtype=dtype, seed=2) if bias else None]


def gate_args(shape, out_channels, dtype, fmt, bias=True):
    """Arguments of pointwise_gate."""
    N, C, H, W = shape
    weight = normal(out_channels, C, 1, 1, dtype=dtype, seed=3, scale=C**-0.5)
    u = image(N, out_channels, H, W, dtype=dtype, fmt=fmt, seed=4)
    x = image(*shape, dtype=dtype, fmt=fmt)
    return [u, x, weight, normal(out_channels, dtype=dtype, seed=5) if bias else None]


def chain_args(shape, stages, mask, dtype, fmt=torch.contiguous_format):
    """Arguments of strip_conv_chain; stages: (k, dilation) each; mask: which convolutions have a bias."""
    C = shape[1]
    weights, dilations = [], []
    for i, (k, d) in enumerate(stages):
        weights.append(normal(C, 1, 1, k, dtype=dtype, seed=10 + 2 * i, scale=k**-0.5))
        weights.append(normal(C, 1, k, 1, dtype=dtype, seed=11 + 2 * i, scale=k**-0.5))
        dilations += [d, d]
    biases = [normal(C, dtype=dtype, seed=30 + i) for i, has in enumerate(mask) if has]
    kwargs = {"bias_mask": list(mask), "dilations": dilations}
    return [image(*shape, dtype=dtype, fmt=fmt), weights, biases], kwargs


def chain_reference(x, weights, biases, *, bias_mask, dilations):
    """The chain, convolution by convolution."""
    present = iter(biases)
    for weight, has, d in zip(weights, bias_mask, dilations, strict=True):
        x = reference.depthwise_conv2d(x, weight, next(present) if has else None, dilation=d)
    return x


def star_conv_args(shape, out_channels, dtype, fmt, bias=True):
    """Arguments of star_conv."""
    C = shape[1]
    x, weight, norm_bias = norm_args(shape, dtype, fmt, bias)
    pw1, pw2 = (normal(out_channels, C, 1, 1, dtype=dtype, seed=s, scale=C**-0.5) for s in (6, 7))
    dw = normal(out_channels, 1, 3, 3, dtype=dtype, seed=8, scale=1 / 3)
    return [x, weight, norm_bias, pw1, dw, normal(out_channels, dtype=dtype, seed=9) if bias else None, pw2]


def attention_args(shape, branches, dtype, fmt, bias=True):
    """Arguments of mm_lka; branches: a list of [(kh, kw, dilation), ...]; every third convolution has no bias."""
    C = shape[1]
    chunk = C // len(branches)
    convs = [conv for branch in branches for conv in branch]
    mask = [i % 3 != 1 for i in range(len(convs))]
    weights = [
        normal(chunk, 1, kh, kw, dtype=dtype, seed=40 + i, scale=(kh * kw) ** -0.5)
        for i, (kh, kw, _) in enumerate(convs)
    ]
    biases = [normal(chunk, dtype=dtype, seed=60 + i) for i, has in enumerate(mask) if has]
    kwargs = {
        "bias_mask": mask,
        "dilations": [d for *_, d in convs for _ in range(2)],
        "lengths": [len(branch) for branch in branches],
    }
    proj = normal(C, C, 1, 1, dtype=dtype, seed=80, scale=C**-0.5)
    args = [image(*shape, dtype=dtype, fmt=fmt), weights, biases, proj]
    return [*args, normal(C, dtype=dtype, seed=81) if bias else None], kwargs


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
