"""The one-sentence refusals that the ops share: each names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._op import FLOATING


def tensor(name: str, value: Any, *, like: Tensor | None = None, like_name: str = "x") -> None:
    """Refuse what is no floating point tensor, or has another dtype or device than `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, and it is a {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, and its layout is {value.layout}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, and it is {_dtype(value)}")
    if like is None:
        return
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must be {_dtype(like)} like {like_name}, and it is {_dtype(value)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, and it is on {value.device}")


def image(name: str, value: Any, *, like: Tensor | None = None, like_name: str = "x") -> None:
    """Refuse what is no N x C x H x W tensor, has no channels, which eager convolutions answer wrongly, or no pixels,
    which those refuse. A batch may be empty.
    """
    tensor(name, value, like=like, like_name=like_name)
    if value.dim() != 4:
        raise ValueError(f"{name} must be N x C x H x W, and its shape is {shape(value)}")
    if value.shape[1] == 0:
        raise ValueError(f"{name} must have at least one channel, and its shape is {shape(value)}")
    if value.shape[2] == 0 or value.shape[3] == 0:
        raise ValueError(f"{name} must have at least one row and one column, and its shape is {shape(value)}")


def parameter(name: str, value: Any, expected: Sequence[int], *, like: Tensor, like_name: str = "x") -> None:
    """Refuse a parameter of another shape than `expected`."""
    tensor(name, value, like=like, like_name=like_name)
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have the shape {list(expected)}, and its shape is {shape(value)}")


def pointwise(name: str, weight: Any, channels: int, *, like: Tensor) -> int:
    """Refuse what is no weight of a 1x1 convolution of `channels`; the channels that it makes."""
    tensor(name, weight, like=like)
    if weight.dim() != 4 or list(weight.shape[1:]) != [channels, 1, 1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name} must have the shape [Co, {channels}, 1, 1], and its shape is {shape(weight)}"
        )
    return weight.shape[0]


def depthwise(
    name: str, weight: Any, bias: Any, channels: int, *, like: Tensor, kernel: tuple[int, int] | None = None
) -> None:
    """Refuse a depth-wise weight that is not (channels, 1, kh, kw) with odd kh, kw, or a bias of another size."""
    tensor(f"{name}weight", weight, like=like)
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(
            f"{name}weight must have the shape [{channels}, 1, kh, kw], and its shape is {shape(weight)}"
        )
    kh, kw = weight.shape[2], weight.shape[3]
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"{name}weight must have an odd kernel size, and it is {kh}x{kw}")
    if kernel is not None and (kh, kw) != kernel:
        raise ValueError(
            f"{name}weight must have the kernel size {kernel[0]}x{kernel[1]}, and it is {kh}x{kw}"
        )
    if bias is not None:
        parameter(f"{name}bias", bias, (channels,), like=like)


FARTHEST = 1 << 30  # kernels hold dilations in 32 bits


def dilations(name: str, values: Any, count: int) -> None:
    """Refuse dilations that are not `count` positive ints, or reach farther than any kernel does."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"{name} must be a positive int or a pair of them, and it is {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be a positive int or a pair of them, and it is {values!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, and it is {value}")
        if value >= FARTHEST:
            raise ValueError(f"{name} must be less than {FARTHEST}, and it is {value}")


def epsilon(value: Any) -> None:
    """Refuse an eps that is no positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"eps must be a positive number, and it is a {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"eps must be a positive number, and it is {value}")


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a word that is not among `choices`."""
    if value not in choices:
        words = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {words}, and it is {value!r}")


def shape(value: Tensor) -> list[int]:
    """The shape as the messages print it."""
    return list(value.shape)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
