"""The op `layer_norm2d`."""

from __future__ import annotations

import pytest
import torch

from sdan_fast import functional as F

from .harness import Case, OpContract


def case(name: str, *shape: int, bias: bool = True, shift: float = 0.0, **kwargs: float) -> Case:
    c = shape[1]
    return Case(name, lambda t: ((t(*shape) + shift, t(c), t(c) if bias else None), kwargs))


class TestLayerNorm2d(OpContract):
    fn_name = "layer_norm2d"
    cases = (
        case("default", 2, 6, 5, 7),
        case("no-bias", 1, 5, 3, 4, bias=False),
        case("eps", 1, 8, 4, 4, eps=1e-2),
        case("one-channel", 1, 1, 4, 5),
        case("one-pixel", 1, 56, 1, 1),
        case("sdan", 1, 56, 9, 21),
        case("mean-far-from-zero", 1, 28, 6, 9, shift=100.0),
    )


X = torch.ones(1, 4, 5, 5)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((X, torch.ones(3), None), ValueError, r"weight must have the shape \[4\], and its shape is \[3\]"),
        (
            (X, torch.ones(4), torch.ones(4).half()),
            TypeError,
            "bias must be float32 like x, and it is float16",
        ),
        ((X, torch.ones(4), None, 0.0), ValueError, "eps must be a positive number, and it is 0.0"),
        ((X, torch.ones(4), None, "small"), TypeError, "eps must be a positive number, and it is a str"),
        ((X[0], torch.ones(4), None), ValueError, "x must be N x C x H x W"),
    ],
)
def test_refusals(args: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.layer_norm2d(*args)
