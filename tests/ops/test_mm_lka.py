"""The op `mm_lka`."""

from __future__ import annotations

import pytest
import torch

from sdan_fast import functional as F

from .harness import Case, OpContract

Kernel = tuple[int, int, int]  # kh, kw, dilation


def square(k: int) -> list[Kernel]:
    return [(k, k, 1), (k, k, (k + 1) // 2)]


def strip(k: int) -> list[Kernel]:
    d = (k + 1) // 2
    return [(1, k, 1), (k, 1, 1), (1, k, d), (k, 1, d)]


def case(
    name: str, n: int, h: int, w: int, branches: list[tuple[int, list[Kernel]]], biases: str = "1"
) -> Case:
    """branches are (channels, kernels); `biases` is repeated over the convolutions and proj, in order."""

    def build(t):  # type: ignore[no-untyped-def]
        flags = iter(biases * 64)

        def bias(c: int):  # type: ignore[no-untyped-def]
            return t(c) if next(flags) == "1" else None

        built = [
            [(t(c, 1, kh, kw) / (kh * kw) ** 0.5, bias(c), d) for kh, kw, d in kernels]
            for c, kernels in branches
        ]
        channels = sum(c for c, _ in branches)
        return (t(n, channels, h, w), built, t(channels, channels, 1, 1) / channels**0.5, bias(channels)), {}

    return Case(name, build)


class TestMMLKA(OpContract):
    fn_name = "mm_lka"
    cases = (
        case("tiny", 2, 6, 7, [(2, square(3)), (2, strip(3))]),
        case("mixed-biases", 1, 5, 6, [(2, strip(3)), (3, [(3, 3, 2)])], biases="011"),
        case("groups-1", 1, 24, 23, [(4, square(9))]),
        case("groups-2", 1, 37, 40, [(3, square(7)), (3, strip(11))]),
        case("groups-3", 1, 20, 22, [(2, strip(3)), (2, strip(7)), (2, strip(9))]),
        case(
            "groups-4", 1, 30, 31,
            [(2, square(5)), (2, strip(7)[:2] + square(7)[1:]), (2, square(9)[:1] + strip(9)[2:]), (2, strip(11))],
        ),
        case("no-bias", 1, 9, 11, [(4, square(5)), (4, strip(5))], biases="0"),
        case("unequal-chunks", 1, 9, 11, [(1, square(3)), (7, strip(5))]),
        case("one-pixel", 1, 1, 1, [(2, square(7)), (2, strip(11))]),
        case("one-row", 1, 1, 40, [(2, square(7)), (2, strip(11))]),
        case("smaller-than-kernel", 1, 5, 3, [(2, square(9)), (2, strip(11))]),
        case("sdan", 1, 12, 50, [(28, square(7)), (28, strip(11))]),
        case("wider-than-a-tile", 1, 3, 67, [(35, square(3)), (31, strip(3))]),
    )  # fmt: skip
    grad_cases = ("tiny", "mixed-biases")


W3 = torch.ones(2, 1, 3, 3)
X = torch.ones(1, 4, 5, 5)
P = torch.ones(4, 4, 1, 1)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((X, [[(W3, None, 1)]], P), ValueError, "branches must cover the 4 channels of x, and they cover 2"),
        ((X, [[(W3, None, 1)], [(torch.ones(2, 1, 3, 2), None, 1)]], P), ValueError,
         r"branches\[1\]\[0\].weight .* odd"),
        ((X, [[(W3, None, 1), (torch.ones(3, 1, 3, 3), None, 1)], [(W3, None, 1)]], P), ValueError,
         r"branches\[0\]\[1\].weight must have the shape \[2, 1, kh, kw\]"),
        ((X, [[(W3, torch.ones(4), 1)], [(W3, None, 1)]], P), ValueError, r"branches\[0\]\[0\].bias must have"),
        ((X, [[(W3, None, 1)], []], P), ValueError, "branches must each have at least one convolution"),
        ((X, [], P), ValueError, "branches must each have at least one convolution"),
        ((X, None, P), TypeError, "branches must be a list, and it is a NoneType"),
        ((X, [[W3]], P), ValueError, r"branches\[0\]\[0\] must be \(weight, bias, dilation\), and it has 2 items"),
        ((X, [[(W3, None)]], P), ValueError, r"branches\[0\]\[0\] must be \(weight, bias, dilation\)"),
        ((X, [[(W3, None, 0)], [(W3, None, 1)]], P), ValueError, "dilation must be at least 1, and it is 0"),
        ((X, [[(W3, None, 1)], [(W3, None, 1)]], P[:2]), ValueError, r"proj_weight must have the shape \[4, 4, 1, 1\]"),
        ((X.half(), [[(W3, None, 1)], [(W3, None, 1)]], P), TypeError, r"branches\[0\]\[0\].weight must be float16"),
    ],
)  # fmt: skip
def test_refusals(args: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.mm_lka(*args)
