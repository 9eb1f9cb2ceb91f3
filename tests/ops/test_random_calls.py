"""Calls of the elementary ops that nobody thought of: shapes, strides, dtypes and options drawn at random.

The draws are the same in every run, so that a failure is a change of the code's. Results are held to the bound of
all tests (harness.py). Float32 gradients, and float32 results of ops with several convolutions in a row, are held to
four times it: where the terms of a small result cancel (one pixel, one channel), eager PyTorch's error, which is the
yardstick, may by luck be close to none. Of 4,000 such calls 15 had a gradient over the
bound itself, the worst 3.1 times; `mm_lka`'s, with most of them, have 0.5 (biases) to 0.9 (images) of eager's errors in
the geometric mean over 400 calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sdan_fast
from sdan_fast import functional as F
from sdan_fast import ops
from sdan_fast.ops.star import ACTIVATIONS

from .harness import BACKENDS, DTYPES, FORMATS, assert_within_bound, cast, device_of, fresh, laid_out, tensors

Draw = Callable[[st.SearchStrategy[Any]], Any]
Build = Callable[[Draw, int, Callable[..., Tensor]], tuple[list[Any], dict[str, Any]]]

CHANNELS = st.sampled_from((1, 2, 3, 5, 8, 9, 14, 16, 17, 24, 28, 31, 33, 48, 56, 61, 64))
HEIGHTS = st.sampled_from((1, 2, 3, 5, 7, 8, 11, 16, 17, 23, 32, 45))
WIDTHS = st.sampled_from((1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 33, 50, 64, 71))
DILATIONS = st.sampled_from((1, 1, 2, 3, 6))
ACTIVATION = st.sampled_from(ACTIVATIONS)


def odd(most: int) -> st.SearchStrategy[int]:
    return st.sampled_from([k for k in (1, 3, 5, 7, 9, 11, 13, 17, 23, 31) if k <= most])


KERNELS = st.one_of(
    odd(13).map(lambda k: (1, k)), odd(13).map(lambda k: (k, 1)), odd(7).map(lambda k: (k, k))
)


def perhaps(draw: Draw, t: Tensor) -> Tensor | None:
    return t if draw(st.booleans()) else None


def depthwise(draw: Draw, c: int, t: Callable[..., Tensor]) -> tuple[list[Any], dict[str, Any]]:
    kh = draw(odd(31))
    kw = draw(odd(31 if kh <= 5 else 7))
    args = [t(c, 1, kh, kw) / (kh * kw) ** 0.5, perhaps(draw, t(c))]
    return args, {"dilation": (draw(DILATIONS), draw(DILATIONS))}


def chain(draw: Draw, c: int, t: Callable[..., Tensor]) -> tuple[list[Any], dict[str, Any]]:
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        k = draw(odd(23))
        h, v = t(c, 1, 1, k) / k**0.5, t(c, 1, k, 1) / k**0.5
        stages.append((h, perhaps(draw, t(c)), v, perhaps(draw, t(c)), draw(DILATIONS)))
    return [stages], {}


def pointwise(draw: Draw, c: int, t: Callable[..., Tensor]) -> tuple[list[Any], dict[str, Any]]:
    co = draw(CHANNELS)
    return [t(co, c, 1, 1) / c**0.5, perhaps(draw, t(co))], {"activation": draw(ACTIVATION)}


def gate(draw: Draw, c: int, t: Callable[..., Tensor]) -> tuple[list[Any], dict[str, Any]]:
    ci = draw(CHANNELS)
    return [t(c, ci, 1, 1) / ci**0.5, perhaps(draw, t(c))], {}


def norm(draw: Draw, c: int, t: Callable[..., Tensor]) -> tuple[list[Any], dict[str, Any]]:
    return [1 + t(c) / 10, perhaps(draw, t(c))], {}


def star(draw: Draw, c: int, t: Callable[..., Tensor]) -> tuple[list[Any], dict[str, Any]]:
    return [], {"activation": draw(ACTIVATION), "outer": draw(ACTIVATION)}


def star_conv(draw: Draw, c: int, t: Callable[..., Tensor]) -> tuple[list[Any], dict[str, Any]]:
    co, kh, kw = draw(CHANNELS), draw(odd(7)), draw(odd(5))
    args = [1 + t(c) / 10, perhaps(draw, t(c)), t(co, c, 1, 1) / c**0.5]
    args += [t(co, 1, kh, kw) / (kh * kw) ** 0.5, perhaps(draw, t(co)), t(co, c, 1, 1) / c**0.5]
    return args, {"outer": draw(ACTIVATION)}


def attention(draw: Draw, c: int, t: Callable[..., Tensor]) -> tuple[list[Any], dict[str, Any]]:
    cut = draw(st.integers(0, c - 1))
    branches = []
    for width in filter(None, (cut, c - cut)):
        layers = []
        for _ in range(draw(st.integers(1, 4))):
            kh, kw = draw(KERNELS)
            layers.append((t(width, 1, kh, kw) / (kh * kw) ** 0.5, perhaps(draw, t(width)), draw(DILATIONS)))
        branches.append(layers)
    return [branches, t(c, c, 1, 1) / c**0.5, perhaps(draw, t(c))], {}


# The op, its number of images (a gate's second has channels of its own), and what follows them.
OPS: dict[str, tuple[int, Build]] = {
    "depthwise_conv2d": (1, depthwise),
    "strip_conv_chain": (1, chain),
    "gated_strip_conv_chain": (2, chain),
    "star": (2, star),
    "layer_norm2d": (1, norm),
    "pointwise_conv2d": (1, pointwise),
    "pointwise_gate": (2, gate),
    "star_conv": (1, star_conv),
    "mm_lka": (1, attention),
}
IN_A_ROW = {"strip_conv_chain", "gated_strip_conv_chain", "star_conv", "mm_lka"}


def results(name: str, backend: str, args: list[Any], kwargs: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    with sdan_fast.use_backend(backend):
        y = getattr(F, name)(*args, **kwargs)
        return [y.detach(), *torch.autograd.grad(y, tensors(args), grad.to(y.dtype))]


def check(data: st.DataObject, name: str, backend: str) -> None:
    images, build = OPS[name]
    draw = data.draw
    shape = (draw(st.integers(1, 3)), draw(CHANNELS), draw(HEIGHTS), draw(WIDTHS))
    dtype, device = draw(st.sampled_from(DTYPES)), device_of(backend)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))

    def t(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    rest, kwargs = build(draw, shape[1], t)
    channels = [shape[1]] * images
    if name == "pointwise_gate":
        channels[1] = rest[0].shape[1]
    scale, offset = draw(st.sampled_from((1.0, 0.01, 10.0))), draw(st.sampled_from((0.0, 0.0, 3.0)))
    pictures = [t(shape[0], c, *shape[2:]) * scale + offset for c in channels]
    args = cast([*pictures, *rest], dtype, device)
    args[:images] = [laid_out(x, draw(st.sampled_from(FORMATS))) for x in args[:images]]
    args = [*(x.detach().requires_grad_() for x in args[:images]), *fresh(args[images:], dtype, True)]

    with sdan_fast.use_backend("reference"), torch.no_grad():
        like = getattr(F, name)(*args, **kwargs)
    grad = laid_out(cast(t(*like.shape), dtype, device), draw(st.sampled_from(FORMATS)))
    exact = results(name, "reference", fresh(args, torch.float64, True), kwargs, grad)
    eager = results(name, "reference", args, kwargs, grad)
    ours = results(name, backend, args, kwargs, grad)
    times = 4 if dtype is torch.float32 else 1
    assert_within_bound(ours[0], eager[0], exact[0], times=times if name in IN_A_ROW else 1)
    for i, (value, plain, right) in enumerate(zip(ours[1:], eager[1:], exact[1:], strict=True)):
        assert_within_bound(value, plain, right, f"gradient {i}", times)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls(data: st.DataObject, name: str, backend: str) -> None:
    if backend not in getattr(ops, name).kernels:
        pytest.skip(f"plain PyTorch on {backend}")
    check(data, name, backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_many_random_calls(data: st.DataObject, name: str) -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("the CPU kernels are not built")
    check(data, name, "cpu")
