"""Rung 5: the PTX that Triton makes of the depth-wise kernels, executed: values, faults, races, and what it moves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip(
        "this process interprets kernels; PTX needs one without TRITON_INTERPRET", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))
from triton_harness import FORMATS, check_op, fma_share, ptx_interpreted

from sdan_fast import reference
from sdan_fast.kernels import depthwise_conv2d as op


def inputs(shape, kernel, dtype, fmt=torch.contiguous_format):
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=gen).to(dtype).contiguous(memory_format=fmt)
    return [
        x,
        torch.randn((shape[1], 1, *kernel), generator=gen).to(dtype),
        torch.randn(shape[1], generator=gen).to(dtype),
    ]


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("kernel, dilation", [((1, 5), 2), ((3, 3), 1)], ids=str)
def test_values(kernel, dilation, fmt):
    """Three shapes: rows of whole vectors, rows that are not, an image smaller than the filter."""
    for shape in ((1, 8, 9, 16), (2, 3, 7, 11), (1, 2, 2, 3)):
        with ptx_interpreted():
            check_op(
                op,
                reference.depthwise_conv2d,
                inputs(shape, kernel, torch.bfloat16, fmt),
                {"dilation": (dilation, dilation)},
            )


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kernel, dilation",
    [
        ((1, 3), 1),
        ((3, 1), 1),
        ((1, 11), 6),
        ((11, 1), 6),
        ((1, 23), 1),
        ((63, 1), 1),
        ((7, 7), 4),
        ((9, 9), 1),
    ],
    ids=str,
)
def test_values_sweep(kernel, dilation, dtype, fmt):
    for shape in ((1, 8, 16, 32), (2, 3, 13, 11), (1, 2, 2, 3)):
        with ptx_interpreted():
            check_op(
                op,
                reference.depthwise_conv2d,
                inputs(shape, kernel, dtype, fmt),
                {"dilation": (dilation, dilation)},
            )


# SDAN's filters on rows and columns of 180 x 320: (shape, filter, dilation, least share of FMA)
SDAN = [
    pytest.param((1, 1, 24, 320), (1, 11), 1, 0.30, id="1x11"),
    pytest.param((1, 1, 24, 320), (1, 11), 6, 0.30, id="1x11 dilated"),
    pytest.param((1, 1, 180, 64), (11, 1), 1, 0.30, id="11x1"),
    pytest.param((1, 1, 180, 64), (11, 1), 6, 0.30, id="11x1 dilated"),
    pytest.param((1, 1, 40, 320), (3, 3), 1, 0.30, id="3x3"),
    pytest.param((1, 1, 32, 320), (7, 7), 1, 0.30, id="7x7", marks=pytest.mark.slow),
    pytest.param((1, 1, 32, 320), (7, 7), 4, 0.30, id="7x7 dilated", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape, kernel, dilation, share", SDAN)
def test_traffic(shape, kernel, dilation, share):
    """Full sectors in stores and unshifted loads, no column or row read by two programs of a strip, mostly
    arithmetic.
    """
    x, weight, bias = inputs(shape, kernel, torch.bfloat16)
    with ptx_interpreted() as stats:
        op.forward(x, weight, bias, dilation=(dilation, dilation))
    (st,) = stats
    size = x.numel() * x.element_size()
    assert st.store_efficiency == 1.0 and st.global_store_sector_bytes == size
    # Of the vectors that a row's taps load, the one in the middle is the unshifted one.
    wide = [s for s in st.sites if s.space == "global" and s.kind == "ld" and s.size == 16]
    assert wide and max(s.efficiency for s in wide) >= 0.95 and all(s.efficiency >= 0.85 for s in wide)
    assert fma_share(st) >= share
    assert st.shared_accesses == 0


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
def test_backward_is_deterministic_and_clean(fmt):
    """Weight gradients: no conflicts of banks to speak of, and the same bits whatever the order of blocks."""
    args = inputs((2, 8, 24, 16), (3, 3), torch.bfloat16, fmt)
    results = []
    for lanes in (1 << 15, 1):
        with ptx_interpreted(batch_lanes=lanes) as stats:
            results.append(op.backward(args[0], *args, output_mask=[True, True, True]))
        conflicts, wavefronts = sum(s.bank_conflicts for s in stats), sum(s.shared_wavefronts for s in stats)
        assert conflicts <= 0.1 * wavefronts
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
