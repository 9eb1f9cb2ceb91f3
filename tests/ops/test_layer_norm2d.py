"""The op `layer_norm2d`."""

from __future__ import annotations

import pytest
import torch

from sdan_fast import functional as F

from .harness import BACKENDS, Case, OpContract, laid_out, same_bits


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
        case("many-channels", 1, 130, 3, 5),
    )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_are_the_same_bits_for_any_threads_and_mask(layout: str) -> None:
    """Of several tiles and parts, with tails of pixels and of channels."""
    x, grad = (laid_out(t, layout) for t in torch.randn(2, 3, 21, 67, 41))
    weight, bias = torch.randn(2, 21)
    same_bits(
        lambda mask: torch.ops.sdan_fast.layer_norm2d_backward.cpu(
            grad, x, weight, bias, 1e-5, output_mask=mask
        ),
        slots=3,
    )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
def test_gradients_of_one_channel_are_zero() -> None:
    """Exactly: a rounding error would come out multiplied by 1 / sqrt(eps)."""
    grad, x = torch.randn(2, 1, 1, 9, 37)
    weight = torch.full((1,), 1.1)
    for layout in ("contiguous", "sliced"):
        gx, gw = torch.ops.sdan_fast.layer_norm2d_backward.cpu(
            laid_out(grad, layout), laid_out(x, layout), weight, None, 1e-6, output_mask=[True, True, False]
        )
        assert not gx.any() and not gw.any()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
def test_parameter_gradients_of_no_pixels_are_zero() -> None:
    weight = torch.ones(5)
    for shape in ((0, 5, 3, 4), (2, 5, 0, 4)):
        x = torch.empty(shape)
        gx, gw, gb = torch.ops.sdan_fast.layer_norm2d_backward.cpu(
            x, x, weight, weight, 1e-5, output_mask=[True, True, True]
        )
        assert gx.shape == x.shape and not gw.any() and not gb.any()


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
        ((X[:, :0], torch.ones(0), None), ValueError, "x must have at least one channel"),
    ],
)
def test_refusals(args: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.layer_norm2d(*args)
