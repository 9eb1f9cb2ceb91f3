"""Rung 5: the PTX that Triton makes of the star kernels, executed: values, faults, races, and what it moves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip(
        "this process interprets kernels; PTX needs one without TRITON_INTERPRET", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))
from triton_harness import DTYPES, assert_gelu_at_every_magnitude, check_op, ptx_interpreted

from sdan_fast.kernels import star

ACT = {"none": lambda x: x, "gelu": F.gelu, "relu6": F.relu6, "relu": F.relu, "silu": F.silu}


def reference(a, b, *, activation="gelu", outer="none"):
    return ACT[outer](ACT[activation](a) * b)


def pair(shape, dtype, scale=3.0):
    gen = torch.Generator().manual_seed(2)
    return [(scale * torch.randn(shape, generator=gen)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("approx", ["exact", "worst"])
@pytest.mark.parametrize("activation", star.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, activation, approx):
    """Three shapes, one of them with a masked tail; approximate instructions at their worst must stay in the bound
    too.
    """
    for shape in ((2, 3, 8, 64), (1, 5, 7, 11), (3, 1, 1, 1)):
        with ptx_interpreted(approx=approx):
            check_op(star, reference, pair(shape, dtype), {"activation": activation})


@pytest.mark.parametrize("approx", ["exact", "worst"])
def test_gelu_at_every_magnitude(approx):
    with ptx_interpreted(approx=approx):
        assert_gelu_at_every_magnitude(star)


@pytest.mark.parametrize("outer", star.ACTIVATIONS)
def test_outer(outer):
    with ptx_interpreted():
        check_op(star, reference, pair((2, 3, 9, 40), torch.float32), {"outer": outer})


def test_channels_last_and_offset_views():
    for shape in ((2, 6, 9, 8), (1, 5, 7, 11), (3, 2, 1, 1)):
        args = [t.contiguous(memory_format=torch.channels_last) for t in pair(shape, torch.bfloat16)]
        with ptx_interpreted() as stats:
            check_op(star, reference, args)
        assert len(stats) == 2  # forward and backward, nothing else: no copies
    base = pair((4001,), torch.float32)
    with ptx_interpreted():
        check_op(star, reference, [t[1:] for t in base])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_traffic(dtype):
    """Every sector is used in full, and each tensor is touched exactly once."""
    a, b = pair((2, 8, 32, 64), dtype)
    size = a.numel() * a.element_size()
    with ptx_interpreted() as stats:
        y = star.forward(a, b)
        star.backward(y, a, b, output_mask=[True, True])
    for st, loads, stores in zip(stats, (2, 3), (1, 2)):
        assert st.load_efficiency == 1.0 and st.store_efficiency == 1.0
        assert st.global_load_sector_bytes == loads * size and st.global_store_sector_bytes == stores * size
        assert st.shared_accesses == 0
