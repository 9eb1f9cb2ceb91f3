"""The CPU kernel behind the backward of `depthwise_conv2d` and `strip_conv_chain`: what is particular to it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sdan_fast.ops import OPS

from .harness import DTYPES, Call, assert_within_bound, cast, formula, full_mask, kernel, laid_out

pytestmark = pytest.mark.skipif(
    "cpu" not in OPS["strip_conv_chain"].backward_kernels,
    reason="the CPU kernels are not built, or leave gradients to the formula",
)


def conv(
    shape: tuple[int, ...], kernel: tuple[int, int], dilation: tuple[int, int], bias: bool = True
) -> Call:
    t, c = torch.Generator().manual_seed(7), shape[1]
    weight = torch.randn(c, 1, *kernel, generator=t) / (kernel[0] * kernel[1]) ** 0.5
    args = (torch.randn(shape, generator=t), weight, torch.randn(c, generator=t) if bias else None)
    return "depthwise_conv2d", args, {"dilation": list(dilation)}


def strips(shape: tuple[int, ...], taps: Sequence[int], dilations: Sequence[int], biases: str) -> Call:
    t, c = torch.Generator().manual_seed(7), shape[1]
    x = torch.randn(shape, generator=t)
    weights = [
        torch.randn(c, 1, *((k, 1) if i % 2 else (1, k)), generator=t) / k**0.5 for i, k in enumerate(taps)
    ]
    mask = [flag == "1" for flag in biases]
    present = [torch.randn(c, generator=t) for there in mask if there]
    return "strip_conv_chain", (x, weights, present), {"bias_mask": mask, "dilations": list(dilations)}


def gradient_of(call: Call) -> Tensor:
    return torch.randn(call[1][0].shape, generator=torch.Generator().manual_seed(8))


CALLS = {
    "every-block-of-taps": conv((1, 1, 23, 40), (25, 23), (1, 1)),
    "long-rows-of-taps": conv((1, 2, 5, 150), (1, 83), (1, 1)),
    "long-columns-of-taps": conv((1, 2, 70, 9), (57, 1), (1, 1)),
    "far-rows": conv((1, 2, 90, 300), (11, 1), (6, 1)),
    "far-columns": conv((1, 2, 4, 90), (1, 9), (1, 11)),
    "beyond-the-image": conv((2, 3, 4, 3), (31, 33), (5, 7)),
    "at-the-far-end-of-it": conv((1, 2, 9, 17), (3, 3), (8, 16)),
    "many-channels": conv((2, 300, 3, 5), (3, 3), (1, 1)),
    "summed-in-parts": conv((1, 1, 211, 640), (3, 5), (1, 1)),
    "chain-of-large-planes": strips((1, 1, 230, 310), (11, 11, 11, 11), (1, 1, 6, 6), "1111"),
    "long-chain": strips((1, 6, 9, 8), (3, 3, *(1,) * 16, 3, 3), (1, 2) * 10, "10" * 10),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CALLS)
def test_matches_float64(name: str, dtype: torch.dtype) -> None:
    call, grad = cast((CALLS[name], gradient_of(CALLS[name])), dtype)
    mask = full_mask(call)
    exact = formula(*cast((call, grad), torch.float64), mask)
    eager = formula(call, grad, mask)
    for i, triple in enumerate(zip(kernel(call, grad, mask), eager, exact, strict=True)):
        assert_within_bound(*triple, f"{name}, gradient {i},")


def test_taps_far_beyond_the_image() -> None:
    """Only the middle one can touch it, however far the others are; their gradients are zero."""
    far = conv((2, 3, 6, 5), (5, 3), ((1 << 30) - 1, (1 << 30) - 1))
    name, (x, weight, bias), _ = far
    near = name, (x, weight[:, :, 2:3, 1:2].contiguous(), bias), {"dilation": [1, 1]}
    grad = gradient_of(far)
    (gx, gw, gb), wanted = kernel(far, grad, [True] * 3), kernel(near, grad, [True] * 3)
    assert torch.equal(gx, wanted[0]) and torch.equal(gb, wanted[2])
    assert torch.equal(gw[:, :, 2:3, 1:2], wanted[1]) and gw.count_nonzero() == wanted[1].count_nonzero()


@pytest.mark.parametrize("name", ["chain", "convolution"])
def test_what_is_asked_for_does_not_change_it(name: str) -> None:
    """Every subset of the gradients is that subset of all of them, bit by bit; so is what two threads find."""
    call = (
        strips((3, 2, 21, 70), (5, 7, 3, 3), (1, 1, 3, 2), "0110")
        if name == "chain"
        else conv((3, 2, 21, 70), (5, 3), (1, 2))
    )
    grad, mask = gradient_of(call), full_mask(call)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        everything = kernel(call, grad, mask)
        torch.set_num_threads(2)
        for some in itertools.product((False, True), repeat=len(mask)):
            wanted = [g for g, there in zip(everything, some, strict=True) if there]
            found = kernel(call, grad, some)
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other), f"mask {some}"
    finally:
        torch.set_num_threads(threads)


def test_threads_find_the_same_bits() -> None:
    """On planes enough that two threads do run."""
    call = strips((2, 9, 64, 64), (11, 11, 11, 11), (1, 1, 6, 6), "1111")
    grad, mask = gradient_of(call), full_mask(call)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kernel(call, grad, mask))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_layouts_agree(dtype: torch.dtype) -> None:
    """The strides of gradient and image change nothing but the strides of the image's gradient."""
    name, args, kwargs = cast(strips((2, 19, 14, 37), (5, 3), (2, 1), "11"), dtype)
    grad = gradient_of((name, args, kwargs)).to(dtype)[:, :, :, :1].expand(args[0].shape)
    mask = full_mask((name, args, kwargs))
    plain = kernel((name, args, kwargs), grad.contiguous(), mask)
    for of_x, of_grad in itertools.product(("channels_last", "transposed", "sliced"), repeat=2):
        moved = name, (laid_out(args[0], of_x), *args[1:]), kwargs
        for strided in (grad, laid_out(grad, of_grad)):
            for one, other in zip(kernel(moved, strided, mask), plain, strict=True):
                assert torch.equal(one, other)


