"""The op `depthwise_conv2d`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdan_fast
from sdan_fast import functional as F
from sdan_fast import reference

from .harness import BACKENDS, Case, OpContract, assert_within_bound, cast, device_of


def case(
    name: str, shape: tuple[int, int, int, int], kernel: tuple[int, int], dilation: int | tuple[int, int] = 1,
    bias: bool = True,
) -> Case:  # fmt: skip
    c = shape[1]
    return Case(
        name,
        lambda t: ((t(*shape), t(c, 1, *kernel), t(c) if bias else None), {"dilation": dilation}),
    )


class TestDepthwiseConv2d(OpContract):
    fn_name = "depthwise_conv2d"
    cases = (
        case("3x3", (2, 3, 6, 7), (3, 3)),
        case("1x5-d2-nobias", (1, 4, 5, 9), (1, 5), 2, bias=False),
        case("5x1-pair", (1, 4, 9, 5), (5, 1), (3, 1)),
        case("7x7-d4", (1, 3, 30, 33), (7, 7), 4),
        case("9x9-d5-wide", (1, 2, 19, 70), (9, 9), 5),
        case("11x1-d6", (1, 5, 41, 18), (11, 1), 6),
        case("1x11-d6", (1, 5, 3, 67), (1, 11), 6),
        case("1x35", (1, 3, 4, 53), (1, 35)),
        case("31x1", (1, 3, 53, 4), (31, 1)),
        case("kernel-beyond-image", (1, 3, 3, 2), (9, 11), 3),
        case("one-pixel", (2, 5, 1, 1), (3, 3)),
        case("one-row", (1, 17, 1, 40), (3, 3)),
        case("one-column", (1, 17, 40, 1), (3, 3)),
        case("1x1-kernel", (1, 6, 5, 5), (1, 1)),
        case("channels-16", (1, 16, 8, 16), (3, 3)),
        case("channels-19", (1, 19, 7, 33), (5, 5), 2),
        case("rectangle", (1, 3, 11, 13), (3, 7), (2, 1)),
        case("wide", (1, 2, 9, 131), (1, 5)),
        case("wide-d6", (1, 2, 13, 300), (3, 5), (2, 6)),
        case("tall", (1, 2, 60, 37), (13, 3)),
        case("bands", (1, 1, 131, 250), (5, 5)),
        case("rows-of-13", (2, 13, 19, 23), (3, 3), (2, 1)),
        case("rows-of-28", (1, 28, 21, 37), (1, 11), 2),
        case("rows-of-30", (1, 30, 43, 9), (11, 1), 3),
        case("rows-of-60", (1, 60, 12, 14), (5, 7), bias=False),
        case("rows-of-9", (1, 9, 30, 29), (7, 3), (4, 13)),
        case("lines-of-31", (2, 31, 11, 9), (3, 3), (1, 2)),
        case("lines-of-12", (2, 12, 3, 31), (1, 5), 3),
        case("lines-of-8", (1, 8, 9, 21), (3, 1), bias=False),
        case("far-pixels", (1, 200, 3, 13), (1, 7)),
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 24), st.integers(1, 40)),
    kernel=st.tuples(st.integers(0, 7), st.integers(0, 7)).map(lambda k: (2 * k[0] + 1, 2 * k[1] + 1)),
    dilation=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels_last=st.booleans(),
    bias=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_any_shape(
    shape: tuple[int, ...], kernel: tuple[int, int], dilation: tuple[int, int], channels_last: bool, bias: bool,
    backend: str,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    args = cast(
        (
            x,
            torch.randn(shape[1], 1, *kernel, generator=generator),
            torch.randn(shape[1]) if bias else None,
        ),
        torch.float32,
        device_of(backend),
    )
    with sdan_fast.use_backend(backend):
        y = F.depthwise_conv2d(*args, dilation=dilation)
    exact = reference.depthwise_conv2d(*cast(args, torch.float64), dilation=dilation)
    assert_within_bound(y, reference.depthwise_conv2d(*args, dilation=dilation), exact)


X = torch.ones(1, 4, 5, 5)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        (
            (X[0], torch.ones(4, 1, 3, 3)),
            {},
            ValueError,
            r"x must be N x C x H x W, and its shape is \[4, 5, 5\]",
        ),
        ((X, torch.ones(4, 1, 2, 3)), {}, ValueError, "weight must have an odd kernel size, and it is 2x3"),
        ((X, torch.ones(3, 1, 3, 3)), {}, ValueError, r"weight must have the shape \[4, 1, kh, kw\]"),
        ((X, torch.ones(4, 4, 3, 3)), {}, ValueError, r"weight must have the shape \[4, 1, kh, kw\]"),
        (
            (X, torch.ones(4, 1, 3, 3), torch.ones(3)),
            {},
            ValueError,
            r"bias must have the shape \[4\].* \[3\]",
        ),
        (
            (X, torch.ones(4, 1, 3, 3).double()),
            {},
            TypeError,
            "weight must be float32 like x, and it is float64",
        ),
        (
            (X, torch.ones(4, 1, 3, 3)),
            {"dilation": 0},
            ValueError,
            "dilation must be at least 1, and it is 0",
        ),
        (
            (X, torch.ones(4, 1, 3, 3)),
            {"dilation": 2**31},
            ValueError,
            "dilation must be less than 1073741824, and it is 2147483648",
        ),
        (
            (X, torch.ones(4, 1, 3, 3)),
            {"dilation": (1, 2, 3)},
            ValueError,
            "dilation must be a positive int or a pair",
        ),
        (
            (X, torch.ones(4, 1, 3, 3)),
            {"dilation": 1.5},
            TypeError,
            "dilation must be a positive int or a pair",
        ),
        (
            (X, torch.ones(4, 1, 3, 3)),
            {"dilation": (1.5, 1)},
            TypeError,
            "dilation must be a positive int or a pair",
        ),
        ((None, torch.ones(4, 1, 3, 3)), {}, TypeError, "x must be a torch.Tensor, and it is a NoneType"),
        (
            (X, torch.ones(4, 1, 3, 3, device="meta")),
            {},
            ValueError,
            "weight must be on cpu like x, and it is on meta",
        ),
    ],
)
def test_refusals(args: tuple, kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.depthwise_conv2d(*args, **kwargs)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels are not built")
def test_strips_in_channels_last_stay_within_their_scratch() -> None:
    """A tile of 4 n + 3 rows once read a row beyond; in a fresh process and a new thread's memory that is fatal."""
    code = """
import torch
from sdan_fast import functional as F, use_backend
torch.set_num_threads(2)
x = torch.randn(1, 28, 180, 320).contiguous(memory_format=torch.channels_last)
with use_backend("cpu"), torch.no_grad():
    for _ in range(5):
        F.depthwise_conv2d(x, torch.randn(28, 1, 1, 35), torch.randn(28))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kernel", "dilation", "shape"),
    [((1, 5), (1, 2), (1, 2, 520, 517)), ((3, 3), (2, 1), (1, 2, 1500, 1417))],
)
def test_large_planes_row_by_row(
    kernel: tuple[int, int], dilation: tuple[int, int], shape: tuple[int, ...]
) -> None:
    """Planes beyond a cache are read one row after the other: the same sums, in the same order."""
    if "cpu" not in BACKENDS:
        pytest.skip("needs the cpu kernels")
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator)
    weight, bias = torch.randn(shape[1], 1, *kernel, generator=generator), torch.randn(shape[1])
    with sdan_fast.use_backend("cpu"):
        whole = F.depthwise_conv2d(x, weight, bias, dilation=dilation)
        halo = (kernel[0] // 2) * dilation[0]
        for first in (
            0,
            200,
            shape[2] - 100,
        ):  # as many rows as a cache holds, with what they need around them
            begin, end = max(first - halo, 0), min(first + 100 + halo, shape[2])
            part = F.depthwise_conv2d(x[:, :, begin:end].contiguous(), weight, bias, dilation=dilation)
            assert torch.equal(
                whole[:, :, first : first + 100], part[:, :, first - begin : first - begin + 100]
            )


@pytest.mark.parametrize(("taps", "dilation"), [(3, 1), (11, 1), (11, 6), (21, 1), (35, 1)])
def test_strips_at_every_alignment(taps: int, dilation: int) -> None:
    """Vectors are shifted together from whole cache lines: what else lies in those must not count, NaN included."""
    if "cpu" not in BACKENDS:
        pytest.skip("needs the cpu kernels")
    generator = torch.Generator().manual_seed(7)
    shape = (1, 2, 5, 207)
    weight, bias = torch.randn(2, 1, 1, taps, generator=generator), torch.randn(2)
    plain = torch.randn(shape, generator=generator)
    with sdan_fast.use_backend("cpu"):
        expected = F.depthwise_conv2d(plain, weight, bias, dilation=dilation)
        for offset in range(16):
            memory = torch.full((plain.numel() + 64,), torch.nan)
            x = memory[offset : offset + plain.numel()].view(shape).copy_(plain)
            assert torch.equal(F.depthwise_conv2d(x, weight, bias, dilation=dilation), expected)
    exact = reference.depthwise_conv2d(plain.double(), weight.double(), bias.double(), dilation=dilation)
    eager = reference.depthwise_conv2d(plain, weight, bias, dilation=dilation)
    assert_within_bound(expected, eager, exact)


def test_what_pytorch_does_not_survive() -> None:
    """A slice of a channels_last tensor in bfloat16, autocast's too, for which oneDNN's code generator may go on for
    ever; the weight gradient of one channel under a tall kernel, which PyTorch writes beyond its memory; training in
    bfloat16 on large channels_last images, whose forward "auto" leaves to PyTorch, and whose gradient is ours."""
    code = """
