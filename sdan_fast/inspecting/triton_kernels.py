"""Compiles Triton kernels ahead of time exactly as a launch would, for any target and without a GPU.

A launch is caught by `sdan_fast.kernels.launch.launched_by`. Its key says what the compiled code depends on (the
kernel's source and that of what it calls, without comments and line numbers; types, alignment, constants; the target),
so that an unchanged kernel need not be compiled again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sdan_fast.kernels.launch import launched_by

from .devices import AMD_SHARED_BLOCK, ARCHITECTURES
from .sass import Code, parse
from .tools import disassembly, resource_usage

CUDA_TARGETS = (80, 86, 89, 90, 100, 120)
TARGETS: tuple[int | str, ...] = (*CUDA_TARGETS, "gfx942")


def shared_limit(target: int | str) -> int:
    """Bytes of shared memory that a block may use."""
    return AMD_SHARED_BLOCK[target] if isinstance(target, str) else ARCHITECTURES[target].shared_block


@dataclass
class Compiled:
    """One kernel in one configuration for one target.

    names: those of the arguments that the compiled kernel takes, in order.
    """

    name: str
    target: Any
    asm: dict[str, Any]
    shared: int
    constexprs: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    key: str = ""
    metadata: Any = None
    names: list[str] = field(default_factory=list)

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """Registers, stack and local memory of a CUDA kernel; a spill shows as stack or local bytes."""
        (found,) = resource_usage(self.asm["cubin"]).values()
        return found

    @functools.cached_property
    def sass(self) -> str:
        """The disassembly of a CUDA kernel."""
        return disassembly(self.asm["cubin"])

    @functools.cached_property
    def code(self) -> Code:
        """The same, read."""
        return next(code for _, code in parse(self.sass))

    @property
    def amd_resources(self) -> dict[str, int]:
        """Registers and spills of an AMD kernel."""
        found = re.findall(r"\.((?:vgpr|sgpr)(?:_spill)?_count):\s*(\d+)", self.asm["amdgcn"])
        return {name: int(n) for name, n in found}

    def assert_clean(self) -> None:
        """No spill, and shared memory within the architecture's limit."""
        assert self.shared <= shared_limit(self.target), f"{self.name}: {self.shared} B of shared memory"
        if "cubin" in self.asm:
            r = self.resources
            assert r["stack"] == 0 and r["local"] == 0, (
                f"{self.name} for {self.target} spills: {r} {self.constexprs}"
            )
        else:
            spilled = {k: n for k, n in self.amd_resources.items() if "spill" in k}
            assert spilled and not any(spilled.values()), f"{self.name} for {self.target} spills {spilled}"


