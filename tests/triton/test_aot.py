"""Rung 2: every kernel in every configuration that the heuristics emit, compiled for every target without a GPU."""

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

from triton_cases import attention_args, chain_args, gate_args, norm_args, star_conv_args
from triton_harness import CUDA_TARGETS, DTYPES, compiled_for, wide

from sdan_fast.kernels import (
    depthwise_conv2d,
    layer_norm2d,
    mm_lka,
    pointwise_gate,
    star,
    star_conv,
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
    """The default activation for every target; `test_star_sweep` has the rest."""
    a = torch.zeros(2, 8, 16, 32, dtype=torch.bfloat16)
    with compiled_for(target) as done:
        star.forward(a, a)
        star.backward(a, a, a, output_mask=[True, True])
    check(done)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_star_sweep(target, dtype):
    a = torch.zeros(2, 8, 16, 32, dtype=dtype)
    with compiled_for(target) as done:
        for kind in star.ACTIVATIONS:
            outers = star.ACTIVATIONS if target == 80 and dtype == torch.float32 else {"none", kind}
            for outer in outers:
                star.forward(a, a, activation=kind, outer=outer)
        for mask in ([True, True], [True, False], [False, True]):
            star.backward(a, a, a, activation="gelu", outer="none", output_mask=mask)
            star.backward(a, a, a, activation="relu6", outer="silu", output_mask=mask)
    check(done)


def test_star_unaligned():
    """A view that starts in the middle of a 16-byte word still compiles, to narrow accesses."""
    a = torch.zeros(1001, dtype=torch.bfloat16)[1:]
    with compiled_for(80, "gfx942") as done:
        star.forward(a, a)
    check(done, wide_loads=False)
    assert not wide(done[0])


def depthwise(kernel, dtype, fmt=torch.contiguous_format, dilation=1, width=32):
    """Forward, input gradient and weight gradient of one filter."""
    x = torch.zeros(1, 8, 16, width, dtype=dtype).contiguous(memory_format=fmt)
    weight, bias = torch.zeros(8, 1, *kernel, dtype=dtype), torch.zeros(8, dtype=dtype)
    depthwise_conv2d.forward(x, weight, bias, dilation=(dilation, dilation))
    depthwise_conv2d.backward(
        x, x, weight, bias, dilation=(dilation, dilation), output_mask=[True, True, True]
    )


def check_convolutions(done):
    """The kernels that read and write images do it 128 bits at a time; the sums of the weight gradient are small."""
    check(done, wide_loads=False)
    for c in done:
        if isinstance(c.target, int) and c.name != "reduce_rows":
            assert wide(c, "ld"), c.name
            assert "wgrad" in c.name or wide(c, "st"), c.name


@pytest.mark.parametrize("target", TARGETS)
def test_depthwise(target):
    with compiled_for(target) as done:
        depthwise((1, 3), torch.bfloat16)
    check_convolutions(done)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("k", [3, 5, 7, 9, 11, 13, 17, 19, 21, 23, 31, 35, 63])
@pytest.mark.parametrize("target", TARGETS)
def test_depthwise_sweep(target, k, fmt):
    """K in {3, 7, 9, 11, 23, 63} for every target, the rest for sm_80; strips, and squares up to 9."""
    if k not in (3, 7, 9, 11, 23, 63) and target != 80:
        pytest.skip("compiled for sm_80 only")
    with compiled_for(target) as done:
        for dtype in (torch.float32, torch.bfloat16):
            for kernel in [(1, k), (k, 1), (k, k)][: 3 if k <= 9 else 2]:
                for dilation in (1, (k + 1) // 2):
                    depthwise(kernel, dtype, fmt, dilation)
    check_convolutions(done)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_depthwise_unaligned(target):
    with compiled_for(target) as done:
        for kernel in ((1, 11), (11, 1), (3, 3)):
            depthwise(kernel, torch.bfloat16, width=33)
    check(done, wide_loads=False)


FORMATS = (torch.contiguous_format, torch.channels_last)
CHAIN = ([(3, 1), (3, 2)], [True] * 4)
BRANCHES = [[(3, 3, 1)], [(1, 3, 1), (3, 1, 1), (1, 3, 2), (3, 1, 2)]]


@pytest.mark.parametrize("target", TARGETS)
def test_forward_of_the_fused_ops(target):
    """One configuration each; the sweep below has the rest."""
    fmt = torch.contiguous_format
    with compiled_for(target) as done:
        layer_norm2d.forward(*norm_args((1, 56, 8, 16), torch.bfloat16, fmt))
        pointwise_gate.forward(*gate_args((1, 56, 8, 16), 56, torch.bfloat16, fmt))
        args, kwargs = chain_args((1, 2, 12, 32), *CHAIN, torch.bfloat16)
        strip_conv_chain.forward(*args, **kwargs)
    check(done)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_fused_sweep(target, dtype, fmt):
    """Forward and all gradients at SDAN's channel counts."""
    with compiled_for(target) as done:
        for channels in (28, 56, 48):
            for op, args in (
                (layer_norm2d, norm_args((1, channels, 8, 16), dtype, fmt)),
                (pointwise_gate, gate_args((1, channels, 8, 16), 56, dtype, fmt)),
                (star_conv, star_conv_args((1, channels, 8, 16), 28, dtype, fmt)),
            ):
                y = op.forward(*args)
                op.backward(y, *args, output_mask=[True] * len(args))
        for op, (args, kwargs) in (
            (strip_conv_chain, chain_args((1, 28, 16, 32), [(11, 1), (11, 6)], [True] * 4, dtype, fmt)),
            (mm_lka, attention_args((1, 56, 16, 32), BRANCHES, dtype, fmt)),
        ):
            y = op.forward(*args, **kwargs)
            slots = 1 + len(args[1]) + len(args[2]) + len(args[3:])
            op.backward(y, *args, **kwargs, output_mask=[True] * slots)
            op.backward(y, *args, **kwargs, output_mask=[True] + [False] * (slots - 1))
    check(done, wide_loads=False)
