"""What the two extension modules are made of: sources by globbing, flags, and the steps that build them.

csrc/cpu/*.cpp and csrc/cuda/*.cpp are compiled once with baseline flags, csrc/cpu/isa/*.cpp once for each
instruction set, csrc/cuda/*.cu by nvcc for each architecture. A new op is a new file; nothing here changes
for it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compile import CompileError, Step, find_ninja, job_count, locked, run_steps
from .toolkit import (
    ISA_FLAGS,
    Compiler,
    CudaToolkit,
    Missing,
    TorchTree,
    cuda_archs,
    find_compiler,
    find_cuda,
    find_torch,
    gencode_flags,
    isas_for,
)

BUILD_INFO = "_build_info.json"
SUFFIX = ".abi3.so"
# Only PyInit_* leaves a module: a template of the C++ library that both modules, or another package,
# instantiate must not be merged into one by the dynamic linker.
EXPORTS = Path(__file__).resolve().with_name("exports.map")

# The oldest torch and Python that the modules must load under: LibTorch's stable ABI of 2.10, CPython's of
# 3.10.
DEFINES = (
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030a0000",
)
# -fno-math-errno and -fno-trapping-math let loops with sqrt and selects vectorize; neither changes a result.
# No -ffast-math: NaN, infinities and the order of sums are part of what the ops promise.
CXX_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)
# False alarms of GCC 12 in its own headers: _mm256_undefined_si256 is read on purpose, and std::string's
# operator+ is not overlapping anything.
GCC_QUIET = ("-Wno-maybe-uninitialized", "-Wno-restrict")
# SDAN_FAST_WERROR=1, for whoever works on the kernels: not in what is shipped, since the next compiler warns anew.
WERROR_FLAGS = ("-Werror",)
NVCC_WERROR_FLAGS = ("-Werror", "all-warnings", "-Xcompiler", "-Werror")
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)


@dataclass
class Built:
    """One module's outcome: the file, or None and the reason; and what `sdan-fast info` tells of it."""

    file: Path | None
    info: dict[str, Any] = field(default_factory=dict)


def sources(root: Path, kind: str) -> dict[str, list[Path]]:
    """The sources of one module ("cpu" or "cuda"), by how they are compiled: "baseline", "isa", "cuda"."""
    base = root / "csrc" / kind
    found = {"baseline": sorted(base.glob("*.cpp"))}
    if kind == "cpu":
        found["isa"] = sorted((base / "isa").glob("*.cpp"))
    else:
        found["cuda"] = sorted(base.glob("*.cu"))
    return found


def _include_flags(root: Path, kind: str, torch: TorchTree) -> list[str]:
    own = [f"-I{root / 'csrc'}", f"-I{root / 'csrc' / kind}"]
    # As system headers, so that -Wall speaks of this project's code only.
    return [*own, "-isystem", str(torch.include), "-isystem", sysconfig.get_paths()["include"]]


def _short_paths(root: Path, torch: TorchTree) -> list[str]:
    """Checks that fail name their source file: as it is called here, not where it lay when it was compiled."""
    return [f"-fmacro-prefix-map={folder}/=" for folder in (root, torch.include)]


def _quiet(compiler: Compiler) -> tuple[str, ...]:
    return () if "clang" in compiler.version.lower() else GCC_QUIET


def _object(build: Path, source: Path, tag: str) -> Path:
    return build / "obj" / f"{source.stem}.{tag}.o"


def _cxx_step(compiler: Compiler, flags: list[str], source: Path, build: Path, tag: str) -> Step:
    output = _object(build, source, tag)
    depfile = output.with_suffix(".d")
    flags = [*flags, *_quiet(compiler)]
    command = (*compiler.command, "-MD", "-MF", str(depfile), *flags, "-c", str(source), "-o", str(output))
    return Step(output, (source,), command, f"c++ {source.name} ({tag})", depfile)


def cpu_steps(
    root: Path,
    build: Path,
    compiler: Compiler,
    torch: TorchTree,
    isas: list[str],
    werror: bool = False,
    flags: Sequence[str] = (),
) -> tuple[list[Step], Path]:
    """Steps that make _C_cpu, and the file that the last one links; `flags` are added to all of them."""
    found = sources(root, "cpu")
    include = _include_flags(root, "cpu", torch)
    cxx = [*CXX_FLAGS, *_short_paths(root, torch), *(WERROR_FLAGS if werror else ()), *flags]
    baseline = [*cxx, *DEFINES, *include]
    steps = [_cxx_step(compiler, baseline, source, build, "baseline") for source in found["baseline"]]
    for source in found["isa"]:
        for isa in isas:
            of_isa = [*cxx, *ISA_FLAGS[isa], *DEFINES, f"-DSDAN_ISA={isa}", *include]
            steps.append(_cxx_step(compiler, of_isa, source, build, isa))
    output = build / f"_C_cpu{SUFFIX}"
    objects = tuple(step.output for step in steps)
    link = _link_command(compiler, objects, output, torch, list(flags))
    return [*steps, Step(output, (*objects, EXPORTS), link, f"link {output.name}")], output


