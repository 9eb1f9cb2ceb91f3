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
def gelu_tail(x):
    """(n, Phi(n)) with n = -|x| and Phi the normal distribution, good to 1e-8 beside the roundings of float32.

    GELU(x) = max(x, 0) + n Phi(n), in which nothing cancels. Phi is 2 to a polynomial (scripts/fit_gelu.py); near zero,
    where an ex2.approx at its worst would cost more than PyTorch's erf errs, its Taylor series. Beyond -16, where Phi
    is zero in float32, n stays, so that infinities give no NaN.
    """
    n = tl.maximum(-tl.abs(x), -16.0, propagate_nan=tl.PropagateNan.ALL)
    p = 1.36958175e-4 + n * (-1.86170206e-4 + n * (-3.93754384e-5 + n * -2.83471811e-6))
    p = 1.15110521 + n * (-0.459208196 + n * (0.0524961896 + n * (0.00706344392 + n * p)))
    s = n * n
    near = -0.0664903801 + s * (0.00997355701 + s * (-0.00118732822 + s * 1.15434687e-4))
    near = 0.5 + n * (0.398942280 + s * near)
    return n, tl.where(n > -0.5, near, tl.exp2(-1.0 + n * p))


@jit
def activate(x, KIND: tl.constexpr):
    """activation(x) for float32 x; the GELU is the exact one (erf)."""
    if KIND == "gelu":
        n, phi = gelu_tail(x)
        x = tl.maximum(x, 0.0) + n * phi
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
    if KIND == "gelu":  # the compiler forms gelu_tail once where the value is wanted too
        n, phi = gelu_tail(x)
        slope = phi + n * 0.3989422804014327 * tl.exp2(n * n * -0.7213475204444817)  # GELU'(n)
        grad = grad * tl.where(x > 0.0, 1.0 - slope, slope)
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
