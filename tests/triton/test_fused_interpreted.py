"""Rung 1: LayerNorm, gate and StarConv under the Triton interpreter, against float64; empty batches of every op."""

from __future__ import annotations

import pytest
import torch
from triton_cases import BRANCHES, CHAINS, attention_args, chain_args, gate_args, norm_args, star_conv_args
from triton_harness import DTYPES, FORMATS, check_op, poisoned

from sdan_fast import reference
from sdan_fast.kernels import layer_norm2d, mm_lka, pointwise_gate, star_conv, strip_conv_chain

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
    shapes = [((2, 56, 3, 8), 56), ((1, 3, 2, 3), 5)]
    if dtype == torch.float32:  # how channels and pixels are shared out is the same for all
        shapes += [((1, 28, 5, 7), 40), ((1, 1, 4, 4), 6), ((1, 48, 2, 8), 48)]
    for shape, out in shapes:
        check_op(pointwise_gate, reference.pointwise_gate, gate_args(shape, out, dtype, fmt))
    check_op(pointwise_gate, reference.pointwise_gate, gate_args((1, 80, 2, 8), 24, dtype, fmt, bias=False))


@pytest.mark.parametrize("slot", range(4))
def test_gate_output_mask(slot):
    needed = [i == slot for i in range(4)]
    args = gate_args((1, 8, 3, 5), 8, torch.float32, torch.contiguous_format)
    check_op(pointwise_gate, reference.pointwise_gate, args, needed=needed)


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
