"""The composed op `rsdam`."""

from __future__ import annotations

import pytest
import torch

from sdan_fast import functional as F
from sdan_fast.modules import BRANCHES

from .harness import Case, OpContract
from .test_mm_lka import Kernel, square, strip
from .test_sdm import parameters


def branches_of(groups: int) -> list[list[Kernel]]:
    out = []
    for local, dilated, k in BRANCHES[groups]:
        both = {"square": square(k), "strip": strip(k)}
        half = {
            name: (kernels[: len(kernels) // 2], kernels[len(kernels) // 2 :])
            for name, kernels in both.items()
        }
        out.append(half[local][0] + half[dilated][1])
    return out


def case(name: str, n: int, c: int, h: int, w: int, branches: list[list[Kernel]], levels: int = 4) -> Case:
    def build(t):  # type: ignore[no-untyped-def]
        chunk = c // len(branches)
        built = [
            [(t(chunk, 1, kh, kw) / (kh * kw) ** 0.5, t(chunk) / 8, d) for kh, kw, d in b] for b in branches
        ]
        proj = [(t(c, c, 1, 1) / c**0.5, t(c) / 8) for _ in range(2)]
        return (t(n, c, h, w), parameters(t, c, c // 2, levels), built, *proj, (1 + t(c) / 8, t(c) / 8)), {}

    return Case(name, build)


class TestRSDAM(OpContract):
    fn_name = "rsdam"
    differentiated_as = "mm_lka"
    cases = (
        case("tiny", 2, 4, 5, 6, [square(3), strip(3)], levels=2),
        *(case(f"groups-{g}", 1, 12, 19, 23, branches_of(g)) for g in (1, 2, 3, 4)),
        case("one-pixel", 1, 8, 1, 1, branches_of(2)),
        case("prime", 1, 14, 13, 37, branches_of(2)),
        case("sdan", 1, 56, 14, 50, branches_of(2)),
    )
    grad_cases = ("tiny",)


def test_refusals() -> None:
    args, _ = TestRSDAM.cases[0].arguments(torch.float32)
    x, distillation, branches, attention_proj, proj, norm = args
    with pytest.raises(ValueError, match=r"proj weight must have the shape \[4, 4, 1, 1\]"):
        F.rsdam(x, distillation, branches, attention_proj, (proj[0][:2], proj[1]), norm)
    with pytest.raises(ValueError, match=r"branches must cover the 4 channels of x, and they cover 2"):
        F.rsdam(x, distillation, branches[:1], attention_proj, proj, norm)
    with pytest.raises(TypeError, match=r"norm bias must be a torch.Tensor, and it is a NoneType"):
        F.rsdam(x, distillation, branches, attention_proj, proj, (norm[0], None))
