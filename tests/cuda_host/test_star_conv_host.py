"""star_conv's CUDA kernels, run on the host; its products are PyTorch's there as on a GPU."""

from __future__ import annotations

import pytest
import torch
from host_harness import DTYPES, FORMATS, ORDERS, check, laid_out, library, random

from sdan_fast.ops._op import OPS

STAR_CONV = OPS["star_conv"]
ACTIVATIONS = ("none", "gelu", "relu6", "relu", "silu")
ALL = [True] * 7


def tensors(shape, co, dtype=torch.float32, layout="contiguous", bias=True, seed=0):
    """x, norm_weight, norm_bias, pw1, dw, dw_bias, pw2; and the gradient of the output."""
    n, ci, h, w = shape
    x = laid_out(random(*shape, dtype=dtype, seed=seed), layout)
    g = laid_out(random(n, co, h, w, dtype=dtype, seed=seed + 1), layout)
    nw, nb = random(ci, dtype=dtype, seed=2), random(ci, dtype=dtype, seed=3)
    pw1, pw2 = (random(co, ci, 1, 1, dtype=dtype, seed=s, scale=ci**-0.5) for s in (4, 5))
    dw, db = random(co, 1, 3, 3, dtype=dtype, seed=6, scale=0.4), random(co, dtype=dtype, seed=7)
    return (x, nw, nb if bias else None, pw1, dw, db if bias else None, pw2), g


@pytest.mark.parametrize("layout", [*FORMATS, "shifted", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "co"), [((2, 8, 9, 16), 12), ((1, 5, 7, 11), 3), ((1, 3, 1, 1), 4)], ids=str
)
def test_types_and_layouts(shape, co, dtype, layout):
    args, g = tensors(shape, co, dtype, layout)
    check(STAR_CONV, args, {"outer": "gelu"}, grad=g)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "co"), [((1, 16, 40, 24), 8), ((3, 4, 18, 132), 6)], ids=str)
def test_several_groups_and_warps(shape, co, layout):
    """More rows than a thread takes, and rows longer than a warp; the GEMM's order is PyTorch's, so is its layout."""
    args, g = tensors(shape, co, layout=layout)
    check(STAR_CONV, args, grad=g)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("outer", ACTIVATIONS)
def test_outer_activations(outer, layout):
    args, g = tensors((1, 6, 5, 8), 4, layout=layout, bias=False)
    check(
        STAR_CONV,
        args,
        {"outer": outer, "eps": 1e-3},
        grad=g,
        masks=[[True, True, False, True, True, False, True]],
    )


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "co"), [((2, 8, 6, 12), 8), ((1, 5, 6, 7), 5)], ids=str)
def test_no_result_depends_on_the_order_of_threads(shape, co, layout):
    args, g = tensors(shape, co, layout=layout)
    check(STAR_CONV, args, {"outer": "silu"}, grad=g, orders=tuple(ORDERS))


@pytest.mark.parametrize("layout", FORMATS)
def test_output_masks(layout):
    args, g = tensors((2, 4, 5, 8), 4, layout=layout)
    masks = [[i == j for j in range(7)] for i in range(7)]
    masks += [
        [False] * 7,
        [False, False, False, False, True, True, False],
        [True, False, False, True, True, False, True],
    ]
    check(STAR_CONV, args, grad=g, masks=masks)


@pytest.mark.parametrize("layout", FORMATS)
def test_more_channels_than_one_block_takes(layout):
    args, g = tensors((1, 5, 4, 6), 132, layout=layout)
    check(STAR_CONV, args, grad=g)


def test_many_input_channels_in_channels_last():
    """The LayerNorm's backward has no channels_last kernel for these: everything runs on contiguous copies."""
    args, g = tensors((1, 516, 3, 4), 4, layout="channels_last")
    check(STAR_CONV, args, grad=g)


