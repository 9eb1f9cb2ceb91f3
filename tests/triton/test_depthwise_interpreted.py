"""Rung 1: the depth-wise kernels under the Triton interpreter, forward and backward, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_harness import DTYPES, FORMATS, check_op

from sdan_fast import reference
from sdan_fast.kernels import depthwise_conv2d as op
from sdan_fast.kernels.reduce import Sums, finish


def inputs(shape, kernel, dtype, fmt=torch.contiguous_format, *, bias=True, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen).to(dtype).contiguous(memory_format=fmt)
    weight = torch.randn((shape[1], 1, *kernel), generator=gen).to(dtype)
    return [x, weight, torch.randn(shape[1], generator=gen).to(dtype) if bias else None]


# (shape, filter, dilation): strips, squares, dilated, rows that are whole vectors and rows that are not, images smaller
# than the filter, one pixel, prime sizes
CASES = [
    ((2, 1, 5, 16), (1, 3), (1, 1)),
    ((1, 2, 9, 8), (3, 1), (1, 1)),
    ((1, 1, 7, 16), (3, 3), (1, 1)),
    ((1, 2, 13, 5), (5, 1), (3, 3)),
    ((1, 1, 3, 21), (1, 11), (2, 2)),
    ((1, 1, 1, 1), (5, 5), (1, 1)),
    ((1, 2, 2, 3), (5, 3), (2, 3)),
]


@pytest.mark.parametrize("shape, kernel, dilation", CASES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_reference(shape, kernel, dilation, fmt, dtype):
    check_op(op, reference.depthwise_conv2d, inputs(shape, kernel, dtype, fmt), {"dilation": dilation})


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    "kernel, dilation", [((23, 1), (1, 1)), ((1, 63), (1, 1)), ((7, 7), (4, 4))], ids=str
)
def test_large_filters(kernel, dilation, fmt):
    check_op(
        op,
        reference.depthwise_conv2d,
        inputs((1, 1, 4, 8), kernel, torch.float32, fmt),
        {"dilation": dilation},
    )


# (shape, filter, dilation, dtype): more outputs a thread than the small images above give it, in either layout
SHARED_LOADS = [
    ((1, 1, 3, 72), (1, 3), 1, torch.bfloat16),
    ((1, 1, 2, 67), (1, 5), 2, torch.float32),
    ((1, 1, 2, 128), (1, 11), 6, torch.bfloat16),
    ((1, 1, 33, 4), (3, 1), 1, torch.float32),
    ((1, 4, 5, 35), (3, 3), 1, torch.bfloat16),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape, kernel, dilation, dtype", SHARED_LOADS, ids=str)
def test_shared_loads(shape, kernel, dilation, dtype, fmt):
    check_op(
        op, reference.depthwise_conv2d, inputs(shape, kernel, dtype, fmt), {"dilation": (dilation, dilation)}
    )


LENGTHS = (3, 5, 7, 9, 11, 13, 17, 19, 21, 23, 31, 35, 63)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("k", LENGTHS)
def test_every_strip(k, fmt):
    """Dtypes, dilations and widths in rotation: the length unrolls the same lines of code."""
    turn = LENGTHS.index(k)
    for kernel in ((1, k), (k, 1)):
        dtype, d = DTYPES[turn % 3], (1, (k + 1) // 2)[turn % 2]
        shape = (1, 1, 3, 72) if kernel[0] == 1 and k <= 23 else (1, 2, 9, 16)
        check_op(op, reference.depthwise_conv2d, inputs(shape, kernel, dtype, fmt), {"dilation": (d, d)})
        turn += 1


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("turn, k", enumerate([3, 5, 7, 9, 13]))
def test_every_square(turn, k, fmt):
    d = (1, (k + 1) // 2)[turn % 2]
    args = inputs((2, 1, 8, 16), (k, k), DTYPES[turn % 3], fmt)
    check_op(op, reference.depthwise_conv2d, args, {"dilation": (d, d)})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_output_mask(bias, needed):
    check_op(
        op, reference.depthwise_conv2d, inputs((1, 2, 6, 8), (3, 1), torch.float32, bias=bias), needed=needed
    )


def test_layouts():
    """Sliced, transposed, expanded inputs; a view that starts off a 16-byte boundary."""
    x, weight, bias = inputs((1, 4, 5, 8), (1, 3), torch.float32)
    views = [
        x[:, 1:3],
        x.transpose(2, 3),
        x[:1, :, :1].expand(1, 4, 5, 8),
        torch.randn(4 * 5 * 8 + 1)[1:].view(1, 4, 5, 8),
        x.contiguous(memory_format=torch.channels_last)[:, :3],
        x[..., ::2],
    ]
    for view in views:
        c = view.shape[1]
        check_op(op, reference.depthwise_conv2d, [view, weight[:c], bias[:c]])
    check_op(op, reference.depthwise_conv2d, [x, weight.transpose(2, 3).flip(0), bias.flip(0)])


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
def test_slices_of_channels_are_read_and_written_in_place(fmt):
    """What mm_lka does: one chunk of channels in, the same chunk of another tensor out, the rest of it untouched."""
    x, weight, bias = inputs((2, 8, 5, 16), (1, 5), torch.float32, fmt)
    y = torch.full_like(x, 777.0)
    op.convolve(x[:, 2:6], weight[2:6], bias[2:6], y[:, 2:6], (1, 1))
    expected = reference.depthwise_conv2d(x[:, 2:6], weight[2:6], bias[2:6])
    torch.testing.assert_close(y[:, 2:6], expected, rtol=1e-5, atol=1e-5)
    assert (y[:, :2] == 777).all() and (y[:, 6:] == 777).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
def test_64_bit_addressing(fmt, monkeypatch):
    """The path of images over 2^31 elements, forced onto a small one: same numbers."""
    args = inputs((1, 2, 9, 16), (3, 3), torch.float32, fmt)
    expected = op.forward(*args)
    grads = op.backward(expected, *args, output_mask=[True, True, True])
    monkeypatch.setattr(op, "wide_plane", lambda *_: True)
    assert torch.equal(op.forward(*args), expected)
    again = op.backward(expected, *args, output_mask=[True, True, True])
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


def test_partial_sums_over_2_31_floats():
    """Of a matrix of 4M numbers, 512 rows are 2^31 floats. NumPy's zeros cost no memory until written."""
    partial = torch.from_numpy(np.zeros((513, 2**22), np.float32))
    partial[0, :8], partial[512, :8] = 1, 2
    total = torch.empty(8)
    finish(partial, Sums.matrix(2**22), total)
    assert (total == 3).all()


def test_empty():
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x, weight, bias = inputs(shape, (3, 3), torch.float32)
        assert op.forward(x, weight, bias).shape == shape
        gx, gw, gb = op.backward(x, x, weight, bias, output_mask=[True, True, True])
        assert gx.shape == shape and (gw == 0).all() and (gb == 0).all()


def test_repeats_bitwise():
    args = inputs((2, 1, 9, 8), (3, 3), torch.bfloat16)
    y = op.forward(*args)
    runs = [op.backward(y, *args, output_mask=[True, True, True]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_supports_says_why():
    x, weight, bias = inputs((1, 2, 5, 5), (3, 3), torch.float32)
    assert op.supports(x, weight, bias) is None
    assert "65" in op.supports(x, torch.zeros(2, 1, 1, 65), bias)
    assert "dtype" in op.supports(x, weight.bfloat16(), bias)
