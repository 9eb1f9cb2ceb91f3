"""Rung 2: every kernel in every configuration that the heuristics emit, compiled for every target without a GPU.

What differs between targets is the code generator and not the kernel. So sm_80 gets most combinations of filter,
dtype, dilation and layout; the other targets get every filter, axis and layout, with dtypes and dilations in rotation.
Equal launches are compiled once, on all cores.
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

from triton_cases import attention_args, chain_args, gate_args, norm_args, star_conv_args
from triton_harness import (
    CUDA_TARGETS,
    DTYPES,
    FORMATS,
    build_all,
    catching,
    compiled_for,
    wide,
)

from sdan_fast.inspecting.workload import branches_of
from sdan_fast.kernels import (
    depthwise_conv2d,
    heuristics,
    layer_norm2d,
    mm_lka,
    pointwise_gate,
    star,
    star_conv,
    strip_conv_chain,
)
from sdan_fast.modules import BRANCHES

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


def check_built(built, narrow=()):
    """All clean; 128-bit loads and stores but where `narrow` names the kernel, or its stores: ("wgrad", "st")."""
    assert built
    for b in built:
        assert not b.error, b.error
        for way, is_wide in zip(("ld", "st"), b.wide):
            exempt = any(part in b.name and way in ways for part, *ways in narrow)
            assert is_wide or exempt, f"{b.name} for {b.target} has no 128-bit {way}: {b.constexprs}"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_star_sweep(target):
    """Every activation for sm_80 and a few for the others, whose code differs by the same functions."""
    with catching() as launches:
        for dtype in DTYPES if target == 80 else (torch.float32, torch.bfloat16):
            a = torch.zeros(2, 8, 16, 32, dtype=dtype)
            for kind in star.ACTIVATIONS if target == 80 else ("gelu", "relu6", "silu"):
                for outer in star.ACTIVATIONS if target == 80 and dtype == torch.float32 else {"none", kind}:
                    star.forward(a, a, activation=kind, outer=outer)
            for mask in ([True, True], [True, False], [False, True]) if target == 80 else ([True, True],):
                star.backward(a, a, a, activation="gelu", outer="none", output_mask=mask)
                star.backward(a, a, a, activation="relu6", outer="silu", output_mask=mask)
    check_built(build_all(launches, target))


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


LENGTHS = (3, 5, 7, 9, 11, 13, 17, 19, 21, 23, 31, 35, 63)
EVERYWHERE = (3, 7, 9, 11, 23, 63)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_depthwise_sweep(target):
    """Strips of every length and squares up to 9, see above; the lengths that are not in EVERYWHERE for sm_80 alone.

    There 3 and 11 taps have both element sizes with and without dilation, the others of EVERYWHERE each size once.

    Images are wide and narrow, and high and low, by turns, as the heuristics tell them apart.
    """
    turn = TARGETS.index(target)
    with catching() as launches:
        for k in LENGTHS if target == 80 else EVERYWHERE:
            for kernel in [(1, k), (k, 1), (k, k)][: 3 if k <= 9 else 2]:
                for fmt in FORMATS:
                    both = [(torch.float32, 1), (torch.bfloat16, (k + 1) // 2)]
                    if target == 80 and k in (3, 11):
                        both += [(torch.float32, (k + 1) // 2), (torch.bfloat16, 1)]
                    elif target != 80 or k not in EVERYWHERE:
                        both = [both[turn % 2]]
                    for dtype, dilation in both:
                        turn += 1
                        needed = (
                            target == 80 and k == 11,
                            True,
                            True,
                        )  # the input gradient: forward, flipped
                        depthwise(kernel, dtype, fmt, dilation, 128 if turn % 2 else 32, needed)
        if target == 80:
            for fmt in FORMATS:
                for kernel in ((1, 11), (11, 1), (7, 7)):
                    depthwise(kernel, torch.float16, fmt)
    check_built(build_all(launches, target), SUMS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_depthwise_unaligned(target):
    with catching() as launches:
        for kernel in ((1, 11), (11, 1), (3, 3)):
            depthwise(kernel, torch.bfloat16, width=33)
    check_built(build_all(launches, target), (("", "ld", "st"),))


CHAIN = ([(3, 1), (3, 2)], [True] * 4)


@pytest.mark.parametrize("target", TARGETS)
def test_forward_of_the_fused_ops(target):
    """One configuration each; the sweep below has the rest."""
    fmt = torch.contiguous_format
    with catching() as launches:
        layer_norm2d.forward(*norm_args((1, 56, 8, 16), torch.bfloat16, fmt))
        pointwise_gate.forward(*gate_args((1, 56, 8, 16), 56, torch.bfloat16, fmt))
        args, kwargs = chain_args((1, 2, 12, 32), *CHAIN, torch.bfloat16)
        strip_conv_chain.forward(*args, **kwargs)
    check_built(build_all(launches, target))


def products(channels, dtype, fmt):
    """Forward and all gradients of the ops that hold all channels of a pixel."""
    for op, args in (
        (layer_norm2d, norm_args((1, channels, 8, 16), dtype, fmt)),
        (pointwise_gate, gate_args((1, channels, 8, 16), 56, dtype, fmt)),
        (star_conv, star_conv_args((1, channels, 8, 16), 28, dtype, fmt)),
    ):
        y = op.forward(*args)
        op.backward(y, *args, output_mask=[True] * len(args))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels, out", [(28, 28), (48, 48), (48, 24), (56, 56), (56, 28)])
def test_star_conv_wastes_less_than_a_third_of_its_dots(channels, out, itemsize, backward):
    """Tiles are powers of two and these channel counts are not."""
    s = heuristics.norm_pointwise(channels, out, out, itemsize, backward)
    formed = s.BC * -(-2 * out // s.BO) * s.BO
    assert channels * 2 * out / formed >= 2 / 3, (s, formed)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_products_sweep(target):
    """SDAN's channel counts, and small ones: both element sizes for sm_80, one in rotation for the others.

    float16 has the code of bfloat16 but for conversions: at 28 channels.
    """
    with catching() as launches:
        turn = 0
        for channels in (28, 56, 48, 12):
            for fmt in FORMATS:
                turn += 1
                dtypes = DTYPES if target == 80 and channels == 28 else (torch.float32, torch.bfloat16)
                if target != 80:
                    dtypes = (dtypes[turn // 2 % 2],)
                for dtype in dtypes:
                    products(channels, dtype, fmt)
    check_built(build_all(launches, target), (("", "ld", "st"),))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_chains_sweep(target):
    """The strip chain and the attention of one to four groups, forward and the input's gradient; for sm_80 all
    gradients, of the default attention.

    sm_80: both layouts in both element sizes; the others: each layout, chain and table of branches, the element size in
    rotation.
    """
    turn = TARGETS.index(target)
    cases = [(strip_conv_chain, chain_args, (1, 28, 16, 32), [(11, 1), (11, 6)], [True] * 4)]
    for groups in BRANCHES:
        cases.append((mm_lka, attention_args, (1, 48 if groups == 3 else 56, 16, 32), branches_of(groups)))
    with catching() as launches:
        for fmt in FORMATS:
            for n, (op, make, shape, *how) in enumerate(cases):
                turn += 1
                dtypes = (torch.float32, torch.bfloat16)
                if target != 80 or n in (1, 3, 4):
                    dtypes = (dtypes[turn % 2],)
                for dtype in dtypes:
                    args, kwargs = make(shape, *how, dtype, fmt)
                    y = op.forward(*args, **kwargs)
                    every = target == 80 and n == 2
                    slots = 1 + len(args[1]) + len(args[2]) + len(args[3:])
                    op.backward(y, *args, **kwargs, output_mask=[True] + [every] * (slots - 1))
    check_built(build_all(launches, target), (("", "ld", "st"),))