def test_mixed_layouts():
    args, g = tensors((2, 4, 6, 8), 4)
    check(STAR_CONV, args, grad=laid_out(g, "channels_last"))
    x = laid_out(args[0], "channels_last")
    pw1 = laid_out(args[3].transpose(0, 1).contiguous().transpose(0, 1), "sliced")
    check(STAR_CONV, (x, *args[1:3], pw1, *args[4:]), grad=g)


@pytest.mark.parametrize("layout", FORMATS)
def test_nan_stays_where_it_belongs(layout):
    """A NaN reaches the 3 x 3 pixels around it, forward and 5 x 5 backward, and nothing beyond."""
    args, g = tensors((1, 4, 12, 16), 4, layout=layout)
    library()
    args[0][0, :, 5, 7] = float("nan")
    y = STAR_CONV.overloads["cuda_host"](*args)
    want = STAR_CONV.reference(*args)
    assert torch.equal(y.isnan(), want.isnan()) and y.isnan().any()
    gx = STAR_CONV.backward_overloads["cuda_host"](g, *args, output_mask=[True] + [False] * 6)[0]
    wgx = STAR_CONV.reference_backward(g, *args, output_mask=[True] + [False] * 6)[0]
    assert torch.equal(gx.isnan(), wgx.isnan())


@pytest.mark.parametrize(("shape", "co"), [((0, 3, 4, 5), 2), ((2, 3, 0, 5), 2), ((1, 3, 4, 5), 0)], ids=str)
def test_empty(shape, co):
    args, g = tensors(shape, co)
    library()
    y = STAR_CONV.overloads["cuda_host"](*args)
    assert y.shape == (shape[0], co, *shape[2:])
    grads = STAR_CONV.backward_overloads["cuda_host"](g, *args, output_mask=ALL)
    assert [t.shape for t in grads] == [t.shape for t in args]
    assert not any(t.any() for t in grads)


def _replaced(i, change):
    def replace(args):
        return (*args[:i], change(args[i]), *args[i + 1 :])

    return replace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replaced(0, lambda t: t[0]), "x must be N x C x H x W"),
        (_replaced(0, lambda t: t[:, :0]), "x must have at least one channel"),
        (_replaced(0, lambda t: t.double()), "x must be float32, bfloat16 or float16"),
        (_replaced(1, lambda t: t[:2]), "norm_weight must have the shape"),
        (_replaced(2, lambda t: t.bfloat16()), "norm_bias must have the dtype of x"),
        (_replaced(3, lambda t: t[0]), "pw1_weight must be Co x C x 1 x 1"),
        (_replaced(3, lambda t: t[:, :2]), "pw1_weight must have the shape"),
        (_replaced(4, lambda t: t[..., :1]), "takes a 3 x 3 depth-wise weight, got"),
        (_replaced(5, lambda t: t[:1]), "dw_bias must have the shape"),
        (_replaced(6, lambda t: t[:2]), "pw2_weight must have the shape"),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    library()
    args, g = tensors((1, 3, 4, 5), 4)
    args = change(args)
    with pytest.raises(RuntimeError, match=message):
        STAR_CONV.overloads["cuda_host"](*args)
    with pytest.raises(RuntimeError, match=message):
        STAR_CONV.backward_overloads["cuda_host"](g, *args, output_mask=ALL)


def test_autograd_and_autocast_leave_the_products_alone():
    """The op reached by itself, as torch.ops: its products take out=, which autograd forbids and autocast ignores."""
    args, g = tensors((1, 4, 6, 8), 4)
    library()
    op, mask = STAR_CONV.overloads["cuda_host"], ALL
    y = op(*args)
    leaves = [t.clone().requires_grad_() for t in args]
    out = op(*leaves)
    assert torch.equal(out, y)
    found = torch.autograd.grad(out, leaves, g)
    grads = STAR_CONV.backward_overloads["cuda_host"](g, *args, output_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.sdan_fast.star_conv.cuda_host(*args), y)
        again = STAR_CONV.backward_overloads["cuda_host"](g, *args, output_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
    with torch.inference_mode():
        assert torch.equal(op(*args), y)
