"""`mm_lka` as the CUDA kernels of its parts: values and gradients of the contract's cases, and every output mask."""

from __future__ import annotations

import pytest
import torch
from host_harness import DTYPES, assert_bound, laid_out, library

from sdan_fast.ops import OPS
from tests.ops.harness import captured, cast, tensors
from tests.ops.test_mm_lka import TestMMLKA as Contract

MM_LKA = OPS["mm_lka"]
CASES = {case.id: case for case in Contract.cases}
del Contract  # its tests are not those of this file


def call(name, dtype, layout):
    """The flat arguments of a case."""
    args, kwargs = CASES[name].arguments(dtype)
    args[0] = laid_out(args[0], layout)
    _, flat, options = captured("mm_lka", args, kwargs)
    return flat, options


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tiny", "mixed-biases", "groups-4", "no-bias", "one-pixel"])
def test_values_and_gradients(name, dtype, layout):
    library()
    flat, options = call(name, dtype, layout)
    exact_args = cast(flat, torch.float64)
    y = MM_LKA.overloads["cuda_host"](*flat, **options)
    exact = MM_LKA.reference(*exact_args, **options)
    assert_bound(y, MM_LKA.reference(*flat, **options), exact, "mm_lka")
    mask = [slot is not None for slot in MM_LKA.slots(flat)]
    grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype)
    found = MM_LKA.backward_overloads["cuda_host"](grad, *flat, **options, output_mask=mask)

    def plain(kind):
        leaves = [t.to(kind).contiguous().requires_grad_() for t in MM_LKA.flatten(flat)]
        out = MM_LKA.reference(*MM_LKA.unflatten(flat, leaves), **options)
        return torch.autograd.grad(out, leaves, grad.to(kind))

    assert len(found) == len(tensors(flat))
    for i, triple in enumerate(zip(found, plain(dtype), plain(torch.float64), strict=True)):
        assert_bound(*triple, f"gradient {i}")


@pytest.mark.parametrize("name", ["mixed-biases", "groups-4", "no-bias"])
def test_output_masks(name):
    library()
    flat, options = call(name, torch.float32, "contiguous")
    there = [slot is not None for slot in MM_LKA.slots(flat)]
    grad = torch.randn_like(flat[0])
    whole = iter(MM_LKA.backward_overloads["cuda_host"](grad, *flat, **options, output_mask=there))
    every = [next(whole) if present else None for present in there]
    for i, present in enumerate(there):
        mask = [present and j == i for j in range(len(there))]
        found = MM_LKA.backward_overloads["cuda_host"](grad, *flat, **options, output_mask=mask)
        assert len(found) == present
        if present:
            torch.testing.assert_close(found[0], every[i], rtol=1e-5, atol=1e-6)
