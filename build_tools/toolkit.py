"""Find what the extensions are built with: the C++ compiler, torch's headers and the CUDA toolkit.

Nothing in this module runs at import, and nothing calls nvcc unless a function is called, so that asking pip
for the package's metadata never touches a toolkit. Every finder returns either what it found or a `Missing`
whose reason is one sentence a user can act on.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Every architecture family that a kernel is shipped for; the newest one that the compiler knows is shipped as
# PTX too, so that a GPU newer than the list still finds something it can compile.
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# The names that torch.utils.cpp_extension accepts in TORCH_CUDA_ARCH_LIST.
_NAMED_ARCHS = {
    "Turing": ("7.5+PTX",),
    "Ampere": ("8.0", "8.6+PTX"),
    "Ada": ("8.9+PTX",),
    "Hopper": ("9.0+PTX",),
    "Blackwell": ("10.0", "12.0+PTX"),
}

# Flags of one instruction set each, for csrc/cpu/isa/*.cpp. -march=native is not among them on purpose: what
# is shipped must not depend on the machine that built it.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ),
}


@dataclass(frozen=True)
class Missing:
    """Why something cannot be built, in one sentence."""

    reason: str


@dataclass(frozen=True)
class Compiler:
    """A host C++ compiler: its command (ccache or other leading words included) and its version line."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class TorchTree:
    """The headers and libraries of an installed torch; found without importing it."""

    root: Path
    version: str

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit: how to call nvcc, where it lives, and where its headers and the static runtime are."""

    nvcc: Path
    root: Path
    include: Path
    lib: Path
    version: str
    found_by: str


# --- the host compiler --------------------------------------------------------------------------------------


def _run(command: Sequence[str], timeout: float = 60.0) -> tuple[int, str]:
    """Run a tool; (exit status, stdout and stderr together). A tool that cannot be started has status 127."""
    try:
        done = subprocess.run(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout


def find_compiler(
    env: Mapping[str, str] | None = None,
    which: Callable[..., str | None] = shutil.which,
    run: Callable[..., tuple[int, str]] = _run,
) -> Compiler | Missing:
    """The C++ compiler: `CXX` if set, else c++'s usual names. Only that it starts is checked here."""
    env = os.environ if env is None else env
    if sys.platform == "win32":
        return Missing("the kernels are built with GCC or Clang, which Windows builds do not use yet")
    path = env.get("PATH")
    chosen = env.get("CXX", "").strip()
    names = [chosen] if chosen else ["g++", "clang++", "c++"]
    for name in names:
        words = shlex.split(name)
        found = which(words[0], path=path)
        if found is None:
            continue
        status, text = run([found, *words[1:], "--version"])
        if status == 0 and text.strip():
            return Compiler((found, *words[1:]), text.strip().splitlines()[0])
    if chosen:
        return Missing(f"the C++ compiler named by CXX ({chosen!r}) cannot be started")
    return Missing("no C++ compiler was found on PATH (looked for g++, clang++, c++; CXX is not set)")


def isas_for(machine: str) -> list[str]:
    """The instruction sets to compile for on a machine, as `platform.machine()` names it.

    Every compiler that takes -std=c++20 knows all of the x86-64 ones, and csrc/cpu/dispatch.h counts on them
    there.
    """
    return list(ISA_FLAGS) if machine.lower() in ("x86_64", "amd64") else ["portable"]


# --- torch --------------------------------------------------------------------------------------------------


def find_torch(
    env: Mapping[str, str] | None = None, search: Iterable[str | os.PathLike[str]] | None = None
) -> TorchTree | Missing:
    """The installed torch whose headers to build against, without importing it.

    Looks at SDAN_FAST_TORCH_DIR (the folder with include/ and lib/), then at what this interpreter would
    import, then at the site-packages of the interpreter's own environment: pip's build isolation hides that
    from sys.path but not from sysconfig, and torch is not worth downloading again for its headers.
    """
    env = os.environ if env is None else env
    named = env.get("SDAN_FAST_TORCH_DIR", "").strip()
    candidates: list[Path] = []
    if named:
        candidates.append(Path(named))
    elif search is not None:
        candidates += [Path(folder) / "torch" for folder in search]
    else:
        spec = find_spec("torch")
        if spec is not None and spec.submodule_search_locations:
            candidates += [Path(location) for location in spec.submodule_search_locations]
        candidates += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("platlib", "purelib")]
    for root in candidates:
        if not (root / "version.py").is_file():
            continue
        text = (root / "version.py").read_text(encoding="utf-8")
        match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        version = match.group(1) if match else "unknown"
        if not (root / "include/torch/csrc/stable/library.h").is_file():
            return Missing(
                f"torch {version} at {root} has no stable ABI headers; torch 2.10 or newer is needed"
            )
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if numbers and numbers < (2, 10):
            return Missing(f"torch {version} is older than 2.10, the oldest whose stable ABI is enough")
        return TorchTree(root, version)
    if named:
        return Missing(
            f"SDAN_FAST_TORCH_DIR={named} holds no torch (expected version.py, include/ and lib/ there)"
        )
    return Missing(
        "torch is not installed where this build runs, so its headers are missing "
        "(install torch first and build with pip install --no-build-isolation)"
    )


