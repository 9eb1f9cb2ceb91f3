"""Run compiled PTX kernels on NumPy arrays, on a machine without a GPU.

The interpreter is functional, not timed: it computes what a kernel writes, and counts what it did (instructions by class,
global sectors, shared-memory bank conflicts). Every PTX register is a NumPy array over *lanes*: the threads of a batch of
thread blocks. Lanes that stand at the same instruction execute it together; the group with the smallest program counter
goes first, which reconverges structured control flow, and barriers park lanes until their block (or warp) has arrived.

    stats = run(ptx_text, None, grid, block, [x, w, y, 640, 480])      # NumPy arrays are changed in place
    stats = run_triton(kernel, grid, x, w, y, 640, BLOCK=256)          # a @triton.jit function, torch CPU tensors
    print(stats.report())

See README.md for what is covered and for how the model differs from a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import math
import struct
import time

import numpy as np

from ptxmachine import POISON, WARP, GlobalMemory, Machine
from ptxops import Decoder
from ptxparse import (
    U1,
    MemoryFault,
    Parser,
    PTXError,
    RaceError,
    Unsupported,
    bf16_to_f32,
    f32_to_bf16,
    is_type,
    type_bits,
)
from ptxstats import Stats

__all__ = [
    "MemoryFault",
    "PTXError",
    "Parser",
    "RaceError",
    "Stats",
    "Struct",
    "Unsupported",
    "bf16_to_f32",
    "compile_triton",
    "f32_to_bf16",
    "run",
    "run_triton",
]
SHARED_ALIGN = 16


class Struct:
    """A parameter passed by value that holds pointers: its bytes, and {offset: array that the pointer there is of}."""

    def __init__(self, raw, pointers):
        self.raw, self.pointers = bytes(raw), dict(pointers)

    def resolve(self, gmem):
        raw = bytearray(self.raw)
        for at, array in self.pointers.items():
            raw[at : at + 8] = int(gmem.address(array)).to_bytes(8, "little")
        return bytes(raw)


# A test launches few kernels many times, and reading one takes longer than running it.


@functools.lru_cache(maxsize=4)
def _parser(text):
    return Parser(text)


@functools.lru_cache(maxsize=32)
def _kernel(text, name, approx):
    """A kernel for launches with one `approx`, which stays decoded."""
    return _parser(text).kernel(name)


def _decode(k, approx):
    """Decode a kernel whose variables have their addresses."""
    collecting = gc.isenabled()
    gc.disable()  # many objects, none of them garbage
    try:
        Decoder(k, approx).decode()
    except Unsupported:
        _kernel.cache_clear()  # a half of it is decoded
        raise
    finally:
        if collecting:
            gc.enable()
    k.placed = [v.addr for v in k.vars.values()]


class _Launch:
    """What all batches of a launch share."""


def _triple(x):
    x = (x,) if isinstance(x, int) else tuple(int(v) for v in x)
    return x + (1,) * (3 - len(x))


def _param_bytes(value, size, t, gmem, name):
    if value is None:
        return bytes(size)
    if isinstance(value, Struct):
        return value.resolve(gmem)
    if isinstance(value, np.ndarray) and value.ndim:
        return int(gmem.address(value)).to_bytes(8, "little")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.item()
    if t[0] == "f" and isinstance(value, (int, float)):
        return struct.pack({4: "<f", 8: "<d", 2: "<e"}[size], value)
    if isinstance(value, int):
        return (value & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    raise TypeError(f"{name}: {type(value).__name__} for a .{t} parameter")


def run(
    ptx_text,
    kernel_name,
    grid,
    block,
    args,
    shared_bytes=0,
    *,
    symbols=None,
    batch_lanes=1 << 15,
    races="raise",
    approx="exact",
    max_steps=100_000_000,
    pad_args=False,
    names=None,
    blocks=None,
):
    """Run a PTX kernel. Arrays in `args` are changed in place.

    args: NumPy arrays for pointers (bfloat16 as uint16), ints, floats, NumPy scalars, bytes for structs (Struct for those that
    hold pointers), None for null.
    shared_bytes: dynamic shared memory. symbols: {module variable: array} copied in before the launch.
    batch_lanes: threads interpreted at once; blocks are grouped up to it (1: one block at a time).
    races: "raise", "record" (Stats.races) or "off". approx: "exact" rounds ex2.approx, rcp.approx and the like correctly,
    "worst" adds the PTX manual's error bound to them, in either direction. pad_args: trailing parameters that are missing are
    null. names: names of the arguments for messages. blocks: linear indices of the blocks to run (default: all of the grid);
    Stats then count those blocks alone.
    Raises MemoryFault, RaceError, Unsupported or PTXError.
    """
    began = time.perf_counter()
    k = _kernel(ptx_text, kernel_name, approx)
    la = _Launch()
    la.grid, la.block, la.races, la.max_steps, la.steps = (
        _triple(grid),
        _triple(block),
        races,
        max_steps,
        0,
    )
    if k.reqntid and k.reqntid != la.block:
        raise PTXError(f"{k.name} was compiled for blocks of {k.reqntid}, not {la.block}")
    if math.prod(la.block) > 1024:
        raise PTXError(f"a block of {math.prod(la.block)} threads; the limit is 1024")
    label = lambda n: names[n] if names and n < len(names) else f"argument {n}"
    arrays = [(label(n), a) for n, a in enumerate(args) if isinstance(a, np.ndarray) and a.ndim]
    for n, a in enumerate(args):
        if isinstance(a, Struct):
            arrays += [(f"{label(n)}+{at}", array) for at, array in a.pointers.items()]
    la.gmem = GlobalMemory(arrays)
    if len(args) != len(k.params) and not (pad_args and len(args) < len(k.params)):
        raise PTXError(f"{k.name} takes {len(k.params)} arguments, got {len(args)}")
    la.params = np.zeros(k.param_bytes + 16, U1)
    args = list(args) + [None] * (len(k.params) - len(args))
    for n, (value, (_, off, size, t)) in enumerate(zip(args, k.params)):
        raw = _param_bytes(value, size, t, la.gmem, label(n))
        if len(raw) != size:
            raise PTXError(f"argument {n} of {k.name} has {size} bytes, got {len(raw)}")
        la.params[off : off + size] = np.frombuffer(raw, U1)
    la.local_bytes = k.layout("local")
    static = -(-k.layout("shared") // SHARED_ALIGN) * SHARED_ALIGN
    la.dynamic_shared, la.shared_bytes = shared_bytes, static + shared_bytes
    for name, v in k.vars.items():
        if v.space == "shared" and v.extern:
            v.addr = static
        elif v.space in ("global", "const"):
            buf = np.zeros(max(v.size, 1), U1)
            if v.init:
                buf[: len(v.init)] = np.frombuffer(v.init, U1)
            if symbols and name in symbols:
                raw = np.ascontiguousarray(symbols[name]).view(U1).reshape(-1)
                buf[: raw.size] = raw
            v.addr = la.gmem.add(buf, f"variable {name}", writeable=v.space == "global")
    la.stats = Stats(k.name, la.grid, la.block, la.shared_bytes, la.local_bytes)
    placed = [v.addr for v in k.vars.values()]
    if k.placed is not None and k.placed != placed:  # other arguments: the module's variables have moved
        k = _parser(ptx_text).kernel(kernel_name)
        for v, addr in zip(k.vars.values(), placed):
            v.addr = addr
    if k.placed is None:
        _decode(k, approx)
    for s in k.sites:
        s.clear()
    sizes = [2 if "matrix" in s.kind else s.size for s in k.sites if s.space == "shared"] + [
        type_bits(next(t for t in i.mods if is_type(t))) // 8
        for i in k.code
        if i.op in ("ld", "st") and "shared" in i.cls
    ]
    la.granule = min(sizes, default=0)
    la.wcount, la.tcount = np.zeros(len(k.code), np.int64), np.zeros(len(k.code), np.int64)
    total, per = math.prod(la.grid), -(-math.prod(la.block) // WARP) * WARP
    chosen = np.arange(total) if blocks is None else np.asarray(blocks, np.int64)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= total):
        raise PTXError(f"blocks {chosen.min()} to {chosen.max()} of a grid of {total}")
    sectors = sum(r.sectors for r in la.gmem.regions)
    batch = max(
        1,
        min(
            batch_lanes // per,
            (1 << 26) // max(la.shared_bytes + per * la.local_bytes, 1),
            (1 << 29) // max(sectors, 1),  # Machine.touched has a flag for each block and sector
        ),
    )
    with np.errstate(all="ignore"):
        for first in range(0, chosen.size, batch):
            machine = Machine(k, la, chosen[first : first + batch])
            machine.execute()
            machine.close()
    st = la.stats
    st.sites = [dataclasses.replace(s) for s in k.sites]
    st.blocks = chosen.size
    for i in k.code:
        w = int(la.wcount[i.pc])
        if w and i.line:
            st.warp_instructions[i.cls] += w
            st.thread_instructions[i.cls] += int(la.tcount[i.pc])
            st.opcodes[".".join([i.op, *i.mods])] += w
            st.flops += i.flops * int(la.tcount[i.pc])
    touched = lambda r, sectors: int(min(32 * np.count_nonzero(sectors), r.nbytes))
    st.footprint = {r.name: (touched(r, r.read), touched(r, r.written)) for r in la.gmem.regions}
    st.traffic = {r.name: (32 * r.block_read, 32 * r.block_written) for r in la.gmem.regions}
    st.seconds = time.perf_counter() - began
    return st


def compile_triton(fn, args, kwargs=None, num_warps=4, cc=80, num_stages=3, specialize=True):
    """Compile a @triton.jit function ahead of time for given arguments, the way the JIT would specialise it.

    Returns (compiled kernel, the arguments that the PTX kernel takes, their names). specialize=False drops the alignment
    and divisibility hints and the folding of integers equal to 1.
    """

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import native_specialize_impl

    target = GPUTarget("cuda", cc, WARP)
    backend = make_backend(target)
    bound = inspect.signature(fn.fn).bind(*args, **(kwargs or {}))
    bound.apply_defaults()
    signature, constexprs, attrs, passed, names = {}, {}, {}, [], []
    for n, (p, value) in enumerate(zip(fn.params, bound.arguments.values())):
        if p.is_constexpr:
            ty, key = "constexpr", value
        else:
            ty, key = native_specialize_impl(
                backend,
                value,
                p.is_const,
                specialize and not p.do_not_specialize,
                specialize and not p.do_not_specialize_on_alignment,
            )
            ty = p.annotation_type or ty if ty != "constexpr" else ty
        signature[p.name] = ty
        if ty == "constexpr":
            constexprs[p.name] = value
            continue
        if isinstance(key, str) and "D" in key:
            attrs[(n,)] = backend.parse_attr(key)
        passed.append(value)
        names.append(p.name)
    src = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    return (
        triton.compile(src, target=target, options={"num_warps": num_warps, "num_stages": num_stages}),
        passed,
        names,
    )


def _as_numpy(t):
    """The memory span of a torch CPU tensor as a NumPy byte array (shared, so results land in the tensor)."""
    import torch

    if t.device.type != "cpu":
        raise PTXError("run_triton wants CPU tensors")
    whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()
    size = t.element_size()
    start, span = (
        size * t.storage_offset(),
        size * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))),
    )
    return whole[start : start + (span if t.numel() else 0)]


def run_triton(
    fn, grid, *args, num_warps=4, cc=80, num_stages=3, specialize=True, run_options=None, **kwargs
):
    """Compile a @triton.jit function ahead of time and run its PTX on torch CPU tensors, in place. Returns Stats.

    grid: a tuple, or a function of the dictionary of constexpr arguments. The compiled kernel is in `stats.compiled`.
    """
    ck, passed, names = compile_triton(fn, args, kwargs, num_warps, cc, num_stages, specialize)
    if callable(grid):
        import inspect

        bound = inspect.signature(fn.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        grid = grid(bound.arguments)
    md = ck.metadata
    if md.num_ctas != 1:
        raise Unsupported("thread-block clusters (num_ctas > 1)")
    values = [_as_numpy(a) if hasattr(a, "data_ptr") else a for a in passed]
    blocks = math.prod(_triple(grid))
    for size in (md.global_scratch_size, md.profile_scratch_size):  # the two hidden pointers at the end
        values.append(np.full(size * blocks, POISON, U1) if size else None)
    names += ["global scratch", "profile scratch"]
    st = run(
        ck.asm["ptx"],
        md.name,
        grid,
        (WARP * md.num_warps, 1, 1),
        values,
        md.shared,
        names=names,
        **(run_options or {}),
    )
    st.compiled = ck
    return st