@dataclass(frozen=True)
class Specialized:
    """What the JIT would make of one launch's arguments: the compiler's input."""

    kernel: Any
    target: int | str
    signature: dict[str, str]
    constants: dict[str, Any]
    attrs: dict[Any, Any]
    warps: int
    stages: int
    passed: list[Any]
    names: list[str]

    @functools.cached_property
    def key(self) -> str:
        """A hash of everything that the machine code depends on, but for the toolchain."""
        parts = (
            self.target, self.warps, self.stages, sorted(self.signature.items()), sorted(self.attrs),
            sorted(self.constants.items()), source_hash(self.kernel),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


_hashes: dict[int, str] = {}


def source_hash(kernel: Any) -> str:
    """A hash of a kernel's source, of the functions that it calls, and of the constants that it reads.

    Comments, formatting and line numbers do not count (Triton's own key has them, for its line tables).
    """
    if id(kernel) not in _hashes:
        _hashes[id(kernel)] = ""  # what a function that calls itself finds
        digest = hashlib.sha256()
        function = getattr(kernel, "fn", kernel)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        digest.update(ast.dump(tree).encode())
        for name, value in sorted(_references(tree, function.__globals__).items()):
            if hasattr(value, "fn") and inspect.isfunction(
                value.fn
            ):  # another kernel, or a compile-time function
                digest.update(f"{name}={source_hash(value)}".encode())
            elif type(value).__name__ == "constexpr" or isinstance(value, (int, float, str, bool, tuple)):
                digest.update(f"{name}={value!r}".encode())
        _hashes[id(kernel)] = digest.hexdigest()
    return _hashes[id(kernel)]


def _references(tree: ast.AST, scope: dict[str, Any]) -> dict[str, Any]:
    """The module-level values that code names, also as attributes of modules."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in scope:
            found[node.id] = scope[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = scope.get(node.value.id)
            if inspect.ismodule(owner) and not owner.__name__.startswith("triton.language"):
                found[f"{node.value.id}.{node.attr}"] = getattr(owner, node.attr, None)
    return found


def specialize(target: int | str, kernel: Any, args: Sequence[Any], constexprs: dict[str, Any], num_warps: int,
               num_stages: int) -> Specialized:  # fmt: skip
    """A launch's arguments as the JIT would specialise them for a compute capability or "gfx942"."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import native_specialize_impl

    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    backend = make_backend(gpu)
    bound = inspect.signature(kernel.fn).bind(*args, **constexprs)
    bound.apply_defaults()
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[Any, Any] = {}
    passed, names = [], []
    for n, (p, value) in enumerate(zip(kernel.params, bound.arguments.values())):
        if p.is_constexpr:
            signature[p.name], constants[p.name] = "constexpr", value
            continue
        ty, key = native_specialize_impl(
            backend, value, p.is_const, not p.do_not_specialize, not p.do_not_specialize_on_alignment
        )
        signature[p.name] = ty
        if ty == "constexpr":
            constants[p.name] = value
            continue
        if isinstance(key, str) and "D" in key:
            attrs[(n,)] = backend.parse_attr(key)
        passed.append(value)
        names.append(p.name)
    return Specialized(kernel, target, signature, constants, attrs, num_warps, num_stages, passed, names)


_compiled: dict[str, Compiled] = {}


def compile_specialized(s: Specialized) -> Compiled:
    """Compile what `specialize` made, once in a process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if s.key not in _compiled:
        gpu = GPUTarget("hip", s.target, 64) if isinstance(s.target, str) else GPUTarget("cuda", s.target, 32)
        source = ASTSource(fn=s.kernel, signature=s.signature, constexprs=s.constants, attrs=s.attrs)
        done = triton.compile(source, target=gpu, options={"num_warps": s.warps, "num_stages": s.stages})
        _compiled[s.key] = Compiled(
            s.kernel.fn.__name__, s.target, done.asm, done.metadata.shared, s.constants, s.warps, s.key,
            done.metadata, s.names,
        )  # fmt: skip
    return _compiled[s.key]


def compile_ahead(target: int | str, kernel: Any, args: Sequence[Any], constexprs: dict[str, Any], num_warps: int,
                  num_stages: int) -> Compiled:  # fmt: skip
    """Compile a kernel for a compute capability or "gfx942", specialised as a launch with these arguments would be."""
    return compile_specialized(specialize(target, kernel, args, constexprs, num_warps, num_stages))


@contextmanager
def compiled_for(*targets: int | str) -> Iterator[list[Compiled]]:
    """Compile every launch of the block for each target instead of running it; yields the list of what was compiled."""
    done: list[Compiled] = []

    def launcher(
        kernel: Any, grid: Any, *args: Any, num_warps: int, num_stages: int, **constexprs: Any
    ) -> None:
        for target in targets:
            done.append(compile_ahead(target, kernel, args, constexprs, num_warps, num_stages))

    with launched_by(launcher):
        yield done


@dataclass(frozen=True)
class Launch:
    """One launch that was caught instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def specialized(self, target: int | str) -> Specialized:
        return specialize(target, self.kernel, self.args, self.constexprs, self.warps, self.stages)


@contextmanager
def catching() -> Iterator[list[Launch]]:
    """Collect the launches of the block, in order; nothing runs, so its results hold no values."""
    caught: list[Launch] = []

    def launcher(
        kernel: Any, grid: Any, *args: Any, num_warps: int, num_stages: int, **constexprs: Any
    ) -> None:
        triple = tuple(int(n) for n in grid) + (1,) * (3 - len(grid))
        caught.append(Launch(kernel, triple, args, constexprs, num_warps, num_stages))

    with launched_by(launcher):
        yield caught


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """The launches of a call; see `catching`."""
    with catching() as caught:
        call()
    return caught


def wide(compiled: Compiled, what: str = "ld") -> bool:
    """Whether a CUDA kernel reads ("ld") or writes ("st") global memory in 128-bit accesses, in the PTX and in the
    SASS.
    """
    in_ptx = re.search(rf"{what}\.global[\w.]*\.v4\.b32|{what}\.global[\w.]*\.v2\.b64", compiled.asm["ptx"])
    return bool(in_ptx) and compiled.code.widest("LDG" if what == "ld" else "STG") >= 128
