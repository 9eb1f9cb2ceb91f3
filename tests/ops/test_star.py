"""The op `star`."""

from __future__ import annotations

import pytest
import torch

from sdan_fast import functional as F

from .harness import Case, OpContract

ACTIVATIONS = ("none", "gelu", "relu6", "relu", "silu")


def case(name: str, *shape: int, scale: float = 2.0, **kwargs: str) -> Case:
    return Case(name, lambda t: ((scale * t(*shape), scale * t(*shape)), kwargs))


class TestStar(OpContract):
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
