"""Rung 5: the PTX that nvcc makes of sum_parts_together, executed: values, faults, races."""

from __future__ import annotations

import pytest
import torch
from cuda_ptx import nvcc, sums_together
from host_harness import random

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")


@pytest.mark.parametrize(("channels", "taps"), [(2, (3, 7, 11)), (12, (35, 5))], ids=["few", "many"])
def test_second_stages_in_one_launch(channels, taps):
    """Of filters of different lengths, whose first stages left different numbers of parts."""
    jobs, wanted, outputs = [], [], []
    for i, k in enumerate(taps):
        splits, images = 40 + 7 * i, 1 + i
        parts = random(images, splits, channels, k + 1, seed=i)
        to = torch.full((channels, k), float("nan"))
        row = k + 1
        strides = (row, 1, splits * channels * row, channels * row)
        jobs.append((parts, ([to, None], [0, k, row], channels, images, splits, strides)))
        wanted.append(parts[..., :k].double().sum((0, 1)))
        outputs.append(to)
    sums_together(jobs)
    for got, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
