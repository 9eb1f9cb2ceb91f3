"""What the Triton tests share: the error bound, the launcher that interprets PTX, and ahead-of-time compilation."""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

sys.path.insert(0, str(Path(__file__).parents[1] / "ptxrun"))

from sdan_fast.kernels.launch import launched_by

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
CUDA_TARGETS = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KiB a block


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
        copies = [v.detach().to(t).requires_grad_() if isinstance(v, Tensor) else v for v in leaves]
        y = reference(*tree_unflatten(copies, spec), **kwargs)
        grads = (
            torch.autograd.grad(y, [copies[i] for i in wanted], grad_output.to(t))
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
        stats.append(st)

    with launched_by(launcher):
        yield stats


def fma_share(stats: Any) -> float:
    """Share of FMA and MMA among the executed warp instructions."""
    hits = sum(n for op, n in stats.opcodes.items() if op.startswith(("fma.", "mma.")))
    return hits / max(stats.total_warp_instructions, 1)


# -- ahead-of-time compilation ---------------------------------------------------------------------------------------


@dataclass
class Compiled:
    """One kernel in one configuration for one target."""

    name: str
    target: Any
    asm: dict[str, Any]
    shared: int
    constexprs: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """Registers, stack and local memory of a CUDA kernel, from cuobjdump; a spill shows as stack or local bytes."""
        text = run_tool("cuobjdump", "--dump-resource-usage", self.asm["cubin"])
        return {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}

    @functools.cached_property
    def sass(self) -> str:
        """The disassembly of a CUDA kernel."""
        return run_tool("cuobjdump", "--dump-sass", self.asm["cubin"])

    def assert_clean(self) -> None:
        """No spill, and shared memory within the architecture's limit."""
        assert self.shared <= SHARED_LIMIT[self.target] * 1024, (
            f"{self.name}: {self.shared} B of shared memory"
        )
        if "cubin" in self.asm:
            r = self.resources
            assert r["stack"] == 0 and r["local"] == 0, (
                f"{self.name} for {self.target} spills: {r} {self.constexprs}"
            )
        else:
            spilled = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", self.asm["amdgcn"])
            assert spilled and not any(map(int, spilled)), f"{self.name} for {self.target} spills {spilled}"


def run_tool(name: str, *args: Any) -> str:
    """Run one of the CUDA tools that ship in the triton package on a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(args[-1])
        f.flush()
        return subprocess.run([tool, *args[:-1], f.name], check=True, capture_output=True, text=True).stdout


_compiled: dict[Any, Compiled] = {}


def compile_ahead(target: int | str, kernel: Any, args: Sequence[Any], constexprs: dict[str, Any], num_warps: int,
                  num_stages: int) -> Compiled:  # fmt: skip
    """Compile a kernel for a compute capability or "gfx942", specialised as a launch with these arguments would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import native_specialize_impl

    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    backend = make_backend(gpu)
    bound = inspect.signature(kernel.fn).bind(*args, **constexprs)
    bound.apply_defaults()
    signature, constants, attrs = {}, {}, {}
    for n, (p, value) in enumerate(zip(kernel.params, bound.arguments.values())):
        if p.is_constexpr:
            signature[p.name], constants[p.name] = "constexpr", value
            continue
        ty, key = native_specialize_impl(backend, value, p.is_const, True, True)
        signature[p.name] = ty
        if ty == "constexpr":
            constants[p.name] = value
        elif isinstance(key, str) and "D" in key:
            attrs[(n,)] = backend.parse_attr(key)
    key = (kernel.fn.__name__, target, num_warps, num_stages, repr(sorted(signature.items())), repr(sorted(attrs)),
           repr(sorted(constants.items())))  # fmt: skip
    if key not in _compiled:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        done = triton.compile(source, target=gpu, options={"num_warps": num_warps, "num_stages": num_stages})
        _compiled[key] = Compiled(kernel.fn.__name__, target, done.asm, done.metadata.shared, constants)
    return _compiled[key]


@contextmanager
def compiled_for(*targets: int | str):
    """Compile every launch of the block for each target instead of running it; yields the list of what was compiled."""
    done: list[Compiled] = []

    def launcher(kernel, grid, *args, num_warps, num_stages, **constexprs):
        for target in targets:
            done.append(compile_ahead(target, kernel, args, constexprs, num_warps, num_stages))

    with launched_by(launcher):
        yield done


def wide(compiled: Compiled, what: str = "ld") -> bool:
    """Whether a CUDA kernel reads ("ld") or writes ("st") global memory in 128-bit accesses, in the PTX and in the
    SASS.
    """
    in_ptx = re.search(rf"{what}\.global[\w.]*\.v4\.b32|{what}\.global[\w.]*\.v2\.b64", compiled.asm["ptx"])
    in_sass = re.search(r"LDG\.E[\w.]*\.128" if what == "ld" else r"STG\.E[\w.]*\.128", compiled.sass)
    return bool(in_ptx and in_sass)


# -- many compilations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What a launch would compile."""

    kernel: Any
    args: tuple
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Built:
    """What the checks need of a compiled kernel, small enough to come back from another process."""

    name: str
    target: Any
    constexprs: str
    error: str  # what is wrong with it, or nothing
    wide: tuple[bool, bool]  # 128-bit loads and stores


@contextmanager
def launches_of():
    """Collect the launches of the block; nothing runs."""
    found: list[Launch] = []

    def launcher(kernel, grid, *args, num_warps, num_stages, **constexprs):
        found.append(Launch(kernel, args, constexprs, num_warps, num_stages))

    with launched_by(launcher):
        yield found


_jobs: list[tuple[Any, Launch]] = []  # what the workers, which are forked off afterwards, find here by index


def _build(index: int) -> Built:
    target, job = _jobs[index]
    done = compile_ahead(target, job.kernel, job.args, job.constexprs, job.num_warps, job.num_stages)
    try:
        done.assert_clean()
        error = ""
    except AssertionError as failure:
        error = str(failure)
    accesses = (wide(done, "ld"), wide(done, "st")) if isinstance(target, int) else (True, True)
    return Built(done.name, target, str(done.constexprs), error, accesses)


def build_all(launches: Sequence[Launch], *targets: int | str) -> list[Built]:
    """Compile every different launch for each target, on all cores."""
    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor

    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 80, 32))
    different: dict[str, Launch] = {}
    for job in launches:
        different.setdefault(compilation_key(backend, job), job)
    _jobs[:] = [(target, job) for target in targets for job in different.values()]
    cores = len(os.sched_getaffinity(0))
    # Threads do not compile in parallel: most of a compilation is Python. The workers only compile.
    with ProcessPoolExecutor(min(cores, len(_jobs)), multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_build, range(len(_jobs)), chunksize=1))


def compilation_key(backend: Any, job: Launch) -> str:
    """Equal for launches that compile to the same code."""
    from triton.runtime.jit import native_specialize_impl

    bound = inspect.signature(job.kernel.fn).bind(*job.args, **job.constexprs)
    bound.apply_defaults()
    parts = [
        repr(value)
        if p.is_constexpr
        else repr(native_specialize_impl(backend, value, p.is_const, True, True))
        for p, value in zip(job.kernel.params, bound.arguments.values())
    ]
    return f"{job.kernel.fn.__name__} {job.num_warps} {job.num_stages} {' '.join(parts)}"
