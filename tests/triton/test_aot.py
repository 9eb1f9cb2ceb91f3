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

from triton_harness import CUDA_TARGETS, DTYPES, compiled_for, wide  # noqa: E402

from sdan_fast.kernels import star  # noqa: E402

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
