"""The table of the CUDA C++ kernels: what the built module's machine code is, and PyTorch's own beside it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from . import cuda_counts, recorder, sass, torch_kernels
from .devices import ARCHITECTURES
from .occupancy import occupancy
from .table import Row, Table, number
from .tools import Unavailable, demangle, disassembly, extract, resource_usage, version_of

IDENTITY = ("of", "kernel", "arch")
COLUMNS = (
    "of", "kernel", "arch", "registers", "spills", "static_shared", "dynamic_shared", "threads", "occupancy",
    "load_bits", "store_bits", "wide_loads", "hot", "hot_instructions", "hot_fma", "launched_by", "key",
)  # fmt: skip
HEAD = (
    "The CUDA C++ kernels of the built module, and PyTorch's own depth-wise ones; docs/inspect.md explains the",
    "columns. Written by: sdan-fast inspect cuda --update",
)
TORCH_ARCHS = ("sm_80", "sm_90")
NOTHING: Mapping[tuple[str, ...], Row] = MappingProxyType({})


def toolchain() -> dict[str, str]:
    """The versions that the table's numbers depend on."""
    import torch

    return {
        "nvcc": version_of("nvcc"),
        "cuobjdump": version_of("cuobjdump"),
        "nvdisasm": version_of("nvdisasm"),
        "torch": torch.__version__,
    }


def static_shared(used: dict[str, int], capability: int) -> int:
    """Bytes of static shared memory: from sm_90 on, kernels with any report the reserved kilobyte with it."""
    reserved = ARCHITECTURES[capability].shared_reserved if capability >= 90 else 0
    return max(0, used["shared"] - reserved)


def figures(used: dict[str, int], code: sass.Code, capability: int) -> Row:
    """What the machine code of one kernel says."""
    kind, body = code.hot_loop
    return {
        "registers": str(used["reg"]),
        "spills": str(used["stack"] + used["local"] + 4 * code.spill_instructions),
        "static_shared": str(static_shared(used, capability)),
        "load_bits": str(code.widest("LDG")),
        "store_bits": str(code.widest("STG")),
        "wide_loads": number(code.share_of_width("LDG", 128), 3),
        "hot": kind,
        "hot_instructions": str(len(body)),
        "hot_fma": number(code.hot_fma_share, 3),
    }


