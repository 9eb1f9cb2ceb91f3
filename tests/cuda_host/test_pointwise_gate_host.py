"""The gated 1x1 convolution's CUDA kernels, run on the host; its product is PyTorch's there as on a GPU."""

from __future__ import annotations

import pytest
import torch
from host_harness import DTYPES, FORMATS, ORDERS, check, laid_out, library, random

from sdan_fast.ops._op import OPS

GATE = OPS["pointwise_gate"]
ALL = [True] * 4


def tensors(shape, ci, dtype=torch.float32, layout="contiguous", bias=True):
    """u, x, weight, bias; and the gradient of the output."""
    n, co, h, w = shape
    u, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in (0, 1))
    x = laid_out(random(n, ci, h, w, dtype=dtype, seed=2), layout)
    weight = random(co, ci, 1, 1, dtype=dtype, seed=3, scale=ci**-0.5)
    return (u, x, weight, random(co, dtype=dtype, seed=4) if bias else None), g


@pytest.mark.parametrize("layout", [*FORMATS, "shifted", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "ci"), [((2, 16, 9, 16), 8), ((1, 5, 7, 11), 3), ((1, 3, 1, 1), 4)], ids=str
)
def test_types_and_layouts(shape, ci, dtype, layout):
    args, g = tensors(shape, ci, dtype, layout)
    check(GATE, args, grad=g)
    args, g = tensors(shape, ci, dtype, layout, bias=False)
    check(GATE, args, grad=g)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("shape", "ci"), [((1, 4, 40, 132), 8), ((3, 260, 3, 4), 6), ((2, 4, 9, 12), 3)], ids=str
)
def test_several_blocks(shape, ci, layout):
    args, g = tensors(shape, ci, layout=layout)
    check(GATE, args, grad=g)


@pytest.mark.parametrize("layout", FORMATS)
def test_no_result_depends_on_the_order_of_threads(layout):
    args, g = tensors((2, 8, 6, 12), 8, layout=layout)
    check(GATE, args, grad=g, orders=tuple(ORDERS))


@pytest.mark.parametrize("layout", FORMATS)
def test_output_masks(layout):
    args, g = tensors((2, 4, 5, 8), 4, layout=layout)
    masks = [[bool(i >> j & 1) for j in range(4)] for i in range(16)]
    check(GATE, args, grad=g, masks=masks)


def test_mixed_layouts():
    args, g = tensors((2, 4, 6, 8), 4)
    u, x, weight, bias = args
    check(GATE, (u, laid_out(x, "channels_last"), weight, bias), grad=laid_out(g, "channels_last"))
    check(GATE, (laid_out(u, "channels_last"), x, laid_out(weight, "sliced"), bias), grad=g)


@pytest.mark.parametrize(("shape", "ci"), [((0, 3, 4, 5), 2), ((2, 3, 0, 5), 2)], ids=str)
def test_empty(shape, ci):
    args, g = tensors(shape, ci)
    library()
    assert GATE.overloads["cuda_host"](*args).shape == shape
    grads = GATE.backward_overloads["cuda_host"](g, *args, output_mask=ALL)
    assert [t.shape for t in grads] == [t.shape for t in args]
    assert not any(t.any() for t in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, x, w, b: (u[0], x, w, b), "u must be N x C x H x W"),
        (lambda u, x, w, b: (u[:, :0], x, w[:0], b[:0]), "u must have at least one channel"),
        (lambda u, x, w, b: (u, x[:, :0], w[:, :0], b), "x must have at least one channel"),
        (lambda u, x, w, b: (u, x[..., :2], w, b), "x must have the batch, height and width of u"),
        (lambda u, x, w, b: (u, x.half(), w, b), "x must have the dtype of u"),
        (lambda u, x, w, b: (u, x, w[:1], b), "weight must have the shape"),
        (lambda u, x, w, b: (u, x, w, b[:1]), "bias must have the shape"),
        (
            lambda u, x, w, b: tuple(t.double() for t in (u, x, w, b)),
            "u must be float32, bfloat16 or float16",
        ),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    library()
    args, g = tensors((1, 3, 4, 5), 4)
    with pytest.raises(RuntimeError, match=message):
        GATE.overloads["cuda_host"](*change(*args))
    with pytest.raises(RuntimeError, match=message):
        GATE.backward_overloads["cuda_host"](g, *change(*args), output_mask=ALL)
