"""The CPU kernels behind the backward of `pointwise_gate`, `star_conv` and `mm_lka`: what is particular to them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sdan_fast.ops import OPS

from .harness import BACKENDS, DTYPES, Call, assert_within_bound, cast, formula, full_mask, kernel, laid_out

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels are not built")


def gate(n: int, co: int, ci: int, h: int, w: int, bias: bool = True) -> tuple[Call, Tensor]:
    t = torch.Generator().manual_seed(7)
    u, grad = torch.randn(2, n, co, h, w, generator=t)
    x, weight = torch.randn(n, ci, h, w, generator=t), torch.randn(co, ci, 1, 1, generator=t) / ci**0.5
    return ("pointwise_gate", (u, x, weight, torch.randn(co, generator=t) if bias else None), {}), grad


def star(
    n: int, ci: int, co: int, h: int, w: int, kernel: tuple[int, int] = (3, 3), outer: str = "gelu"
) -> tuple[Call, Tensor]:
    t = torch.Generator().manual_seed(7)
    pw1, pw2 = torch.randn(2, co, ci, 1, 1, generator=t) / ci**0.5
    dw = torch.randn(co, 1, *kernel, generator=t) / (kernel[0] * kernel[1]) ** 0.5
    norm = 1 + 0.2 * torch.randn(ci, generator=t), 0.3 * torch.randn(ci, generator=t)
    args = (torch.randn(n, ci, h, w, generator=t), *norm, pw1, dw, 0.1 * torch.randn(co, generator=t), pw2)
    return ("star_conv", args, {"outer": outer, "eps": 1e-5}), torch.randn(n, co, h, w, generator=t)


def lka(n: int, h: int, w: int) -> tuple[Call, Tensor]:
    """Two branches, one bias missing."""
    t = torch.Generator().manual_seed(7)
    weights = [torch.randn(3, 1, *k, generator=t) / 3 for k in ((5, 5), (3, 3))]
    weights += [torch.randn(2, 1, *k, generator=t) / 2 for k in ((1, 7), (7, 1))]
    biases = [torch.randn(c, generator=t) for c in (3, 2, 2)]
    proj = torch.randn(5, 5, 1, 1, generator=t) / 5**0.5, torch.randn(5, generator=t)
    x, grad = torch.randn(2, n, 5, h, w, generator=t)
    options = {
        "bias_mask": [False, True, True, True],
        "dilations": [1, 1, 2, 3, 1, 1, 4, 4],
        "lengths": [2, 2],
    }
    return ("mm_lka", (x, weights, biases, *proj), options), grad


CALLS = {
    "gate-tiles-and-parts": gate(1, 20, 30, 190, 310),
    "gate-tiles-across-images": gate(37, 6, 9, 5, 7),
    "gate-images-of-a-pixel": gate(300, 7, 5, 1, 1),
    "gate-many-channels": gate(1, 600, 500, 5, 9),
    "star-tiles-and-parts": star(2, 12, 20, 101, 150),
    "star-tiles-across-images": star(19, 9, 6, 5, 7),
    "star-images-of-a-pixel": star(70, 6, 5, 1, 1),
    "star-many-channels": star(1, 300, 200, 4, 9),
    "star-kernel-beyond-the-image": star(2, 6, 5, 4, 3, kernel=(11, 9), outer="none"),
    "star-strip": star(1, 6, 5, 9, 40, kernel=(1, 7), outer="silu"),
    "lka-tiles-across-images": lka(7, 9, 11),
    "lka-large": lka(1, 70, 130),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CALLS)
def test_matches_float64(name: str, dtype: torch.dtype) -> None:
    call, grad = cast(CALLS[name], dtype)
    mask = full_mask(call)
    exact = formula(*cast((call, grad), torch.float64), mask)
    eager = formula(call, grad, mask)
    for i, triple in enumerate(zip(kernel(call, grad, mask), eager, exact, strict=True)):
        assert_within_bound(*triple, f"{name}, gradient {i},")


SMALL = {"gate": gate(3, 6, 9, 21, 30), "star": star(3, 9, 6, 21, 30), "lka": lka(2, 17, 30)}


@pytest.mark.parametrize("name", SMALL)
def test_what_is_asked_for_does_not_change_it(name: str) -> None:
    """Every subset of the gradients is that subset of all of them, bit by bit; so is what two threads find."""
    call, grad = SMALL[name]
    mask = full_mask(call)
    subsets = list(itertools.product((False, True), repeat=len(mask)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        everything = kernel(call, grad, mask)
        torch.set_num_threads(2)
        for some in subsets[:: max(1, len(subsets) // 128)]:
            wanted = [g for g, there in zip(everything, some, strict=True) if there]
            found = kernel(call, grad, some)
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other), f"mask {some}"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["gate-tiles-and-parts", "star-tiles-and-parts", "lka-large"])
def test_threads_find_the_same_bits(name: str) -> None:
    call, grad = CALLS[name]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kernel(call, grad, full_mask(call)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SMALL)
def test_layouts_agree(name: str, dtype: torch.dtype) -> None:
    """The strides of gradient and images change nothing but the strides of the images' gradients."""
    (op, args, kwargs), grad = cast(SMALL[name], dtype)
    grad = grad[:, :, :, :1].expand(grad.shape)
    images = 2 if name == "gate" else 1
    mask = full_mask((op, args, kwargs))
    plain = kernel((op, args, kwargs), grad.contiguous(), mask)
    layouts = ("channels_last", "transposed", "contiguous")
    for *of_images, of_grad in itertools.product(layouts, repeat=images + 1):
        moved = [laid_out(t, layout) for t, layout in zip(args, of_images, strict=False)]
        for strided in (grad, laid_out(grad, of_grad)):
            for one, other in zip(
                kernel((op, (*moved, *args[images:]), kwargs), strided, mask), plain, strict=True
            ):
                assert torch.equal(one, other)


@pytest.mark.parametrize("n, h, w", [(0, 5, 6), (2, 0, 6), (2, 5, 0)])
def test_empty_images(n: int, h: int, w: int) -> None:
    for (call, grad), images in ((gate(n, 4, 3, h, w), 2), (star(n, 3, 4, h, w), 1), (lka(n, h, w), 1)):
        gradients = kernel(call, grad, full_mask(call))
        slots = [slot for slot in OPS[call[0]].slots(call[1]) if slot is not None]
        for gradient, like in zip(gradients, slots, strict=True):
            assert gradient.shape == like.shape
        assert not any(g.any() for g in gradients[images:])


@pytest.mark.parametrize("name", SMALL)
def test_refusals(name: str) -> None:
    call, grad = SMALL[name]
    mask = full_mask(call)
    with pytest.raises(RuntimeError, match=f"output_mask must have {len(mask)} entries, got 1"):
        kernel(call, grad, [True])
    with pytest.raises(RuntimeError, match="grad_output must have the shape of"):
        kernel(call, grad[..., :-1], mask)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype of"):
        kernel(call, grad.half(), mask)


def test_the_gradient_of_an_absent_bias_is_refused() -> None:
    call, grad = gate(1, 4, 3, 5, 6, bias=False)
    with pytest.raises(RuntimeError, match="the gradient of a bias that is not there"):
        kernel(call, grad, [True] * 4)
