"""Rung 5: the PTX that nvcc makes of the star's CUDA kernels, executed: values, faults, and what it moves."""

from __future__ import annotations

import pytest
import torch
from cuda_ptx import entry, nvcc, ptx, run
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
STAR = OPS["star"]
ACTIVATIONS = ("none", "gelu", "relu6", "relu", "silu")
TYPES = {  # name, mangled, elements in 128 bits
    torch.float32: ("float", "kernelIf", 4),
    torch.bfloat16: ("bfloat16", "8bfloat16", 8),
    torch.float16: ("float16", "7float16", 8),
}
NEW = float("nan")


@pytest.fixture(scope="module")
def text():
    instances = []
    for name, _, wide in TYPES.values():
        for n in (wide, 1):
            p, q = f"const {name}*", f"{name}*"
            instances.append(f"void star_forward_kernel<{name}, {n}>({p}, {p}, {q}, int64_t, int, int)")
            instances.append(
                f"void star_backward_kernel<{name}, {n}>({p}, {p}, {p}, {q}, {q}, int64_t, int, int)"
            )
    return ptx("star.cuh", tuple(instances))


def launch(text, which, dtype, wide, n, tensors, activation, outer, grid=None, **kwargs):
    _, mangled, width = TYPES[dtype]
    name = entry(text, f"star_{which}_kernel", mangled, f"Li{width if wide else 1}E")
    blocks = grid or -(-n // (256 * (width if wide else 1)))
    codes = [ACTIVATIONS.index(activation), ACTIVATIONS.index(outer)]
    return run(text, name, blocks, 256, [*tensors, n, *codes], **kwargs)


def inputs(n, dtype, shift=0):
    return [random(n + shift, dtype=dtype, seed=s, scale=3.0)[shift:] for s in range(3)]


@pytest.mark.parametrize("approx", ["exact", "worst"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values(text, dtype, activation, approx):
    """A size with a tail; approximate instructions at their worst must stay in the bound too."""
    n, outer = 3001, {"gelu": "silu", "silu": "gelu", "relu": "relu6"}.get(activation, "none")
    a, b, g = inputs(n, dtype)
    y, ga, gb = (torch.full((n,), NEW, dtype=dtype) for _ in range(3))
    launch(text, "forward", dtype, True, n, [a, b, y], activation, outer, approx=approx)
    launch(text, "backward", dtype, True, n, [g, a, b, ga, gb], activation, outer, approx=approx)
    kwargs = {"activation": activation, "outer": outer}
    exact = [t.double() for t in (a, b, g)]
    assert_bound(y, STAR.reference(a, b, **kwargs), STAR.reference(*exact[:2], **kwargs))
    eager = STAR.reference_backward(g, a, b, **kwargs, output_mask=[True, True])
    want = STAR.reference_backward(exact[2], *exact[:2], **kwargs, output_mask=[True, True])
    for got, e, w in zip((ga, gb), eager, want, strict=True):
        assert_bound(got, e, w)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_misaligned_tensors_take_the_scalar_kernel(text, dtype):
    n = 1000
    a, b, g = inputs(n, dtype, shift=1)
    y, ga, gb = (torch.full((n,), NEW, dtype=dtype) for _ in range(3))
    launch(
        text, "forward", dtype, False, n, [a, b, y], "gelu", "none", grid=2
    )  # the loop takes a second turn
    launch(text, "backward", dtype, False, n, [g, a, b, ga, None], "gelu", "none", grid=2)
    launch(text, "backward", dtype, False, n, [g, a, b, None, gb], "gelu", "none")
    assert_bound(y, STAR.reference(a, b), STAR.reference(a.double(), b.double()))
    eager = STAR.reference_backward(g, a, b, output_mask=[True, True])
    want = STAR.reference_backward(g.double(), a.double(), b.double(), output_mask=[True, True])
    assert_bound(ga, eager[0], want[0])
    assert_bound(gb, eager[1], want[1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_traffic(text, dtype):
    """Each element is moved once, in full sectors and by 128-bit instructions (some rows of SDAN's shape)."""
    n = 56 * 6 * 64 + 5
    a, b, g = inputs(n, dtype)
    y, ga, gb = (torch.full((n,), NEW, dtype=dtype) for _ in range(3))
    size = a.element_size() * n
    for st, reads, writes in (
        (launch(text, "forward", dtype, True, n, [a, b, y], "gelu", "none"), 2, 1),
        (launch(text, "backward", dtype, True, n, [g, a, b, ga, gb], "gelu", "none"), 3, 2),
    ):
        assert st.load_efficiency >= 0.99 and st.store_efficiency >= 0.99
        assert st.global_load_bytes == reads * size and st.global_store_bytes == writes * size
        wide = sum(s.bytes for s in st.sites if s.space == "global" and s.size == 16)
        assert wide / (st.global_load_bytes + st.global_store_bytes) > 0.999
