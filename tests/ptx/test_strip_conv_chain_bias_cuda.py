"""Rung 5: the PTX of the kernels of a strip chain's bias gradients, executed: values, faults, races, traffic."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from cuda_ptx import as_array, entry, nvcc, ptx, ptxrun, run, sum_parts
from host_harness import assert_bound, random

from sdan_fast.ops._op import OPS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
CHAIN = OPS["strip_conv_chain"]
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MANGLED = {torch.float32: "If", torch.bfloat16: "INS0_8bfloat16E"}
STAGES = ((11, 5, 1, 1), (7, 3, 3, 2), (3, 9, 1, 4))  # kw, kh, dw, dh


@pytest.fixture(scope="module")
def text():
    signature = "(const void*, const BiasFields, float*, const BiasParams)"
    instances = [f"void chain_bias_sums_kernel<{v}>{signature}" for v in (4, 8)]
    for t, v in ((t, v) for t in ("float", "bfloat16") for v in (1, 4)):
        instances.append(f"void chain_bias_sums_last_kernel<{t}, {v}>{signature.replace('void', t, 1)}")
    return ptx("strip_conv_chain_bias.cuh", tuple(instances))  # chain_fields is no template


def with_pointers(tensors):
    """A struct of pointers; None is a null pointer."""
    present = {8 * i: as_array(t) for i, t in enumerate(tensors) if t is not None}
    return ptxrun.Struct(bytes(8 * len(tensors)), present)


def bias_gradients(text, grad, weights, stages, segment):
    """As csrc/cuda/strip_conv_chain_bias.cu has it, with its own cut of the rows; and the statistics of the sums."""
    n, c, h, w = grad.shape
    last, count, dtype = int(not grad.is_contiguous()), len(stages), DTYPE[grad.dtype]
    nan = float("nan")
    fields, before = (torch.full((count * c * (h + w),), nan) for _ in range(2))
    for i, (kw, kh, dw, dh) in enumerate(stages):
        fields, before = before, fields
        p = struct.pack("<10i", dtype, i, c, w, h, kw, kh, dw, dh, last)
        across, down = weights[2 * i : 2 * i + 2]
        name = entry(text, "chain_fields")
        run(text, name, 2, 64, [across, down, before, fields, struct.pack("<q", count), p])
    grads = [torch.full((c,), nan, dtype=grad.dtype) for _ in range(2 * count)]
    stats = []
    for first in range(0, count, 2):
        some = min(2, count - first)
        across = [fields[s * c * w :] if s < count else None for s in range(first, first + 3)]
        down = [fields[count * c * w + s * c * h :] if s < count else None for s in range(first, first + 3)]
        p = struct.pack(
            "<q7i", n, dtype, c, h, w, some, segment, int(w * grad.element_size() % 16 == 0)
        ) + bytes(4)
        segments = -(-h // segment)
        splits = 3 if last else segments
        partials = splits * c if last else n * c * segments
        partial = torch.full((4 * partials,), nan)
        v, biases = 1 if c % 4 else 4, 2 * some  # of a thread of channels_last
        grid, block = ((splits, 1), (c // v, 256 * v // c)) if last else ((partials,), (256,))
        wide = 16 // grad.element_size()
        last_name = f"chain_bias_sums_last_kernel{MANGLED[grad.dtype]}Li{v}E"
        name = entry(text, last_name if last else f"chain_bias_sums_kernelILi{wide}E")
        threads = math.prod(block)
        pitch = threads + (32 // (v * biases) - threads) % 32
        shared = 4 * v * biases * pitch if last else 0
        args = [grad, with_pointers([*down, *across]), partial, p]
        stats.append(run(text, name, grid, block, args, shared_bytes=shared))
        outputs = grads[2 * first : 2 * first + 2 * some]
        # Of channels, biases, images and splits.
        strides = (biases, 1, 0, biases * c) if last else (splits, partials, c * splits, 1)
        sum_parts(partial, outputs, list(range(2 * some + 1)), c, 1 if last else n, splits, strides)
    return grads, stats


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "segment"), [((2, 3, 13, 20), 13), ((1, 4, 17, 19), 5)], ids=str)
def test_bias_gradients(text, shape, segment, dtype, layout):
    """Of one, two and three stages: the last takes two launches of sums."""
    c = shape[1]
    grad = random(*shape, dtype=dtype, seed=1).contiguous(memory_format=layout)
    for stages in (STAGES[:1], STAGES[:2], STAGES):
        weights, dilations = [], []
        for i, (kw, kh, dw, dh) in enumerate(stages):
            weights.append(random(c, 1, 1, kw, dtype=dtype, seed=10 + i, scale=kw**-0.5))
            weights.append(random(c, 1, kh, 1, dtype=dtype, seed=20 + i, scale=kh**-0.5))
            dilations += [dw, dh]
        got, stats = bias_gradients(text, grad, weights, stages, segment)
        biases, count = [random(c, dtype=dtype, seed=30 + i) for i in range(len(weights))], len(weights)
        kwargs = {"bias_mask": [True] * count, "dilations": dilations}
        mask = [False] * (1 + count) + [True] * count

        def reference(cast, args=(weights, biases), kwargs=kwargs, mask=mask):
            x, g = cast(torch.zeros_like(grad)), cast(grad)
            found = CHAIN.reference_backward(g, x, *[[cast(t) for t in ts] for ts in args], **kwargs,
                                             output_mask=mask)  # fmt: skip
            return [t for t, wanted in zip(found, mask, strict=True) if wanted]

        eager, exact = reference(lambda t: t), reference(torch.Tensor.double)
        for triple in zip(got, eager, exact, strict=True):
            assert_bound(*triple, f"{shape} {stages}")
        for st in stats:
            assert (
                st.traffic["argument 0"][0] <= 1.15 * grad.numel() * grad.element_size() + 32 * shape[2] * c
            )


def test_sectors(text):
    """At a row of SDAN's: the gradient is read once, in whole sectors."""
    for layout, shape in ((torch.contiguous_format, (1, 1, 12, 320)), (torch.channels_last, (1, 28, 8, 9))):
        grad = random(*shape).contiguous(memory_format=layout)
        weights = [random(shape[1], 1, *k, seed=i) for i, k in enumerate([(1, 11), (11, 1)] * 2)]
        stages = ((11, 11, 1, 1), (11, 11, 6, 6))
        _, (st,) = bias_gradients(text, grad, weights, stages, shape[2])
        assert st.traffic["argument 0"][0] == grad.numel() * 4
        assert st.load_efficiency >= 0.85, st.report()