def kernels_of(cubin: bytes) -> Iterable[tuple[str, dict[str, int], sass.Code]]:
    """(mangled name, resources, code) of each kernel of a cubin."""
    used = resource_usage(cubin)
    for name, code in sass.parse(disassembly(cubin)):
        if name in used:
            yield name, used[name], code


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """The bytes of each kernel's code by its mangled name: the sections .text.* of the ELF file that a cubin is."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<3H", cubin, 0x3A)
    # Of each section: its name's place among the names, type, flags, address, and where its bytes are.
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    names = sections[names_at][4]
    found = {}
    for name, _, _, _, at, length in sections:
        text = cubin[names + name : cubin.index(0, names + name)].decode()
        if text.startswith(".text."):
            found[text.removeprefix(".text.")] = cubin[at : at + length]
    return found


@functools.cache
def _reader() -> str:
    return inspect.getsource(sass) + inspect.getsource(figures)


def key_of(code: bytes, used: dict[str, int], arch: str) -> str:
    """A hash of all that the figures of a kernel depend on: its code, its resources, what reads them."""
    return hashlib.sha256(code + repr((sorted(used.items()), arch, _reader())).encode()).hexdigest()[:16]


def figures_of(cubin: bytes, arch: str, known: Mapping[tuple[str, ...], Row]) -> list[tuple[str, str, Row]]:
    """(mangled name, short name, figures and key) of each kernel of a cubin: taken over from the known rows, or from
    the disassembly, which takes seconds a cubin, where one of them has another key.
    """
    used, code = resource_usage(cubin), machine_code(cubin)
    short = demangle([kernel for kernel in used if kernel in code])
    keys = {kernel: key_of(code[kernel], used[kernel], arch) for kernel in short}
    rows = {kernel: known.get(("sdan_fast", name, arch), {}) for kernel, name in short.items()}
    if any(row.get("key") != keys[kernel] for kernel, row in rows.items()):
        rows = {
            kernel: figures(resources, instructions, _capability(arch)) | {"key": keys[kernel]}
            for kernel, resources, instructions in kernels_of(cubin)
        }
    return [(kernel, short[kernel], row) for kernel, row in rows.items()]


def built_archs(module: Path) -> list[str]:
    """The architectures that a module has machine code for."""
    from .tools import run_tool

    return sorted(
        set(re.findall(r"\.(sm_\d+)[a-z]?\.cubin", run_tool("cuobjdump", "-lelf", module))), key=_capability
    )


def _capability(arch: str) -> int:
    return int(arch[3:])


def compute(archs: Iterable[str] | None = None, on_step: Callable[[str], object] = lambda what: None,
            *, torch_too: bool = True, known: Mapping[tuple[str, ...], Row] = NOTHING) -> Table:  # fmt: skip
    """The table of the last build, for some or all of its architectures.

    known: committed rows, made with these tools: the same machine code has the same figures.
    """
    module = recorder.build_folder() / "_C_cuda.abi3.so"
    wanted = list(archs) if archs is not None else built_archs(module)
    on_step("recording launches")
    # sm_75 takes other kernels for some calls, and less shared memory for others.
    launches = {major: _largest(major) for major in {min(9, _capability(arch) // 10) for arch in wanted}}
    table = Table(IDENTITY, COLUMNS, toolchain())
    for arch in wanted:
        limits = ARCHITECTURES[_capability(arch)]
        largest = launches[min(9, _capability(arch) // 10)]
        for name, cubin in extract("elf", arch, module).items():
            on_step(name)
            for kernel, short, found in figures_of(cubin, arch, known):
                row: dict[str, object] = {**found, "of": "sdan_fast", "kernel": short, "arch": arch}
                launched = {"threads": "", "dynamic_shared": "", "launched_by": "", "occupancy": ""}
                if kernel in largest:
                    threads, shared, call = largest[kernel]
                    shared_of_block = int(found["static_shared"]) + shared
                    fit = occupancy(limits, threads, int(found["registers"]), shared_of_block)
                    launched = {"threads": str(threads), "dynamic_shared": str(shared), "launched_by": call,
                                "occupancy": number(fit.share)}  # fmt: skip
                table.add(row | launched)
    if torch_too:
        add_torch(table, [a for a in TORCH_ARCHS if a in wanted], on_step)
    return table


def _largest(major: int) -> dict[str, tuple[int, int, str]]:
    """(threads, dynamic shared memory, call) of each kernel: of several launches the one that asks most of an SM."""
    largest: dict[str, tuple[int, int, str]] = {}
    for kernel, threads, shared, call in cuda_counts.launched(major):
        if kernel not in largest or (shared, threads) > (largest[kernel][1], largest[kernel][0]):
            largest[kernel] = threads, shared, call
    return largest


def add_torch(table: Table, archs: Iterable[str], on_step: Callable[[str], object]) -> None:
    """PyTorch's depth-wise kernels, with 32-bit indices, in the types that ours have."""
    try:
        cubins = torch_kernels.cubins()
    except Unavailable as reason:
        on_step(f"PyTorch's kernels are left out: {reason}")
        return
    for arch in archs:
        if arch not in cubins:
            continue
        on_step(f"PyTorch's depth-wise kernels for {arch}")
        found = [k for k in kernels_of(cubins[arch]) if torch_kernels.WANTED in k[0]]
        short = demangle([kernel for kernel, *_ in found])
        for kernel, used, code in found:
            if re.search(r"\b(double|long)\b", short[kernel]):
                continue
            row = {"of": "PyTorch", "kernel": short[kernel], "arch": arch}
            table.add(row | figures(used, code, _capability(arch)))


def within_limits(row: Row) -> str | None:
    """Why a row of ours breaks a hard limit that no toolchain excuses; None if it does not."""
    if row["of"] != "sdan_fast":
        return None
    if row["spills"] != "0":
        return f"{row['kernel']} for {row['arch']} spills {row['spills']} bytes"
    shared = int(row["static_shared"]) + int(row["dynamic_shared"] or 0)
    if shared > ARCHITECTURES[_capability(row["arch"])].shared_block:
        return f"{row['kernel']} for {row['arch']} takes {shared} bytes of shared memory"
    return None
