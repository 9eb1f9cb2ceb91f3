"""What the Triton tests share: the error bound and the launcher that interprets PTX; ahead-of-time compilation is the
package's own, as `sdan-fast inspect triton` does it.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

sys.path.insert(0, str(Path(__file__).parents[1] / "ptxrun"))

from sdan_fast.inspecting.triton_kernels import (
    CUDA_TARGETS,
    Compiled,
    Launch,
    catching,
    compile_ahead,
    compile_specialized,
    compiled_for,
    wide,
)
from sdan_fast.kernels.launch import launched_by

__all__ = [
    "CUDA_TARGETS", "DTYPES", "FORMATS", "Built", "Compiled", "assert_bound", "assert_gelu_at_every_magnitude",
    "build_all", "catching", "check_op", "compile_ahead", "compiled_for", "fma_share", "poisoned",
    "ptx_interpreted", "wide",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)


# -- numbers ---------------------------------------------------------------------------------------------------------


def assert_bound(got: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """max|err| <= 2 max|eager's err| + 2 eps(dtype) max|ref|, against float64; shapes, dtype and finiteness too."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == dtype, f"{what}: dtype {got.dtype}"
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    bound = (
        2 * (eager.double() - exact).abs().max().item()
        + 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    )
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


def short_intervals(most: float) -> tuple[Tensor, Tensor]:
    """Edges of intervals from 1e-30 to `most` on either side, and 32 float32 values in each of them."""
    magnitudes = torch.logspace(-30, math.log10(most), 150, dtype=torch.float64)
    edges = torch.cat([-magnitudes.flip(0), magnitudes, torch.linspace(-7, 7, 141, dtype=torch.float64)])
    low, high = edges[:-1, None], edges[1:, None]
    return edges, (low + (high - low) * torch.linspace(0, 1, 32, dtype=torch.float64)).float()


def assert_gelu_at_every_magnitude(star: Any) -> None:
    """GELU and its derivative within the error bound in each of many short intervals, and at the ends of float32.

    Exact from the logarithm of the normal distribution: float64's 1 + erf cancels as float32's does. The last interval
    ends where the tail is denormal in float32.
    """
    edges, a = short_intervals(13)
    ones, wide = torch.ones_like(a), a.double()
    phi = torch.exp(torch.special.log_ndtr(wide))
    with poisoned():
        value = star.forward(a, ones)
        slope, again = star.backward(ones, a, ones, output_mask=[True, True])
    assert torch.equal(value, again)
    leaf = a.clone().requires_grad_()
    eager = torch.nn.functional.gelu(leaf)
    (eager_slope,) = torch.autograd.grad(eager, leaf, ones)
    exact_slope = phi + wide * torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    for got, plain, exact in ((value, eager.detach(), wide * phi), (slope, eager_slope, exact_slope)):
        error, plain_error = ((t.double() - exact).abs().amax(1) for t in (got, plain))
        bound = 2 * plain_error + 2 * torch.finfo(torch.float32).eps * exact.abs().amax(1)
        over = (error > bound).nonzero().flatten()
        assert not len(over), (edges[over[0]], error[over[0]], bound[over[0]])
    inf, nan = math.inf, math.nan
    ends = torch.tensor([inf, -inf, nan, 0.0, -0.0, 3e38, -3e38, 17.0, -17.0])
    value = star.forward(ends, torch.ones_like(ends))
    (slope,) = star.backward(torch.ones_like(ends), ends, torch.ones_like(ends), output_mask=[True, False])
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-6, equal_nan=True)
    same(value, torch.tensor([inf, 0.0, nan, 0.0, 0.0, 3e38, 0.0, 17.0, 0.0]))
    same(slope, torch.tensor([1.0, 0.0, nan, 0.5, 0.5, 1.0, 0.0, 1.0, 0.0]))


