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
@pytest.mark.parametrize(
    "kernel, dilation, dtype",
    [
        ((1, 3), 1, torch.float32),
        ((3, 1), 1, torch.float16),
        ((1, 11), 6, torch.float32),
        ((11, 1), 6, torch.float32),
        ((1, 23), 1, torch.float16),
        ((63, 1), 1, torch.float32),
        ((7, 7), 4, torch.float16),
        ((9, 9), 1, torch.float32),
    ],
    ids=str,
)
def test_values_sweep(kernel, dilation, dtype, fmt):
    """As above, but of filters that reach beyond the second image already without the third one."""
    reach = dilation * (max(kernel) - 1)
    for shape in ((1, 4, 8, 64), (2, 3, 5, 11), (1, 2, 2, 3))[: 3 if reach < 11 else 2]:
        with ptx_interpreted():
            check_op(
                op,
                reference.depthwise_conv2d,
                inputs(shape, kernel, dtype, fmt),
                {"dilation": (dilation, dilation)},
            )


BOTH = (torch.float32, torch.bfloat16)

# SDAN's filters on rows and columns of 180 x 320, both element sizes: (filter, dilation). Of 7x7 the committed counts
# say the same (test_committed.py), and take the longest to compile.
SDAN = [((1, 11), 1), ((1, 11), 6), ((11, 1), 1), ((11, 1), 6), ((3, 3), 1)]
# The 3-tap strips of three groups: forward only. A weight gradient loads two tensors for three products a pixel.
SHORT = [((1, 3), 1), ((3, 1), 2)]


def executed(kernel, dilation, dtype, fmt, backward):
    """Stats of one forward and, if asked for, of the weight gradient's first stage, in part of SDAN's images."""
    channels_last = fmt == torch.channels_last
    if kernel[1] == 1:
        shape = (1, 28, 180, 2) if channels_last else (1, 1, 180, 32 if dtype == torch.float32 else 64)
    else:
        rows, columns = (1, 320) if kernel[0] == 1 else (64, 64)
        shape = (1, 28, rows, columns) if channels_last else (1, 1, 24, 320)
    x, weight, bias = inputs(shape, kernel, dtype, fmt)
    with ptx_interpreted() as stats:
        op.forward(x, weight, bias, dilation=(dilation, dilation))
        if backward:
            op.backward(x, x, weight, bias, dilation=(dilation, dilation), output_mask=[False, True, True])
    return x, stats[: 2 if backward else 1]


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("kernel, dilation", SDAN, ids=str)
def test_traffic(kernel, dilation, dtype):
    """Full sectors in stores and unshifted loads, mostly arithmetic, no shared memory but for the last sums."""
    x, (forward, wgrad) = executed(kernel, dilation, dtype, torch.contiguous_format, True)
    assert forward.store_efficiency == 1.0
    assert forward.global_store_sector_bytes == x.numel() * x.element_size()
    # Of the vectors that a row's taps load, the one in the middle is unshifted (of each of a thread's vectors).
    wide = [s.efficiency for s in forward.sites if s.space == "global" and s.kind == "ld" and s.size == 16]
    assert max(wide) >= 0.95
    if kernel[0] > 1 or dilation == 1:
        assert min(wide) >= 0.85
    else:  # a thread owns vectors a sector apart, and half of the shifted ones straddle two sectors
        assert sum(e >= 0.9 for e in wide) >= len(wide) // 2 and min(wide) >= 0.45
    assert forward.shared_accesses == 0
    assert fma_share(forward) >= 0.3 and fma_share(wgrad) >= 0.3, (fma_share(forward), fma_share(wgrad))


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_arithmetic_in_channels_last(dtype):
    """At least 30 % FMA there too, with 28 channels, which fill neither a vector of 16 bytes nor a power of two.

    Of SDAN's filters the one with the least; of the others the committed counts say it (test_committed.py).
    """
    _, (forward, wgrad) = executed((3, 3), 1, dtype, torch.channels_last, True)
    assert fma_share(forward) >= 0.3 and fma_share(wgrad) >= 0.3, (fma_share(forward), fma_share(wgrad))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("kernel, dilation", SHORT, ids=str)
def test_arithmetic_of_short_strips(kernel, dilation, dtype, fmt):
    _, (forward,) = executed(kernel, dilation, dtype, fmt, False)
    assert fma_share(forward) >= 0.3, fma_share(forward)


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
