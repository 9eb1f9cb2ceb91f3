"""Runs the ops through their CUDA kernels on the host and holds them to the project's error bound."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import host_build
import torch
from torch import Tensor

from sdan_fast.ops import _cuda
from sdan_fast.ops._op import OPS, Op, attach_compiled, output_format

ORDERS = {"normal": (0, 0), "reversed": (1, 0), "shuffled": (2, 20)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("contiguous", "channels_last")


@functools.cache
def library(sanitize: bool = False) -> ctypes.CDLL:
    """The kernels, built, loaded and known to torch as the `.cuda_host` overloads."""
    path = host_build.build_kernels(sanitize)
    for op in OPS.values():
        if "cuda_host" not in op.overloads:
            op.define("cuda_host")
            op.define_backward("cuda_host")
    torch.ops.load_library(str(path))
    _cuda.attach("cuda_host", "CPU")
    attach_compiled("cuda_host", "CPU")
    return ctypes.CDLL(str(path))


@contextlib.contextmanager
def order(name: str) -> Iterator[None]:
    """Threads take their turns in this order."""
    lib = library()
    kind, seed = ORDERS[name]
    lib.sdan_cuda_host_set_order(kind, ctypes.c_ulonglong(seed))
    try:
        yield
    finally:
        lib.sdan_cuda_host_set_order(0, ctypes.c_ulonglong(0))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Everything that torch allocates is NaN, so that an element which no kernel wrote shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """`t` as "contiguous", "channels_last", "shifted" (misaligned), "sliced" or "transposed"."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "shifted":
        whole = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
        whole[1:] = t.flatten()
        return whole[1:].view(t.shape)
    if layout == "sliced":
        whole = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        whole[..., ::2] = t
        return whole[..., ::2]
    assert layout == "transposed"
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def assert_bound(got: Tensor, eager: Tensor, exact: Tensor, what: str = "") -> None:
    """max|err| <= 2 max|eager's err| + 2 eps max|exact|, and nothing that is not finite where exact is."""
    assert got.dtype == eager.dtype and got.shape == exact.shape, (what, got.dtype, got.shape, exact.shape)
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item()
    allowed += 2 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def _double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double()
    return [_double(t) for t in x] if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor) else x


def _eager_backward(
    op: Op,
    grad: Tensor,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    mask: Sequence[bool],
    exact: Sequence[Any],
) -> list[Tensor | None]:
    """Eager's gradients. In float32 eager is several programs, with and without oneDNN in each memory format, and any
    may be lucky on a few elements: of each gradient the least exact one."""
    several = grad.dtype == torch.float32 and grad.dim() == 4
    runs = []

    def as_image(t: Any, name: str) -> Any:
        image = isinstance(t, Tensor) and (t.shape[:1], t.shape[2:]) == (grad.shape[:1], grad.shape[2:])
        return laid_out(t, name) if image and name != "as it is" else t

    before = torch._C._get_mkldnn_enabled()
    try:
        for onednn in (True, False) if several else (before,):
            torch._C._set_mkldnn_enabled(onednn)
            for name in FORMATS if several else ("as it is",):
                images = [as_image(t, name) for t in (grad, *args)]
                runs.append(op.reference_backward(*images, **kwargs, output_mask=mask))
    finally:
        torch._C._set_mkldnn_enabled(before)

    def error(candidate: tuple[Tensor | None, Tensor | None]) -> float:
        got, want = candidate
        return 0.0 if got is None or want is None or not got.numel() else (got - want).abs().max().item()

    return [max(((g, e) for g in gs), key=error)[0] for e, *gs in zip(exact, *runs, strict=True)]


def check(
    op: Op,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    grad: Tensor | None = None,
    masks: Sequence[Sequence[bool]] | None = None,
    orders: Sequence[str] = ("normal",),
    forward: bool = True,
    overloads: Any = None,
) -> None:
    """Forward and, with `grad`, backward of the host-run CUDA kernels against float64, in each thread order.

    masks: the output masks to try; by default every gradient that exists. No result may depend on the order.
    """
    kwargs = kwargs or {}
    library()
    exact_args = [_double(a) for a in args]
    if forward:
        eager, exact = op.reference(*args, **kwargs), op.reference(*exact_args, **kwargs)
        results = []
        for name in orders:
            with order(name), poisoned():
                results.append(op.overloads["cuda_host"](*args, **kwargs))
        y = results[0]
        assert y.is_contiguous(memory_format=output_format(args[0])), y.stride()
        assert_bound(y, eager, exact, f"{op.name}")
        for other, name in zip(results[1:], orders[1:], strict=True):
            assert torch.equal(y.nan_to_num(1e9), other.nan_to_num(1e9)), (
                f"{op.name} depends on the order: {name}"
            )
    if grad is None:
        return
    slots = op.slots(args)
    for mask in masks or [[s is not None for s in slots]]:
        exacts = op.reference_backward(grad.double(), *exact_args, **kwargs, output_mask=mask)
        eagers = _eager_backward(op, grad, args, kwargs, mask, exacts)
        eagers, exacts = (
            [t for t, wanted in zip(ts, mask, strict=True) if wanted and t is not None]
            for ts in (eagers, exacts)
        )
        results = []
        for name in orders:
            with order(name), poisoned():
                results.append(
                    op.backward_overloads["cuda_host"](grad, *args, **kwargs, output_mask=list(mask))
                )
        likes = [s for s, wanted in zip(slots, mask, strict=True) if wanted]
        assert len(results[0]) == len(likes)
        names = [i for i, wanted in enumerate(mask) if wanted]
        for i, (got, eager, exact, like) in enumerate(zip(results[0], eagers, exacts, likes, strict=True)):
            what = f"{op.name}_backward, gradient {names[i]}"
            assert got.is_contiguous(memory_format=output_format(like)), (what, got.stride())
            assert_bound(got, eager, exact, what)
            for other in results[1:]:
                assert torch.equal(got.nan_to_num(1e9), other[i].nan_to_num(1e9)), (
                    f"{what} depends on the order"
                )
