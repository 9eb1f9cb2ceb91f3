"""The one place that imports Triton, so that every module of this package also imports where Triton is missing."""

from __future__ import annotations

import os
from typing import Any

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except (
    ImportError
):  # macOS, Windows, CPU-only installs: the functions below exist, `supports` says why not to call them
    triton = tl = None

    def jit(fn: Any) -> Any:
        """Stand in for `triton.jit`; the result is never launched."""
        return fn


# What kernels may ask, as a global constant: the interpreter's own tl.dot of bfloat16 multiplies bit patterns.
INTERPRETED: Any = os.environ.get("TRITON_INTERPRET", "0") == "1"
if tl is not None:
    INTERPRETED = tl.constexpr(INTERPRETED)


def interpreting(kernel: Any) -> bool:
    """Whether a kernel was decorated under TRITON_INTERPRET=1, and so runs on CPU tensors in NumPy."""
    return type(kernel).__name__ == "InterpretedFunction"
