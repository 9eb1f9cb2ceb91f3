"""Rung 1: LayerNorm where a pixel's mean is far larger than the spread of its channels, and what depends on it."""

from __future__ import annotations

import pytest
import torch
from triton_cases import norm_args, star_conv_args
from triton_harness import FORMATS, check_op

from sdan_fast import reference
from sdan_fast.kernels import layer_norm2d, star_conv


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mean", [100.0, -3000.0])
def test_a_large_mean(mean, fmt):
    args = norm_args((1, 56, 5, 7), torch.float32, fmt)
    args[0] = args[0] + mean
    check_op(layer_norm2d, reference.layer_norm2d, args)


def test_a_large_mean_through_star_conv():
    args = star_conv_args((1, 28, 3, 8), 6, torch.float32, torch.contiguous_format)
    args[0] = args[0] + 100
    check_op(star_conv, reference.star_conv, args)


def test_a_constant_pixel_is_exactly_zero():
    """Equal channels have no spread: the normalized pixel is the bias, whatever the mean."""
    x = torch.full((1, 7, 2, 3), 1234.567)
    bias = torch.arange(7.0)
    y = layer_norm2d.forward(x, torch.ones(7), bias)
    assert torch.equal(y, bias.view(1, 7, 1, 1).expand_as(x))
