"""A program for the sanitizers: the host-run CUDA kernels on a few awkward shapes, in each thread order.

Run by test_sanitizers.py with AddressSanitizer preloaded; an error ends the process.
"""

from __future__ import annotations

from collections.abc import Callable

import host_harness
from host_harness import ORDERS, check, laid_out, library, random

import sdan_fast.ops._op as _op

ORDER_NAMES = tuple(ORDERS)
CALLS: dict[str, Callable[[], None]] = {}


def star() -> None:
    import torch

    for shape, layout in (
        ((2, 3, 5, 7), "contiguous"),
        ((1, 8, 4, 8), "channels_last"),
        ((1, 1, 1, 1), "shifted"),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            a, b, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in range(3))
            check(_op.OPS["star"], (a, b), {"outer": "silu"}, grad=g, orders=ORDER_NAMES)


CALLS["star"] = star


def depthwise_conv2d() -> None:
    import torch

    kernels = (((1, 7), 2), ((9, 1), 2), ((3, 3), 1), ((5, 7), 2))
    for shape, layout, some in (
        ((1, 3, 9, 13), "contiguous", kernels),
        ((1, 2, 5, 8), "channels_last", kernels),
        ((1, 1, 4, 16), "shifted", kernels),
        ((1, 20, 7, 18), "channels_last", (((5, 5), 3),)),  # tensor cores
    ):
        for kernel, dilation in some:
            for dtype in (torch.float32, torch.bfloat16):
                x, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in (0, 1))
                weight, bias = (
                    random(shape[1], 1, *kernel, dtype=dtype, seed=2),
                    random(shape[1], dtype=dtype, seed=3),
                )
                args = (x, weight, bias)
                check(
                    _op.OPS["depthwise_conv2d"],
                    args,
                    {"dilation": [dilation] * 2},
                    grad=g,
                    orders=("shuffled",),
                )


CALLS["depthwise_conv2d"] = depthwise_conv2d


def strip_conv_chain() -> None:
    import torch

    for shape, layout in (
        ((1, 3, 9, 13), "contiguous"),
        ((1, 2, 25, 8), "channels_last"),
        ((1, 1, 4, 16), "shifted"),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            x, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in (0, 1))
            c = shape[1]
            weights = [random(c, 1, *k, dtype=dtype, seed=2) for k in ((1, 5), (3, 1), (1, 3), (7, 1))]
            biases = [random(c, dtype=dtype, seed=3) for _ in range(3)]
            call = (x, weights, biases)
            kwargs = {"bias_mask": [True, True, False, True], "dilations": [1, 1, 2, 3]}
            check(_op.OPS["strip_conv_chain"], call, kwargs, grad=g, orders=("shuffled",))
            check(_op.OPS["gated_strip_conv_chain"], (g, *call), kwargs, orders=("shuffled",))


CALLS["strip_conv_chain"] = strip_conv_chain


def layer_norm2d() -> None:
    import torch

    for shape, layout in (
        ((2, 9, 3, 5), "contiguous"),
        ((1, 70, 4, 8), "channels_last"),
        ((1, 16, 4, 8), "shifted"),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            x, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in (0, 1))
            weight, bias = (random(shape[1], dtype=dtype, seed=s) for s in (2, 3))
            check(_op.OPS["layer_norm2d"], (x, weight, bias), grad=g, orders=("shuffled",))


CALLS["layer_norm2d"] = layer_norm2d


def star_conv() -> None:
    import torch

    for shape, layout in (
        ((2, 3, 5, 7), "contiguous"),
        ((1, 4, 5, 8), "contiguous"),
        ((1, 8, 6, 5), "channels_last"),
        ((1, 3, 1, 2), "channels_last"),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            c = shape[1]
            x, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in (0, 1))
            nw, nb, db = (random(c, dtype=dtype, seed=s) for s in (2, 3, 4))
            pw1, pw2 = (random(c, c, 1, 1, dtype=dtype, seed=s, scale=0.5) for s in (5, 6))
            args = (x, nw, nb, pw1, random(c, 1, 3, 3, dtype=dtype, seed=7), db, pw2)
            check(_op.OPS["star_conv"], args, {"outer": "gelu"}, grad=g, orders=("shuffled",))


CALLS["star_conv"] = star_conv


def pointwise_gate() -> None:
    import torch

    for shape, layout in (((2, 3, 5, 7), "contiguous"), ((1, 8, 4, 8), "channels_last")):
        for dtype in (torch.float32, torch.bfloat16):
            c = shape[1]
            u, x, g = (laid_out(random(*shape, dtype=dtype, seed=s), layout) for s in range(3))
            args = (u, x, random(c, c, 1, 1, dtype=dtype, seed=3, scale=0.5), random(c, dtype=dtype, seed=4))
            check(_op.OPS["pointwise_gate"], args, grad=g, orders=("shuffled",))


CALLS["pointwise_gate"] = pointwise_gate

if __name__ == "__main__":
    library(sanitize=True)
    host_harness.library = lambda sanitize=True: library(True)
    for name, call in CALLS.items():
        call()
        print(f"{name}: clean", flush=True)
