"""The op `pointwise_gate`."""

from __future__ import annotations

import pytest
import torch

from sdan_fast import functional as F
from sdan_fast import ops

from .harness import BACKENDS, Case, OpContract, same_bits


def case(name: str, n: int, co: int, ci: int, h: int, w: int, bias: bool = True) -> Case:
    return Case(
        name,
        lambda t: ((t(n, co, h, w), t(n, ci, h, w), t(co, ci, 1, 1) / ci**0.5, t(co) if bias else None), {}),
    )


class TestPointwiseGate(OpContract):
    fn_name = "pointwise_gate"
    images = 2
    cases = (
        case("default", 2, 4, 6, 5, 7),
        case("no-bias", 1, 5, 3, 4, 4, bias=False),
        case("one-pixel", 1, 7, 9, 1, 1),
        case("sdan", 1, 56, 56, 9, 37),
        case("one-channel", 1, 1, 1, 6, 17),
        case("prime", 1, 13, 11, 17, 19),
        case("many", 1, 64, 28, 5, 50),
        case("long-sums", 1, 64, 130, 1, 1),
        case("pairs-and-a-rest", 2, 70, 6, 3, 11),
        # Neither outputs, inputs nor pixels come out even in matrix tiles; less pixels than one has rows.
        case("tiles-and-a-rest", 1, 47, 62, 5, 13),
        case("less-than-a-tile", 1, 33, 34, 1, 3),
    )


U, X, W = torch.ones(1, 4, 5, 5), torch.ones(1, 3, 5, 5), torch.ones(4, 3, 1, 1)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels are not built")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("n", "co", "ci", "h", "w"), [(1, 24, 64, 37, 50), (3, 13, 70, 9, 33)])
def test_threads_find_the_same_bits(
    layout: torch.memory_format, n: int, co: int, ci: int, h: int, w: int
) -> None:
    """Tiles that do not divide an image end at the same pixels for any number of threads."""
    u, x = (torch.randn(n, c, h, w).contiguous(memory_format=layout) for c in (co, ci))
    weight = torch.randn(co, ci, 1, 1)
    kernel = ops.pointwise_gate.overloads["cpu"]
    same_bits(lambda mask: [kernel(u, x, weight, None)] if mask[0] else [], 1)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (
            (U, X[..., :4], W),
            ValueError,
            r"u must agree with x in N, H and W, .* \[1, 4, 5, 5\] and \[1, 3, 5, 4\]",
        ),
        (
            (U, X, W[:3]),
            ValueError,
            r"weight must have the shape \[4, 3, 1, 1\], and its shape is \[3, 3, 1, 1\]",
        ),
        ((U, X, W.flatten(1)), ValueError, r"weight must have the shape \[4, 3, 1, 1\]"),
        ((U, X, W, torch.ones(3)), ValueError, r"bias must have the shape \[4\], and its shape is \[3\]"),
        ((U, X.half(), W), TypeError, "x must be float32 like u, and it is float16"),
        ((U, X[:, :0], W[:, :0]), ValueError, r"x must have at least one channel, .* \[1, 0, 5, 5\]"),
        ((U[:, :0], X, W[:0]), ValueError, "u must have at least one channel"),
    ],
)
def test_refusals(args: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.pointwise_gate(*args)
