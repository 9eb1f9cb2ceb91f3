"""Seeded arguments of every op, for tests and inspections alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[list[Any], dict[str, Any]]
CONTIGUOUS = torch.contiguous_format


_blank = False


@contextmanager
def blank() -> Iterator[None]:
    """Make every tensor of the block zeros, for those who only ask what would be launched."""
    global _blank
    before, _blank = _blank, True
    try:
        yield
    finally:
        _blank = before


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of a dtype from a seed of their own."""
    if _blank:
        return torch.zeros(shape, dtype=dtype)
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def image(*shape: int, dtype: torch.dtype, fmt: torch.memory_format = CONTIGUOUS, seed: int = 0,
          offset: float = 0.0) -> Tensor:  # fmt: skip
    """An N x C x H x W input in a memory format."""
    if _blank:
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=fmt)
    return (normal(*shape, dtype=torch.float32, seed=seed) + offset).to(dtype).contiguous(memory_format=fmt)


def norm_args(
    shape: Sequence[int], dtype: torch.dtype, fmt: torch.memory_format, bias: bool = True
) -> list[Any]:
    """Arguments of layer_norm2d."""
    x = image(*shape, dtype=dtype, fmt=fmt, offset=1.0)
    return [x, normal(shape[1], dtype=dtype, seed=1), normal(shape[1], dtype=dtype, seed=2) if bias else None]


def gate_args(shape: Sequence[int], out_channels: int, dtype: torch.dtype, fmt: torch.memory_format,
              bias: bool = True) -> list[Any]:  # fmt: skip
    """Arguments of pointwise_gate."""
    N, C, H, W = shape
    weight = normal(out_channels, C, 1, 1, dtype=dtype, seed=3, scale=C**-0.5)
    u = image(N, out_channels, H, W, dtype=dtype, fmt=fmt, seed=4)
    x = image(*shape, dtype=dtype, fmt=fmt)
    return [u, x, weight, normal(out_channels, dtype=dtype, seed=5) if bias else None]


def chain_args(shape: Sequence[int], stages: Sequence[tuple[int, int]], mask: Sequence[bool], dtype: torch.dtype,
               fmt: torch.memory_format = CONTIGUOUS) -> Arguments:  # fmt: skip
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


def star_conv_args(shape: Sequence[int], out_channels: int, dtype: torch.dtype, fmt: torch.memory_format,
                   bias: bool = True) -> list[Any]:  # fmt: skip
    """Arguments of star_conv."""
    C = shape[1]
    x, weight, norm_bias = norm_args(shape, dtype, fmt, bias)
    pw1, pw2 = (normal(out_channels, C, 1, 1, dtype=dtype, seed=s, scale=C**-0.5) for s in (6, 7))
    dw = normal(out_channels, 1, 3, 3, dtype=dtype, seed=8, scale=1 / 3)
    return [x, weight, norm_bias, pw1, dw, normal(out_channels, dtype=dtype, seed=9) if bias else None, pw2]


def attention_args(shape: Sequence[int], branches: Sequence[Sequence[tuple[int, int, int]]], dtype: torch.dtype,
                   fmt: torch.memory_format, bias: bool = True, biases_of_all: bool = False) -> Arguments:  # fmt: skip
    """Arguments of mm_lka; branches: a list of [(kh, kw, dilation), ...].

    Every third convolution has no bias, unless all have one.
    """
    C = shape[1]
    chunk = C // len(branches)
    convs = [conv for branch in branches for conv in branch]
    mask = [biases_of_all or i % 3 != 1 for i in range(len(convs))]
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