def cuda_steps(
    root: Path,
    build: Path,
    compiler: Compiler,
    torch: TorchTree,
    toolkit: CudaToolkit,
    archs: list[str],
    werror: bool = False,
) -> tuple[list[Step], Path]:
    """Steps that make _C_cuda, and the file that the last one links."""
    found = sources(root, "cuda")
    include = [*_include_flags(root, "cuda", torch), "-isystem", str(toolkit.include)]
    cxx = [*CXX_FLAGS, *_short_paths(root, torch), *(WERROR_FLAGS if werror else ())]
    steps = [
        _cxx_step(compiler, [*cxx, *DEFINES, *include], source, build, "baseline")
        for source in found["baseline"]
    ]
    nvcc = [*gencode_flags(archs), *compression_flags(toolkit), *(NVCC_WERROR_FLAGS if werror else ())]
    for source in found["cuda"]:
        steps.append(_nvcc_step(compiler, toolkit, nvcc, include, source, build))
    output = build / f"_C_cuda{SUFFIX}"
    objects = tuple(step.output for step in steps)
    # The runtime is linked statically and its symbols kept inside: the module then needs no CUDA library to
    # be imported, and cannot meet the libcudart that torch brings.
    runtime = [f"-L{toolkit.lib}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    link = _link_command(compiler, objects, output, torch, runtime)
    return [*steps, Step(output, (*objects, EXPORTS), link, f"link {output.name}")], output


def compression_flags(toolkit: CudaToolkit) -> list[str]:
    """A seventh of the size: code for seven architectures, with its lines, repeats itself.

    Since CUDA 13, whose oldest driver decompresses it; a toolkit before might serve a driver that does not.
    """
    major = re.match(r"\d+", toolkit.version)
    return ["--compress-mode=size"] if major and int(major.group()) >= 13 else []


def _nvcc_step(
    compiler: Compiler,
    toolkit: CudaToolkit,
    flags: list[str],
    include: list[str],
    source: Path,
    build: Path,
) -> Step:
    output = _object(build, source, "cuda")
    depfile = output.with_suffix(".d")
    host = ["-ccbin", compiler.command[0]] if len(compiler.command) == 1 else []
    if quiet := _quiet(compiler):
        host += ["-Xcompiler", ",".join(quiet)]
    command = (
        str(toolkit.nvcc), *host, "-MD", "-MF", str(depfile), *NVCC_FLAGS, *flags, *DEFINES, *include,
        "-c", str(source), "-o", str(output),
    )  # fmt: skip
    return Step(output, (source,), command, f"nvcc {source.name}", depfile)


def _link_command(
    compiler: Compiler, objects: tuple[Path, ...], output: Path, torch: TorchTree, libraries: list[str]
) -> tuple[str, ...]:
    return (
        *compiler.command, "-shared", f"-Wl,--version-script={EXPORTS}", "-Wl,--as-needed", "-o", str(output),
        *(str(path) for path in objects), f"-L{torch.lib}", "-ltorch_cpu", *libraries,
    )  # fmt: skip


# --- is it the toolkit or our code? -------------------------------------------------------------------------

_PROBE_CXX = """\
#include <Python.h>
#include <concepts>
#include <vector>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
std::vector<int> sdan_probe() { return {1}; }
"""
_PROBE_CUDA = """\
#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>
__global__ void sdan_probe() {}
void sdan_launch() { sdan_probe<<<1, 1>>>(); }
"""


def _probe(steps: list[Step]) -> str | None:
    """Run the steps of a source that cannot be at fault; the error of the first that fails, None if none."""
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(list(step.command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
            lines = errors or done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
            return f"{Path(step.command[0]).name}: {lines[0].strip()}"
    return None


def probe_cpu(root: Path, build: Path, compiler: Compiler, torch: TorchTree) -> str | None:
    """Why not even an empty module can be built (no headers, an old compiler); None if it can."""
    source = build / "probe" / "probe.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(_PROBE_CXX, encoding="utf-8")
    step = _cxx_step(
        compiler, [*CXX_FLAGS, *DEFINES, *_include_flags(root, "cpu", torch)], source, source.parent, "p"
    )
    output = source.parent / "probe.so"
    link = Step(output, (step.output,), _link_command(compiler, (step.output,), output, torch, []), "probe")
    return _probe([step, link])


def probe_cuda(
    root: Path, build: Path, compiler: Compiler, torch: TorchTree, toolkit: CudaToolkit, archs: list[str]
) -> str | None:
    """Why not even an empty kernel can be compiled and linked; None if it can."""
    if reason := probe_cpu(root, build, compiler, torch):
        return reason
    source = build / "probe" / "probe_cuda.cu"
    source.write_text(_PROBE_CUDA, encoding="utf-8")
    include = [*_include_flags(root, "cuda", torch), "-isystem", str(toolkit.include)]
    step = _nvcc_step(compiler, toolkit, gencode_flags(archs), include, source, source.parent)
    output = source.parent / "probe_cuda.so"
    runtime = [f"-L{toolkit.lib}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    link = Step(
        output, (step.output,), _link_command(compiler, (step.output,), output, torch, runtime), "probe"
    )
    return _probe([step, link])


# --- building -----------------------------------------------------------------------------------------------


def _truthy(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def build_all(root: Path, env: Mapping[str, str] | None = None) -> dict[str, Built]:
    """Build both modules under root/build (or SDAN_FAST_BUILD_DIR) as far as the machine can.

    A lacking tool is a reason in the result; an error in the project's own code is a CompileError.
    """
    env = os.environ if env is None else env
    results: dict[str, Built] = {}
    for kind in ("cpu", "cuda"):
        made = _build(root, kind, env)
        if isinstance(made, Missing):
            made = Built(None, {"built": False, "reason": made.reason})
            print(f"sdan_fast: _C_{kind} is not built: {made.info['reason']}", flush=True)
        results[kind] = made
    return results


def _build(root: Path, kind: str, env: Mapping[str, str]) -> Built | Missing:
    if _truthy(env, f"SDAN_FAST_SKIP_{kind.upper()}"):
        return Missing(f"SDAN_FAST_SKIP_{kind.upper()} was set when the package was installed")
    if sys.platform != "linux":
        return Missing(f"the compiled kernels are built on Linux only so far (this is {sys.platform})")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return Missing("free-threaded Python has no stable ABI, which the compiled kernels need")
    if not any(sources(root, kind).values()):
        return Missing(f"the source tree has no csrc/{kind}")
    compiler = find_compiler(env)
    if isinstance(compiler, Missing):
        return compiler
    # The toolkit before torch: who lacks both should hear of the larger thing first.
    toolkit = find_cuda(env) if kind == "cuda" else None
    if isinstance(toolkit, Missing):
        return toolkit
    torch = find_torch(env)
    if isinstance(torch, Missing):
        return torch

    versions = f"{compiler.version} {toolkit.version if toolkit else ''} {torch.root}"
    key = hashlib.sha256(versions.encode()).hexdigest()[:8]
    top = Path(env.get("SDAN_FAST_BUILD_DIR", "").strip() or root / "build").absolute()
    build = top / f"{kind}-{platform.machine()}-torch{torch.version.split('+')[0]}-{key}"
    info: dict[str, Any] = {
        "built": True,
        "reason": None,
        "compiler": compiler.version,
        "compiler_command": list(compiler.command),
        "torch": torch.version,
    }
    werror = _truthy(env, "SDAN_FAST_WERROR")
    if toolkit is None:
        isas = isas_for(platform.machine())
        info |= {"isas": isas, "flags": [*CXX_FLAGS, *DEFINES]}
        info["isa_flags"] = {isa: list(ISA_FLAGS[isa]) for isa in isas}
        steps, output = cpu_steps(root, build, compiler, torch, isas, werror)
    else:
        listed = subprocess.run(
            [str(toolkit.nvcc), "--list-gpu-code"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout
        archs = cuda_archs(listed, env.get("TORCH_CUDA_ARCH_LIST"))
        info |= {"nvcc": toolkit.version, "cuda_root": str(toolkit.root), "found_by": toolkit.found_by}
        info |= {"archs": archs, "flags": [*NVCC_FLAGS, *DEFINES]}
        steps, output = cuda_steps(root, build, compiler, torch, toolkit, archs, werror)
    info["sources"] = sorted({str(step.inputs[0].relative_to(root)) for step in steps[:-1]})

    with_nvcc = f", nvcc {toolkit.version}" if toolkit else ""
    print(f"sdan_fast: building _C_{kind} with {compiler.version}{with_nvcc}", flush=True)
    with locked(build):
        try:
            run_steps(steps, build, jobs=job_count(env), ninja=find_ninja())
        except CompileError as error:
            # An empty program tells a machine that cannot compile from code that does not.
            if toolkit is None:
                reason = probe_cpu(root, build, compiler, torch)
            else:
                reason = probe_cuda(root, build, compiler, torch, toolkit, archs)
            if reason is None:
                raise CompileError(f"_C_{kind} does not compile; {error}", error.output) from None
            return Missing(f"the compiler cannot build even an empty module here ({reason})")
    return Built(output, info)


def install_file(built: Path, target: Path) -> None:
    """Put a built file in place in one step, so that a process that has the old one mapped keeps it whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(built, fresh)
    os.replace(fresh, target)
