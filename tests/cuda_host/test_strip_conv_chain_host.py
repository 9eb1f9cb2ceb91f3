"""The strip chain's CUDA kernels, plain and gated, run on the host."""

from __future__ import annotations

import pytest
import torch
from host_harness import DTYPES, FORMATS, ORDERS, assert_bound, check, laid_out, library, order, random

from sdan_fast.ops._op import OPS

CHAIN, GATED = OPS["strip_conv_chain"], OPS["gated_strip_conv_chain"]
PAIR = ((11, 11, 1, 1), (11, 11, 6, 6))


def tensors(shape, stages, dtype=torch.float32, layout="contiguous", biases=None):
    """The op's arguments, and a gradient. Stages are (kw, kh, dw, dh); `biases` has a digit per convolution."""
    c, mask = shape[1], [b == "1" for b in biases or "11" * len(stages)]
    weights, dilations = [], []
    for i, (kw, kh, dw, dh) in enumerate(stages):
        weights.append(random(c, 1, 1, kw, dtype=dtype, seed=10 + i, scale=kw**-0.5))
        weights.append(random(c, 1, kh, 1, dtype=dtype, seed=20 + i, scale=kh**-0.5))
        dilations += [dw, dh]
    present = [random(c, dtype=dtype, seed=30 + i) for i, there in enumerate(mask) if there]
    x, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in (0, 1))
    return (x, weights, present), {"bias_mask": mask, "dilations": dilations}, g


def run(shape, stages, dtype=torch.float32, layout="contiguous", biases=None, grad=True, **kwargs):
    args, attributes, g = tensors(shape, stages, dtype, layout, biases)
    check(CHAIN, args, attributes, grad=g if grad else None, **kwargs)


@pytest.mark.parametrize("layout", [*FORMATS, "shifted", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_and_layouts(dtype, layout):
    run((1, 3, 37, 41), PAIR, dtype, layout)
    run((2, 8, 16, 24), ((7, 7, 1, 1), (7, 7, 3, 3)), dtype, layout, "0110")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("biases", ["1111", "0000", "1000", "0100", "0010", "0001", "1011"])
def test_any_bias_may_be_missing(biases, layout):
    run((1, 4, 9, 12), ((5, 3, 1, 1), (3, 5, 2, 3)), layout=layout, biases=biases)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "stages",
    [
        ((7, 7, 1, 1),),
        ((3, 3, 1, 1), (5, 5, 2, 2), (3, 3, 4, 4)),
        ((3, 3, 1, 1), (3, 3, 2, 2), (5, 5, 1, 1), (3, 3, 3, 3)),
        ((5, 5, 1, 1), (7, 7, 3, 3)),
        ((5, 5, 3, 3), (3, 3, 5, 5)),
        ((3, 5, 2, 1), (7, 1, 1, 8)),
        ((35, 35, 1, 1),),
        ((1, 1, 1, 1), (15, 29, 1, 1)),
        ((63, 63, 8, 8), (3, 3, 1, 1)),
    ],
    ids=str,
)
def test_stages(stages, layout):
    run((1, 6, 27, 30), stages, layout=layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 50), (1, 2, 50, 1), (1, 20, 3, 4)], ids=str)
