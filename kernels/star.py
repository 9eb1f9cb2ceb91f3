"""Triton kernels of the star, outer(activation(a) * b): one pass forward, one pass backward, nothing saved but a and
b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .heuristics import elementwise_block
from .launch import ceil_div, launch, output_format, unavailable

ACTIVATIONS = ("none", "gelu", "relu6", "relu", "silu")


@jit
def activate(x, KIND: tl.constexpr):
    """activation(x) for float32 x; the GELU is the exact one (erf)."""
    if KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "relu6":
        x = tl.minimum(
            tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL
        )
    elif KIND == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "silu":
        x = tl.div_rn(
            x, 1.0 + tl.exp(-x)
        )  # the default division is off by 2 ulp, half of float32's error bound
    return x


@jit
def activate_grad(x, grad, KIND: tl.constexpr):
    """grad * activation'(x) for float32 x, with PyTorch's choice of derivative at the kinks."""
    if KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        grad = grad * (cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif KIND == "relu6":
        grad = tl.where((x > 0.0) & (x < 6.0), grad, 0.0)
    elif KIND == "relu":
        grad = tl.where(x > 0.0, grad, 0.0)
    elif KIND == "silu":
        s = tl.div_rn(1.0, 1.0 + tl.exp(-x))
        grad = grad * (s * (1.0 + x * (1.0 - s)))
    return grad


@jit
def _star_block(a_ptr, b_ptr, y_ptr, offsets, mask, ACTIVATION: tl.constexpr, OUTER: tl.constexpr):
    a = tl.load(a_ptr + offsets, mask).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask).to(tl.float32)
    y = activate(activate(a, ACTIVATION) * b, OUTER)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


@jit
def star_forward(a_ptr, b_ptr, y_ptr, n, ACTIVATION: tl.constexpr, OUTER: tl.constexpr, BLOCK: tl.constexpr):
    """y = outer(activation(a) * b) over n elements that lie densely in memory in one common order."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    a_ptr += first
    b_ptr += first
    y_ptr += first
    # Only the last block is masked: a mask that is not uniform over 16 bytes would cost every block its wide loads.
    if first + BLOCK <= n:
        _star_block(a_ptr, b_ptr, y_ptr, offsets, None, ACTIVATION, OUTER)
    else:
        _star_block(a_ptr, b_ptr, y_ptr, offsets, offsets < n - first, ACTIVATION, OUTER)


@jit
def _star_grad_block(
    g_ptr, a_ptr, b_ptr, ga_ptr, gb_ptr, offsets, mask,
    ACTIVATION: tl.constexpr, OUTER: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
):  # fmt: skip
    g = tl.load(g_ptr + offsets, mask).to(tl.float32)
    a = tl.load(a_ptr + offsets, mask).to(tl.float32)
    if NEED_A or OUTER != "none":
        b = tl.load(b_ptr + offsets, mask).to(tl.float32)
    if NEED_B or OUTER != "none":
        act = activate(a, ACTIVATION)
    if OUTER != "none":
        g = activate_grad(act * b, g, OUTER)
    if NEED_A:
        tl.store(ga_ptr + offsets, activate_grad(a, g * b, ACTIVATION).to(ga_ptr.dtype.element_ty), mask)
    if NEED_B:
        tl.store(gb_ptr + offsets, (g * act).to(gb_ptr.dtype.element_ty), mask)


@jit
def star_backward(
    g_ptr, a_ptr, b_ptr, ga_ptr, gb_ptr, n,
    ACTIVATION: tl.constexpr, OUTER: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the star in a and in b, as asked for, from the gradient of y; activation(a) is recomputed."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    g_ptr += first
    a_ptr += first
    b_ptr += first
    ga_ptr += first
    gb_ptr += first
    if first + BLOCK <= n:
        _star_grad_block(
            g_ptr, a_ptr, b_ptr, ga_ptr, gb_ptr, offsets, None, ACTIVATION, OUTER, NEED_A, NEED_B
        )
    else:
        mask = offsets < n - first
        _star_grad_block(
            g_ptr, a_ptr, b_ptr, ga_ptr, gb_ptr, offsets, mask, ACTIVATION, OUTER, NEED_A, NEED_B
        )


def supports(a: Tensor, b: Tensor, *, activation: str = "gelu", outer: str = "none") -> str | None:
    """None if the kernels can run this call, else the reason why not."""
    if a.shape != b.shape:
        return f"a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
    for name, kind in (("activation", activation), ("outer", outer)):
        if kind not in ACTIVATIONS:
            return f"{name} must be one of {', '.join(ACTIVATIONS)}, got {kind!r}"
    return unavailable(a, b)


def forward(a: Tensor, b: Tensor, *, activation: str = "gelu", outer: str = "none") -> Tensor:
    """outer(activation(a) * b) for a and b of one shape (any) and dtype (float32, bfloat16, float16); `a`'s memory
    format.

    One launch. Inputs that do not lie densely in the output's memory format are copied into it first.
    """
    fmt = output_format(a)
    a, b = a.contiguous(memory_format=fmt), b.contiguous(memory_format=fmt)
    y = torch.empty_like(a, memory_format=fmt)
    if (n := a.numel()) > 0:
        block, warps = elementwise_block()
        launch(star_forward, (ceil_div(n, block),), a, b, y, n,
               ACTIVATION=activation, OUTER=outer, BLOCK=block, num_warps=warps)  # fmt: skip
    return y


def backward(
    grad_output: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    activation: str = "gelu",
    outer: str = "none",
    output_mask: list[bool],
) -> list[Tensor]:
    """Gradients in [a, b] where `output_mask` asks for them, from the gradient of the result; `a`'s memory format,
    one launch.
    """
    need_a, need_b = output_mask
    fmt = output_format(a)
    g, a, b = (t.contiguous(memory_format=fmt) for t in (grad_output, a, b))
    grads = [torch.empty_like(a, memory_format=fmt) for need in (need_a, need_b) if need]
    if grads and (n := a.numel()) > 0:
        block, warps = elementwise_block()
        launch(star_backward, (ceil_div(n, block),), g, a, b, grads[0], grads[-1], n,
               ACTIVATION=activation, OUTER=outer, NEED_A=need_a, NEED_B=need_b, BLOCK=block,
               num_warps=warps)  # fmt: skip
    return grads
