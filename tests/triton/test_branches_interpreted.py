"""Rung 1: strip chains and attention, whose branches share launches, under the Triton interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from triton_cases import (
    BRANCHES,
    CHAINS,
    STRIPS,
    attention_args,
    attention_reference,
    chain_args,
    chain_reference,
)
from triton_harness import FORMATS, check_op

from sdan_fast.kernels import mm_lka, strip_conv_chain

NCHW = torch.contiguous_format
formats = pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
MIXED = [[(3, 3, 1), (3, 3, 2)], [*STRIPS[:2], (3, 3, 2)], [(3, 3, 1), *STRIPS[2:]], STRIPS]


@formats
@pytest.mark.parametrize("stages, mask", CHAINS, ids=str)
def test_chain_forward(stages, mask, fmt):
    """The two-pass form is exact at the borders whatever biases there are, for whole vectors and for others."""
    for shape in ((2, 3, 5, 8), (1, 4, 4, 5)):
        args, kwargs = chain_args(shape, stages, mask, torch.float32, fmt)
        check_op(strip_conv_chain, chain_reference, args, kwargs, backward=False)


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chain_16_bit(dtype, fmt):
    args, kwargs = chain_args((1, 8, 6, 8), *CHAINS[1], dtype, fmt)
    check_op(strip_conv_chain, chain_reference, args, kwargs, backward=False)


def test_chain_whose_channels_fill_no_power_of_two():
    """Three vectors of a pixel, for which four threads are there, where the pixels of a row are shared out in turn."""
    args, kwargs = chain_args(
        (1, 12, 3, 20), [(7, 1), (3, 2)], [True] * 4, torch.bfloat16, torch.channels_last
    )
    check_op(strip_conv_chain, chain_reference, args, kwargs, needed=[True] + [False] * 8)


@formats
def test_chain_backward(fmt):
    args, kwargs = chain_args((1, 3, 8, 8), *CHAINS[1], torch.float32, fmt)
    slots = 1 + len(args[1]) + len(args[2])
    check_op(strip_conv_chain, chain_reference, args, kwargs, needed=[True] + [False] * (slots - 1))
    check_op(strip_conv_chain, chain_reference, args, kwargs)


def test_chain_a_bias_alone():
    """Only one bias wants a gradient: nothing below it is computed, and the answer is that one tensor."""
    args, kwargs = chain_args((1, 3, 5, 8), *CHAINS[2], torch.float32)
    needed = [False] * 7
    needed[5] = True
    check_op(strip_conv_chain, chain_reference, args, kwargs, needed=needed)


@formats
def test_chain_longer_than_a_program(fmt, monkeypatch):
    """Rows and columns that no program holds at once are gone through in steps: forward and input gradient."""
    from sdan_fast.kernels import branches

    monkeypatch.setattr(branches, "BLOCK", 8)
    args, kwargs = chain_args((1, 1, 37, 36), *CHAINS[1], torch.float32, fmt)
    args, kwargs = (
        (args, kwargs) if fmt == NCHW else chain_args((1, 3, 18, 40), *CHAINS[1], torch.float32, fmt)
    )
    images = branches.Images.of(args[0], args[0], [strip_conv_chain._convs(*args[1:], **kwargs)], fmt)
    steps = branches.steps_of(strip_conv_chain._convs(*args[1:], **kwargs), fused=True, flip=False)
    assert [images.shape(step).loop for step in steps] == [True, True]
    slots = 1 + len(args[1]) + len(args[2])
    check_op(strip_conv_chain, chain_reference, args, kwargs, needed=[True] + [False] * (slots - 1))


@formats
def test_chain_of_views(fmt):
    """A 1x1 image, an image that starts inside of a 16-byte word, and one that is no dense tensor."""
    for view in (
        lambda t: t[:, :, :1, :1],
        lambda t: t[:, :, 1:, 1:],
        lambda t: t.flatten()[1:97].view(1, 2, 6, 8) if fmt == NCHW else t[:, 1:3],
    ):
        args, kwargs = chain_args((1, 4, 7, 8), [(3, 1), (3, 2)], [True] * 4, torch.float32, fmt)
        x = view(args[0])
        args = [x, *([t[: x.shape[1]] for t in ts] for ts in args[1:])]
        check_op(strip_conv_chain, chain_reference, args, kwargs, needed=[True] + [False] * 8)


@formats
def test_attention(fmt):
    shape = (2, 4, 9, 16) if fmt == NCHW else (1, 8, 9, 16)
    args, kwargs = attention_args(shape, BRANCHES, torch.float32, fmt)
    check_op(mm_lka, attention_reference, args, kwargs)


@formats
def test_attention_of_four_branches(fmt):
    """Every kind of branch in one launch per step, forward and backward."""
    args, kwargs = attention_args((1, 8, 5, 8), MIXED, torch.float32, fmt)
    check_op(mm_lka, attention_reference, args, kwargs)


@formats
def test_attention_of_five_branches(fmt):
    """More branches than a launch has room for, of one convolution each; only the input's gradient."""
    branches = [[(3, 1, 2)], [(1, 3, 1)], [(3, 3, 1)], [(1, 1, 1)], [(1, 3, 2)]]
    args, kwargs = attention_args((1, 5, 3, 4), branches, torch.float32, fmt)
    slots = 3 + len(args[1]) + len(args[2])
    check_op(mm_lka, attention_reference, args, kwargs, needed=[True] + [False] * (slots - 1))


@formats
def test_attention_16_bit(fmt):
    args, kwargs = attention_args((1, 12, 6, 16), BRANCHES, torch.bfloat16, fmt)
    check_op(mm_lka, attention_reference, args, kwargs, backward=False)


def test_attention_one_branch_without_bias():
    args, kwargs = attention_args(
        (1, 6, 5, 7), [[(5, 3, 1)]], torch.float32, torch.contiguous_format, bias=False
    )
    check_op(mm_lka, attention_reference, args, kwargs)


@pytest.mark.parametrize("slot", [0, 1, 7, 12])
def test_attention_output_mask(slot):
    args, kwargs = attention_args((1, 4, 4, 8), BRANCHES, torch.float32, torch.contiguous_format)
    slots = 3 + len(args[1]) + len(args[2])
    check_op(mm_lka, attention_reference, args, kwargs, needed=[i == slot for i in range(slots)])