def test_images_smaller_than_the_kernels(shape, layout):
    run(shape, PAIR, layout=layout)
    run(shape, ((23, 23, 1, 1),), torch.bfloat16, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_patch(dtype):
    """64 positions are eight threads' 9 outputs each, and with dilation 6 twice as many threads' 5."""
    run((1, 2, 64, 64), PAIR, dtype, grad=dtype == torch.float32)
    run((1, 1, 61, 67), ((11, 11, 1, 1), (11, 11, 1, 1)), dtype, grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_images_take_several_tiles_and_steps(dtype):
    """Lines that shared memory does not hold are cut, so that blocks begin in the middle of the image."""
    run((1, 1, 3, 1100), PAIR, dtype, grad=False)
    run((1, 1, 900, 12), PAIR, dtype, grad=False)
    run((1, 12, 3, 900), PAIR, dtype, "channels_last", grad=False)
    run((1, 4, 700, 9), ((5, 5, 1, 1), (7, 7, 3, 3)), dtype, "channels_last", grad=False)


def test_far_dilations_take_one_convolution_at_a_time():
    run((1, 1, 8, 6000), ((3, 3, 2900, 1), (3, 3, 2500, 1)), grad=False)


@pytest.mark.parametrize("layout", FORMATS)
def test_no_result_depends_on_the_order_of_threads(layout):
    run((2, 3, 21, 40), PAIR, layout=layout, orders=tuple(ORDERS))
    run((1, 4, 300, 8), PAIR, torch.float16, layout, orders=tuple(ORDERS), grad=False)


def test_output_masks():
    masks = [[i == j for j in range(9)] for i in range(9)]
    masks += [[True] + [False] * 7 + [True], [False] * 9, [False, *[True] * 8]]
    run((2, 3, 6, 8), ((3, 3, 1, 1), (3, 3, 2, 2)), masks=masks)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty(shape):
    args, kwargs, g = tensors(shape, ((3, 3, 1, 1),))
    library()
    assert CHAIN.overloads["cuda_host"](*args, **kwargs).shape == shape
    grads = CHAIN.backward_overloads["cuda_host"](g, *args, **kwargs, output_mask=[True] * 5)
    assert grads[0].shape == shape and not any(g.any() for g in grads[1:])
    assert GATED.overloads["cuda_host"](g, *args, **kwargs).shape == shape


@pytest.mark.parametrize("layout", [*FORMATS, "shifted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 21])
def test_gate(dtype, layout, width):
    args, kwargs, u = tensors((1, 4, 19, width), PAIR, dtype, layout)
    library()
    for gate in (u, laid_out(u, "channels_last" if layout == "contiguous" else "contiguous")):
        results = []
        for name in ORDERS:
            with order(name):
                results.append(GATED.overloads["cuda_host"](gate, *args, **kwargs))
        doubles = [args[0].double(), *([t.double() for t in ts] for ts in args[1:])]
        exact = u.double() * CHAIN.reference(*doubles, **kwargs)
        assert_bound(results[0], u * CHAIN.reference(*args, **kwargs), exact, "gate")
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_gate_of_three_stages_and_of_far_dilations():
    for shape, stages in (
        ((1, 2, 9, 8), ((3, 3, 1, 1), (3, 3, 2, 2), (3, 3, 1, 1))),
        ((1, 1, 8, 6000), ((3, 3, 2900, 1),)),
    ):
        args, kwargs, u = tensors(shape, stages)
        library()
        doubles = [args[0].double(), *([t.double() for t in ts] for ts in args[1:])]
        exact = u.double() * CHAIN.reference(*doubles, **kwargs)
        assert_bound(
            GATED.overloads["cuda_host"](u, *args, **kwargs), u * CHAIN.reference(*args, **kwargs), exact
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), "x must be N x C x H x W"),
        (lambda x, w, b: (x[:, :0], w, b), "x must have at least one channel"),
        (lambda x, w, b: (x, w[:1], b), "a horizontal and a vertical strip for each stage"),
        (lambda x, w, b: (x, w[::-1], b), "weight 0 must be C x 1 x 1 x k with odd k"),
        (lambda x, w, b: (x, w, b[:1]), "bias_mask announces 2 biases, got 1"),
        (lambda x, w, b: (x, [w[0].half(), w[1]], b), "a weight must have the dtype of x"),
        (lambda x, w, b: (x, w, [b[0], b[1][:2]]), "a bias must have the shape"),
        (lambda x, w, b: (x.double(), [t.double() for t in w], [t.double() for t in b]), "x must be float32"),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    library()
    args, kwargs, g = tensors((1, 3, 5, 6), ((3, 3, 1, 1),))
    with pytest.raises(RuntimeError, match=message):
        CHAIN.overloads["cuda_host"](*change(*args), **kwargs)
    with pytest.raises(RuntimeError, match="u must have the shape of x"):
        GATED.overloads["cuda_host"](g[..., :2], *args, **kwargs)
