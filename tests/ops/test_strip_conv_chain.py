"""The op `strip_conv_chain`, and `separable_conv2d`, which is its one-stage case."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdan_fast
from sdan_fast import functional as F
from sdan_fast import reference

from .harness import BACKENDS, Case, OpContract, assert_within_bound, cast, device_of


def case(name: str, shape: tuple[int, int, int, int], *stages: tuple, biases: str = "1111") -> Case:
    """stages are (k, dilation) or (kh, kv, dilation); `biases` has a digit per convolution."""
    c = shape[1]

    def build(t):  # type: ignore[no-untyped-def]
        built = []
        for i, stage in enumerate(stages):
            kh, kv, dilation = stage if len(stage) == 3 else (stage[0], *stage)
            bias_h, bias_v = (t(c) if flag == "1" else None for flag in biases[2 * i : 2 * i + 2])
            built.append((t(c, 1, 1, kh) / kh**0.5, bias_h, t(c, 1, kv, 1) / kv**0.5, bias_v, dilation))
        return (t(*shape), built), {}

    return Case(name, build)


class TestStripConvChain(OpContract):
    fn_name = "strip_conv_chain"
    cases = (
        case("lka-3", (2, 2, 4, 5), (3, 1), (3, 2)),
        case("mixed-biases", (1, 2, 5, 4), (3, 1), (5, 2), biases="0110"),
        case("no-bias", (1, 2, 9, 8), (3, 1), (3, 2), biases="0000"),
        case("sdan-11", (1, 3, 37, 41), (11, 1), (11, 6)),
        case("one-stage", (1, 5, 13, 11), (7, 1), biases="11"),
        case("one-stage-late-bias", (1, 5, 13, 11), (7, 3), biases="01"),
        case("three-stages", (1, 2, 15, 16), (3, 1), (5, 2), (3, 4), biases="101101"),
        case("unequal", (1, 3, 12, 14), (3, 7, (2, 1)), (5, 1, (1, 3))),
        case("one-pixel", (1, 3, 1, 1), (11, 1), (11, 6)),
        case("smaller-than-kernel", (1, 3, 4, 5), (23, 1), (11, 6)),
        case("one-row", (1, 3, 1, 50), (7, 1), (9, 5)),
        case("one-column", (1, 3, 50, 1), (7, 1), (9, 5)),
        case("lskNet-35", (1, 2, 40, 38), (35, 1), biases="11"),
        case("channels-18", (1, 18, 21, 20), (11, 1), (11, 6)),
        case("many-bands", (2, 12, 150, 9), (3, 1), (5, 2), (7, 1), biases="101101"),
        case("one-tap", (1, 2, 9, 75), (1, 3, 1), (7, 1, 1)),
        case("wide-rows", (2, 2, 11, 203), (5, 1), (11, 3)),
        case("rows-of-28", (1, 28, 61, 34), (11, 1)),
    )


class TestSeparableConv2d(OpContract):
    fn_name = "separable_conv2d"
    cases = (
        Case("plain", lambda t: ((t(1, 2, 5, 4), t(2, 1, 1, 5), t(2), t(2, 1, 5, 1), t(2)), {})),
        Case(
            "dilated", lambda t: ((t(1, 2, 5, 4), t(2, 1, 1, 3), None, t(2, 1, 7, 1), t(2)), {"dilation": 3})
        ),
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 18), st.integers(1, 40), st.integers(1, 40)),
    stages=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 6)), min_size=1, max_size=3
    ),
    biases=st.text("01", min_size=6, max_size=6),
    channels_last=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_any_shape(shape: tuple, stages: list, biases: str, channels_last: bool, backend: str) -> None:
    ks = [(2 * a + 1, 2 * b + 1, d) for a, b, d in stages]
    (x, built), _ = case("any", shape, *ks, biases=biases).arguments(torch.float32, device_of(backend))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with sdan_fast.use_backend(backend):
        y = F.strip_conv_chain(x, built)
    exact = reference.strip_conv_chain(*cast((x, built), torch.float64))
    assert_within_bound(y, reference.strip_conv_chain(x, built), exact)


X = torch.ones(1, 4, 5, 5)
H, V, B = torch.ones(4, 1, 1, 3), torch.ones(4, 1, 3, 1), torch.ones(4)


@pytest.mark.parametrize(
    ("stages", "error", "words"),
    [
        ([], ValueError, "two for each of one or more stages, and there are 0"),
        ([(H, B, V, B)], ValueError, r"stages\[0\] must be \(weight_h, .* has 4 items"),
        (
            [(V, B, H, B, 1)],
            ValueError,
            r"stages\[0\].weight_h must have the shape \[4, 1, 1, k\] with k odd",
        ),
        (
            [(H, B, V, B, 1), (H, B, H, B, 1)],
            ValueError,
            r"stages\[1\].weight_v must have the shape \[4, 1, k, 1\]",
        ),
        ([(H, B, V, torch.ones(5), 1)], ValueError, r"stages\[0\].bias_v must have the shape \[4\].* \[5\]"),
        ([(H, B, V, B, -1)], ValueError, "dilation must be at least 1, and it is -1"),
        (
            [(H.half(), B, V, B, 1)],
            TypeError,
            r"stages\[0\].weight_h must be float32 like x, and it is float16",
        ),
        (
            [(None, B, V, B, 1)],
            TypeError,
            r"stages\[0\].weight_h must be a torch.Tensor, and it is a NoneType",
        ),
    ],
)
def test_refusals(stages: list, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        F.strip_conv_chain(X, stages)
