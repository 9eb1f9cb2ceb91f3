"""The op `star_conv`."""

from __future__ import annotations

import pytest
import torch

from sdan_fast import backends, use_backend
from sdan_fast import functional as F

from .harness import Case, OpContract


def case(
    name: str, n: int, ci: int, co: int, h: int, w: int, *, biases: str = "11", kernel: tuple[int, int] = (3, 3),
    **kwargs: object,
) -> Case:  # fmt: skip
    def build(t):  # type: ignore[no-untyped-def]
        norm_bias, dw_bias = t(ci) if biases[0] == "1" else None, t(co) if biases[1] == "1" else None
        pw1, dw, pw2 = t(co, ci, 1, 1) / ci**0.5, t(co, 1, *kernel) / 3, t(co, ci, 1, 1) / ci**0.5
        return (t(n, ci, h, w), t(ci), norm_bias, pw1, dw, dw_bias, pw2), kwargs

    return Case(name, build)


class TestStarConv(OpContract):
    fn_name = "star_conv"
    cases = (
        case("default", 2, 4, 6, 5, 7),
        case("outer", 1, 6, 4, 4, 5, outer="gelu", biases="01"),
        case("no-bias", 1, 5, 5, 6, 4, biases="00", outer="relu6"),
        case("sdan", 1, 56, 56, 7, 37, outer="gelu"),
        case("sdan-half", 1, 56, 28, 6, 20, outer="gelu"),
        case("one-pixel", 1, 8, 8, 1, 1),
        case("one-row", 1, 7, 9, 1, 33),
        case("one-column", 1, 7, 9, 33, 1),
        case("prime", 1, 13, 11, 17, 19, eps=1e-3),
        case("wide-kernel", 1, 6, 6, 9, 11, kernel=(5, 7)),
    )


def arguments() -> list[torch.Tensor | None]:
    return list(case("any", 1, 4, 6, 5, 5).arguments(torch.float32)[0])


@pytest.mark.parametrize(
    ("position", "value", "kwargs", "error", "words"),
    [
        (0, torch.ones(4, 5, 5), {}, ValueError, "x must be N x C x H x W"),
        (1, torch.ones(3), {}, ValueError, r"norm_weight must have the shape \[4\], and its shape is \[3\]"),
        (2, torch.ones(3), {}, ValueError, r"norm_bias must have the shape \[4\], and its shape is \[3\]"),
        (3, torch.ones(6, 3, 1, 1), {}, ValueError, r"pw1_weight must have the shape \[Co, 4, 1, 1\]"),
        (4, torch.ones(6, 1, 2, 2), {}, ValueError, "dw_weight must have an odd kernel size, and it is 2x2"),
        (5, torch.ones(4), {}, ValueError, r"dw_bias must have the shape \[6\], and its shape is \[4\]"),
        (6, torch.ones(4, 4, 1, 1), {}, ValueError, r"pw2_weight must have the shape \[6, 4, 1, 1\]"),
        (
            6,
            torch.ones(6, 4, 1, 1).half(),
            {},
            TypeError,
            "pw2_weight must be float32 like x, and it is float16",
        ),
        (0, None, {}, TypeError, "x must be a torch.Tensor, and it is a NoneType"),
        (2, None, {"outer": "swish"}, ValueError, "outer must be one of .* 'swish'"),
        (2, None, {"eps": -1.0}, ValueError, "eps must be a positive number, and it is -1.0"),
    ],
)
def test_refusals(position: int, value: object, kwargs: dict, error: type[Exception], words: str) -> None:
    args = arguments()
    args[position] = value  # type: ignore[assignment]
    with pytest.raises(error, match=words):
        F.star_conv(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.skipif(backends.BACKENDS["cpu"].missing is not None, reason="needs the cpu kernels")
def test_threads_that_meet_read_each_other_s_rows() -> None:
    """Kernels that reach further than the rows that a thread may have taken before it met the other."""
    before = torch.get_num_threads()
    try:
        for kernel in ((3, 3), (5, 1), (11, 3), (31, 1)):
            args = case("any", 1, 24, 20, 40, 120, kernel=kernel).arguments(torch.float32)[0]
            with torch.no_grad(), use_backend("cpu"):
                torch.set_num_threads(1)
                alone = F.star_conv(*args)
                for threads in (2, 3):
                    torch.set_num_threads(threads)
                    for _ in range(4):
                        assert torch.equal(F.star_conv(*args), alone), f"{kernel}, {threads} threads"
    finally:
        torch.set_num_threads(before)
