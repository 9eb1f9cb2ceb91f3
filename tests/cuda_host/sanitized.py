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

if __name__ == "__main__":
    library(sanitize=True)
    host_harness.library = lambda sanitize=True: library(True)
    for name, call in CALLS.items():
        call()
        print(f"{name}: clean", flush=True)
