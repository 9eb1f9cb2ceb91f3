"""Block sizes and warps of every kernel, from channel counts and filter sizes alone.

Image sizes enter only through a few coarse steps: a compiled function with dynamic sizes then guards on a threshold, and does
not recompile for each size.
"""

from __future__ import annotations


def elementwise_block() -> tuple[int, int]:
    """(elements per program, warps) of an element-wise kernel: 8 per thread, 128 bits of a 16-bit type."""
    return 1024, 4
