"""Rung 2: one configuration of each op compiled for every target without a GPU, and what the heuristics promise.

All configurations are rows of benchmarks/inspect/triton.csv, which tests/inspecting/test_committed.py holds to these
sources.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip(
        "this process interprets kernels; compilation needs one without TRITON_INTERPRET",
        allow_module_level=True,
    )

from triton_cases import chain_args, gate_args, norm_args
from triton_harness import (
    CUDA_TARGETS,
    build_all,
    catching,
    compiled_for,
    wide,
)

from sdan_fast.kernels import (
    depthwise_conv2d,
    heuristics,
    layer_norm2d,
    pointwise_gate,
    star,
    strip_conv_chain,
)

TARGETS = (*CUDA_TARGETS, "gfx942")


def check(done, *, wide_loads=True):
    """All clean; 128-bit loads and stores in each CUDA kernel where the test's shapes are aligned."""
    assert done
    for c in done:
        c.assert_clean()
        if wide_loads and isinstance(c.target, int):
            assert wide(c, "ld") and wide(c, "st"), (
                f"{c.name} for sm_{c.target} has no 128-bit accesses: {c.constexprs}"
            )


@pytest.mark.parametrize("target", TARGETS)
def test_star(target):
    """The default activation for every target."""
    a = torch.zeros(2, 8, 16, 32, dtype=torch.bfloat16)
    with compiled_for(target) as done:
        star.forward(a, a)
        star.backward(a, a, a, output_mask=[True, True])
    check(done)


def check_built(built, narrow=()):
    """All clean; 128-bit loads and stores but where `narrow` names the kernel, or its stores: ("wgrad", "st")."""
    assert built
    for b in built:
        assert not b.error, b.error
        for way, is_wide in zip(("ld", "st"), b.wide):
            exempt = any(part in b.name and way in ways for part, *ways in narrow)
            assert is_wide or exempt, f"{b.name} for {b.target} has no 128-bit {way}: {b.constexprs}"


def test_star_unaligned():
    """A view that starts in the middle of a 16-byte word still compiles, to narrow accesses."""
    a = torch.zeros(1001, dtype=torch.bfloat16)[1:]
    with compiled_for(80, "gfx942") as done:
        star.forward(a, a)
    check(done, wide_loads=False)
    assert not wide(done[0])


def depthwise(kernel, dtype, fmt=torch.contiguous_format, dilation=1, width=32, needed=(True, True, True)):
    """Forward, input gradient and weight gradient of one filter."""
    x = torch.zeros(1, 8, 16, width, dtype=dtype).contiguous(memory_format=fmt)
    weight, bias = torch.zeros(8, 1, *kernel, dtype=dtype), torch.zeros(8, dtype=dtype)
    depthwise_conv2d.forward(x, weight, bias, dilation=(dilation, dilation))
    depthwise_conv2d.backward(x, x, weight, bias, dilation=(dilation, dilation), output_mask=needed)


SUMS = (("reduce_rows", "ld", "st"), ("wgrad", "st"))  # small, and written once a program


@pytest.mark.parametrize("target", TARGETS)
def test_depthwise(target):
    with catching() as launches:
        depthwise((1, 3), torch.bfloat16)
    check_built(build_all(launches, target), SUMS)


CHAIN = ([(3, 1), (3, 2)], [True] * 4)


@pytest.mark.parametrize("target", TARGETS)
def test_forward_of_the_fused_ops(target):
    """One configuration each."""
    fmt = torch.contiguous_format
    with catching() as launches:
        layer_norm2d.forward(*norm_args((1, 56, 8, 16), torch.bfloat16, fmt))
        pointwise_gate.forward(*gate_args((1, 56, 8, 16), 56, torch.bfloat16, fmt))
        args, kwargs = chain_args((1, 2, 12, 32), *CHAIN, torch.bfloat16)
        strip_conv_chain.forward(*args, **kwargs)
    check_built(build_all(launches, target))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels, out", [(28, 28), (48, 48), (48, 24), (56, 56), (56, 28)])
def test_star_conv_wastes_less_than_a_third_of_its_dots(channels, out, itemsize, backward):
    """Tiles are powers of two and these channel counts are not."""
    s = heuristics.norm_pointwise(channels, out, out, itemsize, backward)
    formed = s.BC * -(-2 * out // s.BO) * s.BO
    assert channels * 2 * out / formed >= 2 / 3, (s, formed)
