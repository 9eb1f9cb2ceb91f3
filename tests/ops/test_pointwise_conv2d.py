"""The op `pointwise_conv2d`."""

from __future__ import annotations

import pytest
import torch

import sdan_fast
from sdan_fast import functional as F
from sdan_fast import ops, reference

from .harness import BACKENDS, Case, OpContract


def case(
    name: str, n: int, co: int, ci: int, h: int, w: int, bias: bool = True, activation: str = "none"
) -> Case:
    return Case(
        name,
        lambda t: (
            (t(n, ci, h, w), t(co, ci, 1, 1) / ci**0.5, t(co) if bias else None),
            {"activation": activation},
        ),
    )


class TestPointwiseConv2d(OpContract):
    fn_name = "pointwise_conv2d"
    cases = (
        case("default", 2, 4, 6, 5, 7),
        case("gelu", 2, 6, 4, 5, 7, activation="gelu"),
        case("no-bias", 1, 5, 3, 4, 4, bias=False),
        case("one-pixel", 1, 7, 9, 1, 1, activation="silu"),
        case("sdan", 1, 28, 56, 9, 37, activation="gelu"),
        case("one-channel", 1, 1, 1, 6, 17, activation="relu6"),
        case("prime", 1, 13, 11, 17, 19, bias=False, activation="relu"),
        case("many", 1, 64, 28, 5, 50),
        case("long-sums", 1, 64, 130, 1, 1),
        case("pairs-and-a-rest", 2, 70, 6, 3, 11, activation="gelu"),
        case("wide", 1, 56, 448, 6, 9, activation="gelu"),
        # Neither outputs, inputs nor pixels come out even in matrix tiles; less pixels than one has rows.
        case("tiles-and-a-rest", 1, 47, 62, 5, 13, activation="gelu"),
        case("less-than-a-tile", 1, 34, 66, 1, 3),
    )

    @pytest.fixture(autouse=True)
    def needs_a_kernel(self, request: pytest.FixtureRequest) -> None:
        """Elsewhere the op is PyTorch's own, which is the yardstick."""
        spec = getattr(request.node, "callspec", None)
        backend = spec.params.get("backend") if spec is not None else None
        if backend is not None and backend not in ops.pointwise_conv2d.kernels:
            pytest.skip(f"plain PyTorch on {backend}")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels are not built")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_choice_of_gradients(layout: torch.memory_format) -> None:
    """What is left out changes nothing of the rest."""
    x = torch.randn(2, 12, 9, 11).contiguous(memory_format=layout)
    weight, bias, grad = torch.randn(20, 12, 1, 1), torch.randn(20), torch.randn(2, 20, 9, 11)
    backward = ops.pointwise_conv2d.backward_overloads["cpu"]
    whole = backward(grad, x, weight, bias, activation="gelu", output_mask=[True] * 3)
    for bits in range(8):
        mask = [bool(bits & 1 << i) for i in range(3)]
        some = backward(grad, x, weight, bias, activation="gelu", output_mask=mask)
        wanted = [g for g, there in zip(whole, mask, strict=True) if there]
        assert len(some) == len(wanted) and all(map(torch.equal, some, wanted)), mask


def test_a_backend_without_a_kernel_leaves_it_to_pytorch() -> None:
    x, weight = torch.randn(1, 3, 4, 5), torch.randn(2, 3, 1, 1)
    missing = [name for name in sdan_fast.backends.ORDER[:-1] if name not in ops.pointwise_conv2d.kernels]
    assert {"triton", "cuda"} <= set(missing)
    for name in missing:
        with sdan_fast.use_backend(name):
            assert torch.equal(F.pointwise_conv2d(x, weight), reference.pointwise_conv2d(x, weight))


X, W = torch.ones(1, 3, 5, 5), torch.ones(4, 3, 1, 1)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (
            (X, W[:, :2]),
            ValueError,
            r"weight must have the shape \[Co, 3, 1, 1\], and its shape is \[4, 2, 1, 1\]",
        ),
        ((X, W.flatten(1)), ValueError, r"weight must have the shape \[Co, 3, 1, 1\]"),
        ((X, W, torch.ones(3)), ValueError, r"bias must have the shape \[4\], and its shape is \[3\]"),
        ((X, W.half()), TypeError, "weight must be float16 like x|weight must be float32 like x"),
        ((X[0], W), ValueError, "x must"),
        ((X[:, :0], W[:, :0]), ValueError, r"x must have at least one channel, .* \[.*0, .*\]"),
        (
            (X, W[:0]),
            ValueError,
            r"weight must have the shape \[Co, 3, 1, 1\], and its shape is \[0, 3, 1, 1\]",
        ),
    ],
)
def test_refusals(args: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.pointwise_conv2d(*args)
    with pytest.raises(ValueError, match="activation must be one of"):
        F.pointwise_conv2d(X, W, activation="tanh")
