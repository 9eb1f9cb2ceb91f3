"""Rung 1: the star kernels under the Triton interpreter, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_harness import DTYPES, assert_gelu_at_every_magnitude, check_op

from sdan_fast.kernels import star

ACT = {"none": lambda x: x, "gelu": F.gelu, "relu6": F.relu6, "relu": F.relu, "silu": F.silu}


def reference(a, b, *, activation="gelu", outer="none"):
    return ACT[outer](ACT[activation](a) * b)


def pair(shape, dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=gen)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("outer", star.ACTIVATIONS)
@pytest.mark.parametrize("activation", star.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(activation, outer, dtype):
    if dtype == torch.float32 or outer == activation:
        check_op(star, reference, pair((2, 5, 23, 17), dtype), {"activation": activation, "outer": outer})
    else:  # in 16 bits eager may round an argument of a kink to its other side, where derivatives differ: values only
        check_op(
            star,
            reference,
            pair((2, 5, 23, 17), dtype),
            {"activation": activation, "outer": outer},
            backward=False,
        )


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (7,), (2, 3), (1, 1024), (4, 512), (1, 2, 3, 683), (0, 3, 4, 4), (3, 0), ()]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(shape, dtype):
    check_op(star, reference, pair(shape, dtype), {"activation": "gelu"})


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("outer", ["none", "gelu"])
def test_output_mask(needed, outer):
    check_op(star, reference, pair((2, 3, 5, 7), torch.float32), {"outer": outer}, needed=needed)


def test_layouts():
    """Strided, expanded and channels_last inputs in every combination; dense inputs of one format are read where they
    lie.
    """
    base = pair((2, 6, 9, 8), torch.float32)
    views = [
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t[:1, :, :1].expand(2, 6, 9, 8),
    ]
    for va in views:
        for vb in views:
            check_op(star, reference, [va(base[0]), vb(base[1])])


def test_nothing_is_written_outside():
    """Outputs with guard bands around them: launch straight into views of larger buffers filled with a sentinel."""
    from sdan_fast.kernels.launch import launch

    a, b = pair((1500,), torch.float32)
    buffer = torch.full((1500 + 2048,), 777.0)
    launch(
        star.star_forward,
        (2,),
        a,
        b,
        buffer[1024:2524],
        1500,
        ACTIVATION="gelu",
        OUTER="none",
        BLOCK=1024,
        num_warps=4,
    )
    assert (buffer[:1024] == 777).all() and (buffer[2524:] == 777).all()
    assert torch.equal(buffer[1024:2524], star.forward(a, b))


def test_extreme_values():
    a = torch.tensor([0.0, -0.0, 1e4, -1e4, 40.0, -40.0, 1e-30, -1e-30, 6.0, -6.0])
    for activation in star.ACTIVATIONS:
        for outer in star.ACTIVATIONS:
            y = star.forward(a, torch.ones_like(a), activation=activation, outer=outer)
            torch.testing.assert_close(
                y, reference(a, torch.ones_like(a), activation=activation, outer=outer)
            )
    nan = star.forward(torch.full((4,), float("nan")), torch.ones(4), activation="relu6", outer="relu")
    assert nan.isnan().all()


def test_gelu_at_every_magnitude():
    assert_gelu_at_every_magnitude(star)


def test_supports_says_why():
    a, b = pair((2, 3), torch.float32)
    assert star.supports(a, b) is None
    assert "one shape" in star.supports(a, b[:1])
    assert "dtype" in star.supports(a, b.bfloat16())
    assert "float64" in star.supports(a.double(), b.double())
    assert "activation" in star.supports(a, b, activation="tanh")
    assert "outer" in star.supports(a, b, outer="tanh")


def test_repeats_bitwise():
    a, b = pair((3, 1000), torch.float32)
    g = torch.randn(3, 1000)
    runs = [[star.forward(a, b), *star.backward(g, a, b, output_mask=[True, True])] for _ in range(2)]
    assert all(torch.equal(u, v) for u, v in zip(*runs))
