"""The composed op `sdm`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdan_fast import explain, reference
from sdan_fast import functional as F

from .harness import Case, OpContract


def parameters(t: Any, c: int, half: int, levels: int = 4) -> tuple[list, list, tuple]:
    """(distill, star, fuse) of an SDM of `levels` levels, the last of which keeps `half` channels."""

    def level(co: int) -> tuple:
        pw1, dw, pw2 = t(co, c, 1, 1) / c**0.5, t(co, 1, 3, 3) / 3, t(co, c, 1, 1) / c**0.5
        return 1 + t(c) / 8, t(c) / 8, pw1, dw, t(co) / 8, pw2

    distill = [(t(half, c, 1, 1) / c**0.5, t(half) / 8) for _ in range(levels - 1)]
    star = [level(c if i < levels - 1 else half) for i in range(levels)]
    return distill, star, (t(c, levels * half, 1, 1) / c**0.5, t(c) / 8)


def case(name: str, n: int, c: int, h: int, w: int, levels: int = 4) -> Case:
    return Case(name, lambda t: ((t(n, c, h, w), *parameters(t, c, c // 2, levels)), {}))


class TestSDM(OpContract):
    fn_name = "sdm"
    differentiated_as = "star_conv"
    cases = (
        case("tiny", 2, 4, 5, 6, levels=2),
        case("default", 1, 8, 9, 11),
        case("one-pixel", 1, 6, 1, 1),
        case("one-row", 1, 6, 1, 35),
        case("one-column", 1, 6, 35, 1),
        case("one-level", 1, 6, 7, 5, levels=1),
        case("prime", 1, 14, 13, 37),
        case("sdan", 1, 56, 11, 50),
        case("tiles-and-a-rest", 1, 68, 5, 21),
    )
    grad_cases = ("tiny",)


def test_levels_that_the_fused_kernel_does_not_take() -> None:
    """More or fewer distilled parts than SDAN has, or more levels: the parts run instead."""
    for levels, distilled in ((2, 2), (2, 0), (9, 8)):

        def build(t: Any, levels: int = levels, distilled: int = distilled) -> Any:
            distill, star, _ = parameters(t, 4, 4, levels)
            distill = [*distill, *distill][:distilled]
            fuse = t(4, 4 * (distilled + 1), 1, 1), t(4)
            return (t(1, 4, 3, 5), distill, star, fuse), {}

        args, _ = Case("any", build).arguments(torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(F.sdm(*args), reference.sdm(*args), rtol=1e-3, atol=1e-4)
            assert explain("sdm", *args).backend == "reference"


def test_refusals() -> None:
    args, _ = TestSDM.cases[0].arguments(torch.float32)
    x, distill, star, fuse = args
    with pytest.raises(TypeError, match="distill must be a list, and it is a NoneType"):
        F.sdm(x, None, star, fuse)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fuse must be \(weight, bias\), and it has 1 items"):
        F.sdm(x, distill, star, fuse[:1])
    with pytest.raises(ValueError, match="star must hold 6 tensors for each of one or more levels"):
        F.sdm(x, distill, [], fuse)
    with pytest.raises(ValueError, match=r"fuse weight must have the shape \[Co, 4, 1, 1\]"):
        F.sdm(x, distill, star, (fuse[0][:, :3], fuse[1]))
    with pytest.raises(TypeError, match=r"distill\[0\] bias must be a torch.Tensor, and it is a NoneType"):
        F.sdm(x, [(distill[0][0], None)], star, fuse)
