"""The depth-wise convolution's CUDA kernels, run on the host."""

from __future__ import annotations

import pytest
import torch
from host_harness import DTYPES, FORMATS, ORDERS, check, laid_out, library, random

from sdan_fast.ops._op import OPS

CONV = OPS["depthwise_conv2d"]
STRIPS = (3, 5, 7, 9, 11, 13, 17, 19, 21, 23, 31, 35)


def tensors(shape, kernel, dtype=torch.float32, layout="contiguous", bias=True):
    """x, weight, bias, gradient."""
    taps = kernel[0] * kernel[1]
    x, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in (0, 1))
    weight = random(shape[1], 1, *kernel, dtype=dtype, seed=2, scale=taps**-0.5)
    return x, weight, random(shape[1], dtype=dtype, seed=3) if bias else None, g


def run(shape, kernel, dilation, dtype=torch.float32, layout="contiguous", bias=True, **kwargs):
    x, weight, b, g = tensors(shape, kernel, dtype, layout, bias)
    check(CONV, (x, weight, b), {"dilation": list(dilation)}, grad=g, **kwargs)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("k", STRIPS)
@pytest.mark.parametrize("vertical", [False, True])
def test_strip_lengths(k, vertical, layout):
    kernel = (k, 1) if vertical else (1, k)
    run((1, 3, 26, 40), kernel, (2, 2), layout=layout)
    run((1, 2, 7, 9), kernel, (1, 1), torch.bfloat16, layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kernel", [(1, 11), (11, 1), (7, 7)], ids=str)
def test_dilations(kernel, dilation, layout):
    run((1, 2, 37, 48), kernel, (dilation, dilation), layout=layout)


@pytest.mark.parametrize("layout", [*FORMATS, "shifted", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(1, 7), (7, 1), (5, 5), (9, 9), (3, 3)], ids=str)
def test_types_and_layouts(kernel, dtype, layout):
    run((2, 4, 16, 24), kernel, (1, 1), dtype, layout)
    run((2, 3, 11, 13), kernel, (2, 2), dtype, layout, bias=False)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("k", "d"), [(3, 1), (5, 1), (7, 1), (9, 1), (5, 3), (7, 4), (9, 5)])
def test_squares_on_tensor_cores(k, d, layout):
    """In 16 bits; in channels_last from 16 channels on."""
    c = 20 if layout == "channels_last" else 2
    run((1, c, 19, 24), (k, k), (d, d), torch.bfloat16, layout)
    run((1, c, 18, 21), (k, k), (d, d), torch.float16, layout, bias=False)


@pytest.mark.parametrize("layout", FORMATS)
def test_products_do_not_depend_on_the_order_of_threads(layout):
    run((1, 36, 20, 24), (7, 7), (1, 1), torch.bfloat16, layout, orders=tuple(ORDERS))


@pytest.mark.parametrize(("shape", "d"), [((1, 1, 3, 1100), 1), ((1, 1, 230, 24), 4)], ids=str)
def test_long_rows_and_columns_of_products(shape, d):
    run(shape, (7, 7), (d, d), torch.bfloat16)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("kernel", "dilation"),
    [
        ((1, 1), (1, 1)),
        ((1, 15), (1, 2)),
        ((25, 1), (3, 1)),
        ((3, 5), (2, 1)),
        ((9, 3), (1, 4)),
        ((11, 13), (1, 1)),
        ((1, 63), (1, 8)),
        ((63, 1), (8, 1)),
        ((3, 1), (1, 100)),
        ((3, 3), (40, 1)),
    ],
    ids=str,
)
def test_other_kernels(kernel, dilation, layout):
    run((1, 3, 19, 22), kernel, dilation, layout=layout)


@pytest.mark.parametrize("kernel", [(1, 11), (11, 1), (3, 3)], ids=str)
def test_far_dilations_take_the_other_layout(kernel):
    """Contiguous tiles would not fit in shared memory."""
    run((1, 2, 10, 12), kernel, (3000, 3000))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 1, 5), (1, 2, 5, 1), (1, 20, 3, 4), (1, 130, 2, 1)], ids=str
)
@pytest.mark.parametrize("kernel", [(1, 11), (11, 1), (5, 5)], ids=str)
def test_images_smaller_than_the_kernel(kernel, shape, layout):
    run(shape, kernel, (2, 2), layout=layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("kernel", "dilation"), [((1, 11), 6), ((11, 1), 6), ((7, 7), 4), ((3, 3), 1)], ids=str
)
def test_no_result_depends_on_the_order_of_threads(kernel, dilation, layout):
    run((2, 3, 21, 40), kernel, (dilation, dilation), layout=layout, orders=tuple(ORDERS))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kernel", [(1, 5), (5, 1), (3, 3)], ids=str)
def test_wide_and_tall_images_take_several_tiles(kernel, layout):
    run((1, 1, 3, 1100), kernel, (1, 1), layout=layout)
    run((1, 1, 700, 40), kernel, (2, 2), layout=layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kernel", [(1, 3), (3, 3)], ids=str)
def test_output_masks(kernel, layout):
    masks = [
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [False, True, True],
        [False] * 3,
    ]
    run((2, 3, 6, 8), kernel, (1, 1), layout=layout, masks=masks)


@pytest.mark.parametrize("layout", FORMATS)
def test_mixed_layouts(layout):
    x, weight, b, g = tensors((2, 6, 5, 8), (3, 3))
    other = "contiguous" if layout == "channels_last" else "channels_last"
    check(CONV, (laid_out(x, layout), weight, b), grad=laid_out(g, other))
    strided = weight.transpose(2, 3).contiguous().transpose(2, 3)
    check(CONV, (laid_out(x, layout), strided, b), grad=g)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty(shape):
    x, weight, b, g = tensors(shape, (3, 3))
    library()
    assert CONV.overloads["cuda_host"](x, weight, b).shape == shape
    grads = CONV.backward_overloads["cuda_host"](g, x, weight, b, output_mask=[True] * 3)
    assert grads[0].shape == shape and not grads[1].any() and not grads[2].any()
    assert grads[1].shape == weight.shape and grads[2].shape == b.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), "x must be N x C x H x W"),
        (lambda x, w, b: (x[:, :0], w[:0], b[:0]), "x must have at least one channel"),
        (lambda x, w, b: (x, w[:2], b), "weight must be C x 1 x kh x kw"),
        (lambda x, w, b: (x, w[..., :2], b), "with odd kh and kw"),
        (lambda x, w, b: (x, w.bfloat16(), b), "weight must have the dtype of x"),
        (lambda x, w, b: (x, w, b[:2]), "bias must have the shape"),
        (lambda x, w, b: (x.double(), w.double(), b.double()), "x must be float32, bfloat16 or float16"),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    library()
    args = change(*tensors((1, 3, 4, 5), (3, 3))[:3])
    with pytest.raises(RuntimeError, match=message):
        CONV.overloads["cuda_host"](*args)


def test_wrong_dilations_are_refused():
    library()
    x, weight, b, _ = tensors((1, 3, 4, 5), (3, 3))
    with pytest.raises(RuntimeError, match="dilation must be two positive integers"):
        CONV.overloads["cuda_host"](x, weight, b, dilation=[0, 1])
