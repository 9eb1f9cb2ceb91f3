"""The star's CUDA kernels, run on the host."""

from __future__ import annotations

import pytest
import torch
from host_harness import DTYPES, FORMATS, ORDERS, check, laid_out, library, poisoned, random

from sdan_fast.ops._op import OPS

STAR = OPS["star"]
ACTIVATIONS = ("none", "gelu", "relu6", "relu", "silu")
ALL = [[True, True], [True, False], [False, True], [False, False]]


def tensors(shape, dtype, layout="contiguous", scale=3.0):
    return [laid_out(random(*shape, dtype=dtype, seed=s, scale=scale), layout) for s in range(3)]


def test_allocations_are_poisoned():
    library()
    with poisoned():
        assert torch.empty(7).isnan().all()


@pytest.mark.parametrize("outer", ACTIVATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, activation, outer):
    a, b, g = tensors((2, 3, 7, 11), dtype)
    check(STAR, (a, b), {"activation": activation, "outer": outer}, grad=g)


@pytest.mark.parametrize("layout", [*FORMATS, "shifted", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 5, 9, 13), (1, 1, 1, 1), (3, 8, 1, 16), (0, 4, 5, 6), (2, 16, 20, 33)], ids=str
)
def test_shapes_and_layouts(shape, dtype, layout):
    a, b, g = tensors(shape, dtype, layout)
    check(STAR, (a, b), {"outer": "gelu"}, grad=g, masks=ALL, orders=tuple(ORDERS))


@pytest.mark.parametrize("other", [*FORMATS, "shifted", "sliced"])
@pytest.mark.parametrize("first", [*FORMATS, "sliced"])
def test_mixed_layouts(first, other):
    a, b, g = tensors((2, 6, 5, 8), torch.float32)
    check(STAR, (laid_out(a, first), laid_out(b, other)), grad=laid_out(g, other))
    check(STAR, (laid_out(a, first), laid_out(b, other)), grad=laid_out(g, first), masks=ALL)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_large_values(dtype, scale):
    a = random(1, 2, 16, 33, dtype=dtype, scale=scale)
    b, g = random(1, 2, 16, 33, dtype=dtype, seed=1), random(1, 2, 16, 33, dtype=dtype, seed=2)
    for activation in ACTIVATIONS:
        check(STAR, (a, b), {"activation": activation}, grad=g)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_negative_tail(dtype, activation):
    """Where the GELU is tiny, the error must be tiny too: no large value hides it in the bound."""
    a = torch.linspace(-6, -3, 301).to(dtype).view(1, 1, 7, 43)
    b, g = torch.ones_like(a), torch.ones_like(a)
    check(STAR, (a, b), {"activation": activation}, grad=g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_propagate_as_in_eager(dtype):
    values = [float("nan"), float("inf"), -1e30 if dtype != torch.float16 else -6e4, 0.0, -0.0, 6.0]
    a = torch.tensor(values).to(dtype).view(1, 1, 1, -1).expand(1, 1, 3, -1).contiguous()
    b = torch.ones_like(a)
    library()
    for activation in ACTIVATIONS:
        # ATen's vectorized GELU makes a NaN of infinity on CPUs, though not elsewhere: the formula does not.
        exact = 0.5 * a.double() * (1 + torch.erf(a.double() * 0.5**0.5))
        want = exact.to(dtype) if activation == "gelu" else STAR.reference(a, b, activation=activation)
        got = STAR.overloads["cuda_host"](a, b, activation=activation)
        assert torch.equal(got.isnan(), want.isnan()), activation
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), activation
        grads = [
            f(b, a, b, activation=activation, output_mask=[True, True])[0].isnan()
            for f in (STAR.backward_overloads["cuda_host"], STAR.backward_overloads[""])
        ]
        assert torch.equal(grads[0][..., 0], grads[1][..., 0])  # a NaN stays one where eager's stays one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a, b[:, :1]), "b must have the shape of a"),
        (lambda a, b: (a, b.bfloat16()), "b must have the dtype of a"),
        (lambda a, b: (a.double(), b.double()), "a must be float32, bfloat16 or float16"),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    library()
    a, b = change(*tensors((1, 2, 3, 4), torch.float32)[:2])
    with pytest.raises(RuntimeError, match=message):
        STAR.overloads["cuda_host"](a, b)
    with pytest.raises(RuntimeError, match=message):
        STAR.backward_overloads["cuda_host"](a, a, b, output_mask=[True, True])


def test_wrong_names_and_masks_are_refused():
    library()
    a, b, g = tensors((1, 2, 3, 4), torch.float32)
    with pytest.raises(RuntimeError, match="activation must be none, gelu, relu6, relu or silu, got swish"):
        STAR.overloads["cuda_host"](a, b, activation="swish")
    with pytest.raises(RuntimeError, match="output_mask must have 2 entries, got 1"):
        STAR.backward_overloads["cuda_host"](g, a, b, output_mask=[True])
    with pytest.raises(RuntimeError, match="grad_output must have the shape of a"):
        STAR.backward_overloads["cuda_host"](g[..., :2], a, b, output_mask=[True, True])
