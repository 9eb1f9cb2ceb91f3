"""The op `star`."""

from __future__ import annotations

import math

import pytest
import torch

import sdan_fast
from sdan_fast import functional as F

from .harness import BACKENDS, Case, OpContract, device_of, same_bits

ACTIVATIONS = ("none", "gelu", "relu6", "relu", "silu")


def star_backward(overload: str, *tensors: torch.Tensor, **kwargs: object) -> list[torch.Tensor]:
    """Both gradients, unless a mask says otherwise, by one overload of the op itself."""
    return getattr(torch.ops.sdan_fast.star_backward, overload)(
        *tensors, **{"output_mask": [True, True], **kwargs}
    )


def case(name: str, *shape: int, scale: float = 2.0, **kwargs: str) -> Case:
    return Case(name, lambda t: ((scale * t(*shape), scale * t(*shape)), kwargs))


class TestStar(OpContract):
    any_shape = True
    fn_name = "star"
    images = 2
    cases = (
        case("default", 2, 3, 5, 7),
        case("silu-gelu", 1, 4, 6, 5, activation="silu", outer="gelu"),
        case("one", 1, 1, 1, 1),
        case("prime", 1, 13, 17, 19),
        *(case(f"{a}-{o}", 1, 5, 3, 11, activation=a, outer=o) for a in ACTIVATIONS for o in ACTIVATIONS),
    )


def test_any_rank() -> None:
    for shape in ((), (7,), (3, 4), (2, 3, 4, 5, 6)):
        a, b = torch.randn(shape), torch.randn(shape)
        torch.testing.assert_close(F.star(a, b), torch.nn.functional.gelu(a) * b)