import torch
from sdan_fast import functional as F, use_backend
x = torch.randn(1, 8, 23, 38).contiguous(memory_format=torch.channels_last)
weight = torch.randn(8, 1, 1, 21)
with use_backend("reference"), torch.no_grad():
    F.depthwise_conv2d(x.bfloat16()[:, 4:], weight[4:].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        F.depthwise_conv2d(x, weight)
for _ in range(2):
    x, weight = torch.randn(2, 1, 13, 5, requires_grad=True), torch.randn(1, 1, 63, 1, requires_grad=True)
    gradients = torch.autograd.grad(F.depthwise_conv2d(x, weight).sum(), (x, weight))
    # Of the taps along a column, each is multiplied by the rows that it meets.
    sums = x.detach().sum((0, 1, 3))
    wanted = torch.stack([sums[max(0, k - 31):max(0, 13 + min(0, k - 31))].sum() for k in range(63)])
    torch.testing.assert_close(gradients[1].flatten(), wanted, rtol=1e-4, atol=1e-4)
x = torch.randn(1, 28, 120, 125).bfloat16().contiguous(memory_format=torch.channels_last)
weight, results = torch.randn(28, 1, 11, 1).bfloat16(), []
for backend, dtype in (("cpu", torch.bfloat16), ("auto", torch.bfloat16), ("auto", torch.float32)):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y = F.depthwise_conv2d(*leaves, dilation=(6, 1))
    assert y.dtype == torch.bfloat16
    results.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
for gradients in results[1:]:
    for gradient, wanted in zip(gradients, results[0]):
        torch.testing.assert_close(gradient.bfloat16(), wanted)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