@contextmanager
def poisoned():
    """Fill every torch.empty with NaN, so that an element that no kernel wrote cannot pass."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_op(op: Any, reference: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any] | None = None, *,
             backward: bool = True, needed: Sequence[bool] | None = None) -> None:  # fmt: skip
    """Forward and backward of a kernel module against the float64 reference, at the error bound.

    args: the op's positional arguments (tensors, None, lists of tensors). needed: which slots' gradients to ask for
    (default all); the order of the answers must be the order of the slots.
    """
    kwargs = kwargs or {}
    leaves, spec = tree_flatten(list(args))
    slots = [i for i, v in enumerate(leaves) if v is None or isinstance(v, Tensor)]
    mask = [leaves[i] is not None and (needed is None or needed[n]) for n, i in enumerate(slots)]
    wanted = [i for i, m in zip(slots, mask) if m]
    dtype = leaves[slots[0]].dtype
    assert (reason := op.supports(*args, **kwargs)) is None, reason
    with poisoned():
        got = op.forward(*args, **kwargs)
    grad_output = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad_output = torch.empty_like(got, memory_format=torch.preserve_format).copy_(grad_output)
    results = []
    for t in (torch.float64, dtype):
        # Contiguous, as PyTorch's own 16-bit channels_last backward is not always right (docs/decisions.md).
        copies = [
            v.detach().to(t).contiguous().requires_grad_() if isinstance(v, Tensor) else v for v in leaves
        ]
        y = reference(*tree_unflatten(copies, spec), **kwargs)
        grads = (
            torch.autograd.grad(y, [copies[i] for i in wanted], grad_output.to(t).contiguous())
            if backward and wanted
            else ()
        )
        results.append((y.detach(), grads))
    (exact, exact_grads), (eager, eager_grads) = results
    assert_bound(got, eager, exact, dtype, "forward")
    x = leaves[slots[0]]
    channels_last = (
        x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if backward:
        with poisoned():
            grads = op.backward(grad_output, *args, **kwargs, output_mask=mask)
        assert len(grads) == len(wanted)
        for i, a, b, c in zip(wanted, grads, eager_grads, exact_grads):
            assert_bound(a, b, c, dtype, f"gradient of leaf {i}")


# -- the compiled PTX, executed --------------------------------------------------------------------------------------


@contextmanager
def ptx_interpreted(cc: int = 80, **run_options: Any):
    """Run every launch of the block as compiled PTX on CPU tensors; yields the list of their Stats."""
    from ptxrun import run_triton

    stats: list[Any] = []

    def launcher(kernel, grid, *args, num_warps, num_stages, **constexprs):
        st = run_triton(kernel, grid, *args, num_warps=num_warps, num_stages=num_stages, cc=cc, run_options=run_options,
                        **constexprs)  # fmt: skip
        st.constexprs = constexprs
        stats.append(st)

    with launched_by(launcher):
        yield stats


def fma_share(stats: Any) -> float:
    """Share of FMA and MMA among the executed warp instructions, PTX's moves left out: see docs/inspect.md."""
    hits = sum(n for op, n in stats.opcodes.items() if op.startswith(("fma.", "mma.")))
    return hits / max(sum(n for kind, n in stats.warp_instructions.items() if kind != "mov"), 1)


# -- many compilations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """What the checks need of a compiled kernel, small enough to come back from another process."""

    name: str
    target: Any
    constexprs: str
    error: str  # what is wrong with it, or nothing
    wide: tuple[bool, bool]  # 128-bit loads and stores


_jobs: list[tuple[Any, Launch]] = []  # what the workers, which are forked off afterwards, find here by index


def _build(index: int) -> Built:
    target, job = _jobs[index]
    done = compile_specialized(job.specialized(target))
    try:
        done.assert_clean()
        error = ""
    except AssertionError as failure:
        error = str(failure)
    accesses = (wide(done, "ld"), wide(done, "st")) if isinstance(target, int) else (True, True)
    return Built(done.name, target, str(done.constexprs), error, accesses)


def build_all(launches: Sequence[Launch], *targets: int | str) -> list[Built]:
    """Compile every different launch for each target, on all cores."""
    different = {job.specialized(80).key: job for job in reversed(launches)}
    _jobs[:] = [(target, job) for target in targets for job in different.values()]
    cores = len(os.sched_getaffinity(0))
    # Threads do not compile in parallel: most of a compilation is Python. The workers only compile.
    with ProcessPoolExecutor(min(cores, len(_jobs)), multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_build, range(len(_jobs)), chunksize=1))
