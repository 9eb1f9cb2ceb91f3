"""Rung 1: LayerNorm, gate, strip chain, StarConv and attention under the Triton interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from triton_cases import (
    attention_args,
    attention_reference,
    chain_args,
    chain_reference,
    gate_args,
    norm_args,
    star_conv_args,
)
from triton_harness import DTYPES, FORMATS, check_op, poisoned

from sdan_fast import reference
from sdan_fast.kernels import layer_norm2d, mm_lka, pointwise_gate, star_conv, strip_conv_chain

NCHW = torch.contiguous_format
formats = pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@formats
@dtypes
def test_layer_norm(dtype, fmt):
    for shape in ((2, 56, 3, 8), (1, 28, 5, 7), (2, 3, 1, 1), (1, 1, 3, 4), (1, 7, 1, 5)):
        check_op(layer_norm2d, reference.layer_norm2d, norm_args(shape, dtype, fmt))
    check_op(
        layer_norm2d, reference.layer_norm2d, norm_args((1, 8, 4, 4), dtype, fmt, bias=False), {"eps": 1e-3}
    )


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_layer_norm_output_mask(needed):
    args = norm_args((1, 12, 5, 6), torch.float32, torch.contiguous_format)
    check_op(layer_norm2d, reference.layer_norm2d, args, needed=needed)


@formats
@dtypes
def test_gate(dtype, fmt):
    for shape, out in (
        ((2, 56, 3, 8), 56),
        ((1, 28, 5, 7), 40),
        ((1, 3, 2, 3), 5),
        ((1, 1, 4, 4), 6),
        ((1, 48, 2, 8), 48),
    ):
        check_op(pointwise_gate, reference.pointwise_gate, gate_args(shape, out, dtype, fmt))
    check_op(pointwise_gate, reference.pointwise_gate, gate_args((1, 80, 2, 8), 24, dtype, fmt, bias=False))


@pytest.mark.parametrize("slot", range(4))
def test_gate_output_mask(slot):
    needed = [i == slot for i in range(4)]
    args = gate_args((1, 8, 3, 5), 8, torch.float32, torch.contiguous_format)
    check_op(pointwise_gate, reference.pointwise_gate, args, needed=needed)


# stages of (k, dilation), biases present
CHAINS = [
    ([(3, 1)], [True, True]),
    ([(3, 1), (3, 2)], [True, True, True, True]),
    ([(5, 1), (3, 2)], [False, True, False, True]),
    ([(3, 1), (3, 2)], [False, False, True, False]),
    ([(3, 1), (3, 2), (3, 1)], [True, False, True, True, False, True]),
]


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_star_conv(dtype, fmt):
    args = star_conv_args((1, 8, 4, 16), 8, dtype, fmt)
    check_op(star_conv, reference.star_conv, args)


@formats
def test_star_conv_forms(fmt):
    """Outer activations, missing biases, more or fewer channels out than in."""
    args = star_conv_args((1, 8, 4, 8), 12, torch.float32, fmt, bias=False)
    check_op(star_conv, reference.star_conv, args, {"outer": "gelu", "eps": 1e-3})
    args = star_conv_args((1, 12, 3, 8), 6, torch.float32, fmt)
    check_op(star_conv, reference.star_conv, args, {"outer": "silu"})


@pytest.mark.parametrize("slot", range(7))
def test_star_conv_output_mask(slot):
    args = star_conv_args((1, 6, 4, 8), 6, torch.float32, torch.contiguous_format)
    check_op(star_conv, reference.star_conv, args, needed=[i == slot for i in range(7)])


STRIPS = [(1, 3, 1), (3, 1, 1), (1, 3, 2), (3, 1, 2)]
BRANCHES = [[(3, 3, 1), (3, 3, 2)], STRIPS]
MIXED = [[(3, 3, 1), (3, 3, 2)], [*STRIPS[:2], (3, 3, 2)], [(3, 3, 1), *STRIPS[2:]], STRIPS]


@formats
def test_attention(fmt):
    args, kwargs = attention_args((2, 8, 9, 16), BRANCHES, torch.float32, fmt)
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


def test_empty_batches():
    fmt = torch.contiguous_format
    chain, chain_kwargs = chain_args((0, 2, 4, 4), *CHAINS[1], torch.float32)
    attention, attention_kwargs = attention_args((0, 4, 4, 4), BRANCHES, torch.float32, fmt)
    cases = [
        (layer_norm2d, norm_args((0, 4, 3, 3), torch.float32, fmt), {}, 3),
        (pointwise_gate, gate_args((0, 4, 3, 3), 4, torch.float32, fmt), {}, 4),
        (star_conv, star_conv_args((0, 4, 3, 3), 5, torch.float32, fmt), {}, 7),
        (strip_conv_chain, chain, chain_kwargs, 9),
        (mm_lka, attention, attention_kwargs, 13),
    ]
    for op, args, kwargs, slots in cases:
        with poisoned():
            y = op.forward(*args, **kwargs)
            assert y.shape[0] == 0
            grads = op.backward(y, *args, **kwargs, output_mask=[True] * slots)
        assert len(grads) == slots
        assert all((grad == 0).all() for grad in grads)


def test_supports_says_why():
    fmt = torch.contiguous_format
    args = norm_args((1, 4, 3, 3), torch.float32, fmt)
    assert layer_norm2d.supports(*args) is None
    assert "1025" in layer_norm2d.supports(torch.zeros(1, 1025, 1, 1), torch.zeros(1025), None)
    args = gate_args((1, 4, 3, 3), 4, torch.float32, fmt)
    assert pointwise_gate.supports(*args) is None
    assert "dtype" in pointwise_gate.supports(args[0].half(), *args[1:])
    args = star_conv_args((1, 4, 3, 3), 4, torch.float32, fmt)
    assert star_conv.supports(*args) is None
    assert "outer" in star_conv.supports(*args, outer="tanh")
    args, kwargs = chain_args((1, 2, 4, 4), *CHAINS[0], torch.float32)
    assert strip_conv_chain.supports(*args, **kwargs) is None
    assert "65" in strip_conv_chain.supports(args[0], [torch.zeros(2, 1, 1, 65)], [], **kwargs)
    args, kwargs = attention_args((1, 4, 4, 4), BRANCHES, torch.float32, fmt)
    assert mm_lka.supports(*args, **kwargs) is None
    assert "dtype" in mm_lka.supports(*args[:-1], args[-1].half(), **kwargs)
