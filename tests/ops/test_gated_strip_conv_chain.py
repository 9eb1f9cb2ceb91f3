"""The composed op `gated_strip_conv_chain`."""

from __future__ import annotations

import pytest
import torch

from sdan_fast import functional as F

from .harness import Case, OpContract
from .test_strip_conv_chain import case as chain_case


def case(name: str, shape: tuple[int, int, int, int], *stages: tuple, biases: str = "1111") -> Case:
    chain = chain_case(name, shape, *stages, biases=biases)
    return Case(name, lambda t: ((t(*shape), *chain.build(t)[0]), {}))


class TestGatedStripConvChain(OpContract):
    fn_name = "gated_strip_conv_chain"
    images = 2
    differentiated_as = "strip_conv_chain"
    cases = (
        case("tiny", (2, 2, 4, 5), (3, 1), (3, 2)),
        case("lcka", (1, 3, 37, 41), (11, 1), (11, 6)),
        case("one-stage", (1, 5, 13, 11), (7, 1), biases="01"),
        case("three-stages", (1, 2, 15, 16), (3, 1), (5, 2), (3, 4), biases="101101"),
        case("one-pixel", (1, 3, 1, 1), (11, 1), (11, 6)),
        case("one-row", (1, 3, 1, 50), (7, 1), (9, 5)),
    )
    grad_cases = ("tiny",)


def test_the_gate_sets_the_memory_format() -> None:
    """Fused or in parts, whatever the layout of what is convolved."""
    (u, x, stages), _ = TestGatedStripConvChain.cases[1].arguments(torch.float32)
    expected = F.gated_strip_conv_chain(u, x, stages)
    last = F.gated_strip_conv_chain(u.contiguous(memory_format=torch.channels_last), x, stages)
    first = F.gated_strip_conv_chain(u, x.contiguous(memory_format=torch.channels_last), stages)
    assert last.is_contiguous(memory_format=torch.channels_last) and first.is_contiguous()
    assert torch.allclose(last, expected, atol=1e-5) and torch.equal(first, expected)


def test_refusals() -> None:
    (u, x, stages), _ = TestGatedStripConvChain.cases[0].arguments(torch.float32)
    with pytest.raises(ValueError, match=r"u must have the shape \[2, 2, 4, 5\]"):
        F.gated_strip_conv_chain(u[:1], x, stages)
    with pytest.raises(TypeError, match="u must be float32 like x, and it is float16"):
        F.gated_strip_conv_chain(u.half(), x, stages)
    with pytest.raises(ValueError, match="two for each of one or more stages, and there are 0"):
        F.gated_strip_conv_chain(u, x, [])
