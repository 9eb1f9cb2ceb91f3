"""The LayerNorm's CUDA kernels, run on the host."""

from __future__ import annotations

import pytest
import torch
from host_harness import DTYPES, FORMATS, ORDERS, check, laid_out, library, random

from sdan_fast.ops._op import OPS

NORM = OPS["layer_norm2d"]


def tensors(shape, dtype=torch.float32, layout="contiguous", bias=True, offset=0.0):
    """x, weight, bias, gradient."""
    x, g = (laid_out(random(*shape, dtype=dtype, seed=s) + offset, layout) for s in (0, 1))
    weight = random(shape[1], dtype=dtype, seed=2)
    return x, weight, random(shape[1], dtype=dtype, seed=3) if bias else None, g


@pytest.mark.parametrize("layout", [*FORMATS, "shifted", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 56, 64, 72])
def test_types_and_layouts(channels, dtype, layout):
    x, weight, bias, g = tensors((2, channels, 5, 8), dtype, layout)
    check(NORM, (x, weight, bias), grad=g)
    x, weight, bias, g = tensors((1, channels, 3, 7), dtype, layout, bias=False)
    check(NORM, (x, weight, None, 1e-3), grad=g)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(3, 8, 17, 40), (1, 200, 3, 4), (1, 1100, 1, 2), (2, 130, 1, 1)], ids=str)
def test_several_tiles_and_many_channels(shape, layout):
    x, weight, bias, g = tensors(shape, layout=layout)
    check(NORM, (x, weight, bias), grad=g)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [16, 70])
def test_no_result_depends_on_the_order_of_threads(channels, layout):
    x, weight, bias, g = tensors((2, channels, 9, 16), layout=layout)
    check(NORM, (x, weight, bias), grad=g, orders=tuple(ORDERS))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [24, 56, 72, 131, 520])
@pytest.mark.parametrize("offset", [-1e4, 100.0, 300.0])
def test_large_mean(offset, channels, layout):
    """The statistics are those of the differences from the mean: a large mean costs no accuracy at all, where it
    costs eager some."""
    x, weight, bias, g = tensors((1, channels, 4, 8), layout=layout, offset=offset)
    check(NORM, (x, weight, bias), grad=g)
    y = NORM.overloads["cuda_host"](x, weight, bias)
    gx, gw, _ = NORM.backward_overloads["cuda_host"](g, x, weight, bias, output_mask=[True] * 3)
    exact = [t.double() for t in (x, weight, bias, g)]
    want = NORM.reference(*exact[:3])
    wgx, wgw, _ = NORM.reference_backward(exact[3], *exact[:3], output_mask=[True] * 3)
    for got, wanted in ((y, want), (gx, wgx), (gw, wgw)):
        assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("layout", FORMATS)
def test_constant_pixels(layout):
    """No variance at all: the square root is that of eps, never of something negative."""
    x, weight, bias, g = tensors((1, 56, 4, 8), layout=layout)
    x = torch.full_like(x, 1234.567)
    check(NORM, (x, weight, bias), grad=g)


@pytest.mark.parametrize("layout", FORMATS)
def test_output_masks(layout):
    x, weight, bias, g = tensors((2, 12, 3, 8), layout=layout)
    masks = [
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [False, True, True],
        [False] * 3,
    ]
    check(NORM, (x, weight, bias), grad=g, masks=masks)


def test_mixed_layouts():
    x, weight, bias, g = tensors((2, 12, 3, 8))
    check(NORM, (x, weight, bias), grad=laid_out(g, "channels_last"))
    check(NORM, (laid_out(x, "channels_last"), weight, bias), grad=g)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty(shape):
    x, weight, bias, g = tensors(shape)
    library()
    assert NORM.overloads["cuda_host"](x, weight, bias).shape == shape
    grads = NORM.backward_overloads["cuda_host"](g, x, weight, bias, output_mask=[True] * 3)
    assert grads[0].shape == shape and not grads[1].any() and not grads[2].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), "x must be N x C x H x W"),
        (lambda x, w, b: (x[:, :0], w[:0], b[:0]), "x must have at least one channel"),
        (lambda x, w, b: (x, w[:2], b), "weight must have the shape"),
        (lambda x, w, b: (x, w, b.bfloat16()), "bias must have the dtype of x"),
        (lambda x, w, b: (x.double(), w.double(), b.double()), "x must be float32, bfloat16 or float16"),
        (lambda x, w, b: (x[:, :1].expand(1, 5000, 4, 5), w, b), "at most 4096 channels, got 5000"),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    library()
    args = change(*tensors((1, 3, 4, 5))[:3])
    with pytest.raises(RuntimeError, match=message):
        NORM.overloads["cuda_host"](*args)