# --- CUDA ---------------------------------------------------------------------------------------------------


def _root_from_nvcc(nvcc: Path, run: Callable[..., tuple[int, str]]) -> Path | None:
    """The toolkit of an nvcc, also when this nvcc is a symlink, a wrapper script or a compiler cache.

    A real nvcc sits in <root>/bin. Any other is asked to plan a compilation: its dry run prints `TOP=`, the
    root of the toolkit that would do the work.
    """
    real = nvcc.resolve()
    root = real.parent.parent
    if real.name in ("nvcc", "nvcc.exe") and real.parent.name == "bin" and _headers(root) is not None:
        return root
    _, text = run([str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    match = re.search(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
    if match is None:
        return None
    return Path(os.path.normpath(match.group(1).strip()))


def _headers(root: Path) -> Path | None:
    """The folder of a toolkit that holds cuda_runtime.h."""
    for folder in [root / "include", *(Path(p) for p in sorted(glob.glob(str(root / "targets/*/include"))))]:
        if (folder / "cuda_runtime.h").is_file():
            return folder
    return None


def _static_runtime(root: Path) -> Path | None:
    """The folder of a toolkit that holds libcudart_static.a."""
    folders = [
        root / "lib64",
        root / "lib",
        *(Path(p) for p in sorted(glob.glob(str(root / "targets/*/lib")))),
    ]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return folder
    return None


def _version_key(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", os.path.basename(path)))


def find_cuda(
    env: Mapping[str, str] | None = None,
    which: Callable[..., str | None] = shutil.which,
    run: Callable[..., tuple[int, str]] = _run,
    system_roots: Sequence[str] | None = None,
    site_packages: Sequence[str] | None = None,
) -> CudaToolkit | Missing:
    """The CUDA toolkit to build with.

    Order: CUDA_HOME or CUDA_PATH; the nvcc on PATH (through symlinks and wrapper scripts); /usr/local/cuda
    and its numbered neighbours, newest first, and /opt/cuda; the NVIDIA pip packages where they carry nvcc.
    The first that has nvcc, the runtime's headers and libcudart_static.a is taken; if none has, every
    candidate's lack is named. SDAN_FAST_CUDA_ROOTS, a list of folders like PATH, takes the place of the last
    two; empty, it switches them off.

    env, which, run, system_roots, site_packages: what to look at, for tests.
    """
    env = os.environ if env is None else env
    lacks: list[str] = []
    candidates: list[tuple[str, Path, Path]] = []  # (found by, nvcc, root)
    seen: set[Path] = set()

    def complete(found_by: str, nvcc: Path, root: Path) -> CudaToolkit | None:
        if root in seen:
            return None
        seen.add(root)
        include, lib = _headers(root), _static_runtime(root)
        if include is None:
            lacks.append(f"{root} ({found_by}) has no cuda_runtime.h")
            return None
        if lib is None:
            lacks.append(f"{root} ({found_by}) has no libcudart_static.a")
            return None
        status, text = run([str(nvcc), "--version"])
        match = re.search(r"release [\d.]+, V([\d.]+)", text)
        if status != 0 or match is None:
            lacks.append(f"{nvcc} ({found_by}) does not run: {text.strip().splitlines()[:1] or 'no output'}")
            return None
        return CudaToolkit(nvcc, root, include, lib, match.group(1), found_by)

    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = env.get(name, "").strip()
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            if os.access(nvcc, os.X_OK):
                candidates.append((name, nvcc, Path(home)))
            else:
                lacks.append(f"{name}={home} has no bin/nvcc")
    for found_by, nvcc, root in candidates:
        if toolkit := complete(found_by, nvcc, root):
            return toolkit

    on_path = which("nvcc", path=env.get("PATH"))
    if on_path is not None:
        path_root = _root_from_nvcc(Path(on_path), run)
        if path_root is None:
            lacks.append(f"{on_path} (on PATH) does not say which toolkit it belongs to")
        else:
            # The toolkit's own nvcc is called, not the wrapper: a wrapper may depend on the caller's
            # environment.
            own = path_root / "bin" / "nvcc"
            nvcc = own if os.access(own, os.X_OK) else Path(on_path)
            if toolkit := complete("PATH", nvcc, path_root):
                return toolkit
    else:
        lacks.append("no nvcc on PATH")

    named_roots = env.get("SDAN_FAST_CUDA_ROOTS")
    if named_roots is not None:
        system_roots = [root for root in named_roots.split(os.pathsep) if root]
        site_packages = []
    if system_roots is None:
        numbered = sorted(glob.glob("/usr/local/cuda-*"), key=_version_key, reverse=True)
        system_roots = ["/usr/local/cuda", *numbered, "/opt/cuda"]
    if site_packages is None:
        site_packages = sorted({sysconfig.get_paths()[key] for key in ("platlib", "purelib")})
    pip_roots = [
        root
        for folder in site_packages
        for pattern in ("nvidia/cu[0-9]*", "nvidia/cuda_nvcc")
        for root in sorted(glob.glob(os.path.join(folder, pattern)), key=_version_key, reverse=True)
    ]
    for found_by, roots in (("the system", system_roots), ("pip packages", pip_roots)):
        for home in roots:
            nvcc = Path(home) / "bin" / "nvcc"
            if os.access(nvcc, os.X_OK) and (
                toolkit := complete(found_by, nvcc, Path(os.path.realpath(home)))
            ):
                return toolkit
    return Missing("no usable CUDA toolkit was found: " + "; ".join(lacks))


def cuda_archs(nvcc_lists: str, arch_list: str | None) -> list[str]:
    """The architectures to compile for, as nvcc names them: "sm_80" is machine code, "compute_120" is PTX.

    nvcc_lists: what `nvcc --list-gpu-code` printed. arch_list: the value of TORCH_CUDA_ARCH_LIST, e.g.
    "8.0;9.0+PTX", separated by semicolons, commas or blanks; None or empty for the default list (7.5 to 12.0,
    those that this nvcc knows, and the PTX of the newest). ValueError for a word that is not an architecture,
    or one asked for by name that this nvcc cannot compile for.
    """
    known = set(re.findall(r"\b(?:sm|compute)_\d+[a-z]?\b", nvcc_lists))
    words = [word for word in re.split(r"[;,\s]+", arch_list or "") if word]
    if not words:
        machine = [f"sm_{arch.replace('.', '')}" for arch in DEFAULT_ARCHS]
        machine = [code for code in machine if code in known]
        if not machine:
            raise ValueError(
                f"this nvcc compiles for none of {', '.join(DEFAULT_ARCHS)} (it lists {sorted(known)})"
            )
        return [*machine, machine[-1].replace("sm_", "compute_")]
    codes: list[str] = []
    for word in (part for name in words for part in _NAMED_ARCHS.get(name, (name,))):
        match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", word)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected architectures such as '8.0;9.0+PTX', "
                f"got {word!r} in {arch_list!r}"
            )
        number = match.group(1) + match.group(2) + match.group(3)
        # nvcc lists neither the feature-set variants ("90a") nor their bases' relation; it knows a variant
        # where it knows the base.
        if f"sm_{number.rstrip('af')}" not in known:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: this nvcc cannot compile for {word!r} (it lists {sorted(known)})"
            )
        codes.append(f"sm_{number}")
        if match.group(4):
            codes.append(f"compute_{number}")
    return list(dict.fromkeys(codes))


# Architectures whose machine code, bit for bit, comes from the PTX of an older one as well, as kernels do not tell them
# apart: two of seven runs of nvcc's optimiser less, which are two thirds of a build's time.
SHARED_PTX = {"86": "80", "89": "80"}


def gencode_flags(codes: Sequence[str]) -> list[str]:
    """nvcc's -gencode flags for what `cuda_archs` returned."""
    flags = []
    for code in codes:
        kind, number = code.split("_", 1)
        base = SHARED_PTX.get(number, number)
        virtual = base if kind == "sm" and f"sm_{base}" in codes else number
        flags += ["-gencode", f"arch=compute_{virtual},code={code}"]
    return flags