def short_intervals(dtype: torch.dtype, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges of some 900 intervals, from the smallest normal number to `most` on either side, and 128 values in each."""
    least = max(torch.finfo(dtype).tiny, 1e-30)
    magnitudes = torch.logspace(math.log10(least), math.log10(most), 300, dtype=torch.float64)
    edges = torch.cat([-magnitudes.flip(0), magnitudes, torch.linspace(-7, 7, 281, dtype=torch.float64)])
    low, high = edges[:-1, None], edges[1:, None]
    return edges, (low + (high - low) * torch.linspace(0, 1, 128, dtype=torch.float64)).to(dtype)


def assert_within_bound_everywhere(
    got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, edges: torch.Tensor
) -> None:
    """The error bound in each of many short intervals, not only relative to the largest of all values."""
    error = (got.double() - exact).abs().amax(1)
    eps = torch.finfo(got.dtype).eps
    bound = 2 * (eager.double() - exact).abs().amax(1) + 2 * eps * exact.abs().amax(1)
    over = (error > bound).nonzero().flatten()
    assert not len(over), (edges[over[0]], error[over[0]], bound[over[0]])


@pytest.mark.parametrize("backend", [b.name for b in sdan_fast.backends.status() if b.available])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gelu_at_every_magnitude(dtype: torch.dtype, backend: str) -> None:
    edges, a = short_intervals(dtype, 14)
    a = a.to(device_of(backend))
    with sdan_fast.use_backend(backend):
        got = F.star(a, torch.ones_like(a))
    assert_within_bound_everywhere(
        got, torch.nn.functional.gelu(a), torch.nn.functional.gelu(a.double()), edges
    )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gradients_at_every_magnitude(activation: str, dtype: torch.dtype) -> None:
    """Up to 13: beyond, GELU's derivative is denormal."""
    edges, a = short_intervals(dtype, 13)
    one = torch.ones_like(a)
    found = [
        star_backward(overload, one.to(kind), a.to(kind), one.to(kind), activation=activation)
        for overload, kind in (("cpu", dtype), ("default", dtype), ("default", torch.float64))
    ]
    for got, eager, exact in zip(*found, strict=True):
        assert_within_bound_everywhere(got, eager, exact, edges)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
def test_gradients_at_kinks_infinities_and_nan() -> None:
    """What PyTorch's formulas make of each element alone: its vectors of GELU differ."""
    inf, nan = math.inf, math.nan
    values = [
        inf,
        -inf,
        nan,
        0.0,
        -0.0,
        6.0,
        3e38,
        -3e38,
        1e-45,
        -1e-45,
        1.0,
        -1.0,
        5.9999995,
        6.0000005,
        -100.0,
    ]
    a, b, grad = (
        t.flatten()
        for t in torch.meshgrid(
            torch.tensor(values),
            torch.tensor([1.0, -2.0, 0.0, inf]),
            torch.tensor([1.0, inf, nan, 0.0]),
            indexing="ij",
        )
    )
    elements = [tuple(t[i : i + 1] for t in (grad, a, b)) for i in range(len(a))]
    for activation in ACTIVATIONS:
        for outer in ACTIVATIONS:
            kwargs = {"activation": activation, "outer": outer}
            got = star_backward("cpu", grad, a, b, **kwargs)
            alone = [star_backward("default", *element, **kwargs) for element in elements]
            for g, wanted in zip(got, zip(*alone, strict=True), strict=True):
                torch.testing.assert_close(g, torch.cat(wanted), rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
def test_gradients_are_the_same_bits_for_any_threads_and_mask() -> None:
    a, b, grad = torch.randn(3, 2, 7, 93, 57)
    for activation, outer in (("gelu", "none"), ("silu", "gelu")):
        same_bits(
            lambda mask, activation=activation, outer=outer: star_backward(
                "cpu", grad, a, b, activation=activation, outer=outer, output_mask=mask
            ),
            slots=2,
        )


def test_infinities_and_nan() -> None:
    """As the formulas say; PyTorch's own vectors of GELU make NaN of infinity and infinity of 3e38."""
    inf, nan = math.inf, math.nan
    a = torch.tensor([inf, -inf, nan, 0.0, 3e38, -3e38])
    for activation, expected in {
        "none": [inf, -inf, nan, 0.0, 3e38, -3e38],
        "gelu": [inf, nan, nan, 0.0, 3e38, 0.0],
        "relu6": [6.0, 0.0, nan, 0.0, 6.0, 0.0],
        "relu": [inf, 0.0, nan, 0.0, 3e38, 0.0],
        "silu": [inf, nan, nan, 0.0, 3e38, 0.0],
    }.items():
        for copies in (1, 13):  # a part of a vector, and vectors with a part
            with sdan_fast.use_backend("cpu"):
                got = F.star(a.repeat(copies), torch.ones(6 * copies), activation=activation)
            assert torch.equal(
                got.nan_to_num(-1, 1e39, -1e39),
                torch.tensor(expected).repeat(copies).nan_to_num(-1, 1e39, -1e39),
            )


@pytest.mark.parametrize(
    ("a", "b", "kwargs", "error", "words"),
    [
        (
            torch.ones(2, 3),
            torch.ones(2, 4),
            {},
            ValueError,
            r"b must have the shape \[2, 3\] of a, .* \[2, 4\]",
        ),
        (torch.ones(2), torch.ones(2).half(), {}, TypeError, "b must be float32 like a, and it is float16"),
        (torch.ones(2).int(), torch.ones(2).int(), {}, TypeError, "a must be float32, .* and it is int32"),
        ([1.0], torch.ones(1), {}, TypeError, "a must be a torch.Tensor, and it is a list"),
        (torch.ones(1), 2.0, {}, TypeError, "b must be a torch.Tensor, and it is a float"),
        (
            torch.ones(1),
            torch.ones(1),
            {"activation": "tanh"},
            ValueError,
            "activation must be one of .* 'tanh'",
        ),
        (torch.ones(1), torch.ones(1), {"outer": 3}, ValueError, "outer must be one of .* and it is 3"),
        (torch.ones(1).to_sparse(), torch.ones(1), {}, TypeError, "a must be a dense .* torch.sparse_coo"),
    ],
)
def test_refusals(a: object, b: object, kwargs: dict[str, str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.star(a, b, **kwargs)  # type: ignore[arg-type]


def test_batches_of_second_derivatives_of_silu() -> None:
    """aten's own gradient of SiLU has no derivative, where a formula that vmap sees through is differentiated."""
    a, b = (
        torch.randn(2, 3, 4, dtype=torch.float32).requires_grad_(),
        torch.randn(2, 3, 4, dtype=torch.float32),
    )
    grads = []
    for run in (sdan_fast.functional.star, sdan_fast.reference.star):
        y = run(a, b, activation="silu", outer="silu")
        vectors = torch.ones(2, *y.shape, dtype=y.dtype)
        (first,) = torch.autograd.grad(y, a, vectors, is_grads_batched=True, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), a)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