ROWS = {
    "square": conv((2, 13, 37, 45), (3, 3), (1, 1)),
    "dilated-square": conv((1, 28, 40, 71), (3, 3), (2, 5)),
    "beyond-the-image": conv((3, 9, 4, 3), (31, 33), (5, 7)),
    "row-of-taps": conv((1, 28, 33, 70), (1, 11), (1, 6)),
    "column-of-taps": conv((1, 36, 150, 21), (11, 1), (6, 1)),
    "one-tap": conv((2, 8, 15, 16), (1, 1), (1, 1)),
    "too-many-taps": conv((1, 16, 25, 26), (5, 5), (1, 1)),
}


@pytest.mark.parametrize("name", ROWS)
def test_channels_last(name: str) -> None:
    """Rows of pixels that may be read in place: the bound, and the same bits for any mask and number of threads."""
    op, (x, *parameters), kwargs = ROWS[name]
    call = op, (laid_out(x, "channels_last"), *parameters), kwargs
    grad, mask = laid_out(gradient_of(call), "channels_last"), full_mask(call)
    found = kernel(call, grad, mask)
    eager, exact = formula(call, grad, mask), formula(*cast((call, grad), torch.float64), mask)
    for i, triple in enumerate(zip(found, eager, exact, strict=True)):
        assert_within_bound(*triple, f"{name}, gradient {i},")
    threads = torch.get_num_threads()
    try:
        for count, some in itertools.product((1, 2, 3), itertools.product((False, True), repeat=len(mask))):
            torch.set_num_threads(count)
            wanted = [g for g, there in zip(found, some, strict=True) if there]
            for one, other in zip(kernel(call, grad, some), wanted, strict=True):
                assert torch.equal(one, other), f"mask {some}, {count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 3, 5, 6), (2, 3, 0, 6), (2, 3, 5, 0)])
def test_empty_images(shape: tuple[int, ...]) -> None:
    for call in (conv(shape, (3, 5), (1, 2)), strips(shape, (3, 5), (1, 2), "11")):
        gradients = kernel(call, gradient_of(call), full_mask(call))
        assert gradients[0].shape == shape
        for gradient, like in zip(gradients[1:], OPS[call[0]].slots(call[1])[1:], strict=True):
            assert gradient.shape == like.shape and not gradient.any()


def test_refusals() -> None:
    call = conv((1, 4, 5, 5), (3, 3), (1, 1))
    with pytest.raises(RuntimeError, match=r"grad_output must have the shape of x"):
        kernel(call, torch.ones(1, 4, 5, 6), [True] * 3)
    with pytest.raises(RuntimeError, match="output_mask must have 3 entries, got 2"):
        kernel(call, gradient_of(call), [True] * 2)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype of x"):
        kernel(call, gradient_of(call).half(), [True] * 3)
