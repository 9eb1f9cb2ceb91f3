"""Calls the CUDA C++ ops on CPU tensors with their launches recorded instead of run.

nvcc's objects of the last build are linked with the torch sides, compiled for the host, and with a CUDA runtime that
only tells what is launched (csrc/cuda/host/recorder.cpp). So each launch is seen as it would be on a GPU: kernel, grid,
shared memory, arguments. This has to be a process of its own, as it registers the ops' `.cuda_host` overloads:
`python -m sdan_fast.inspecting.recorder` reads a request from stdin and prints JSON.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tools import Unavailable

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"


def build_folder() -> Path:
    """Where `make build` left the CUDA module and its objects last."""
    top = Path(os.environ.get("SDAN_FAST_BUILD_DIR", "").strip() or ROOT / "build")
    found = sorted(top.glob("cuda-*/_C_cuda.abi3.so"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise Unavailable(
            f"the CUDA module was not built in {top} (make build, with nvcc at hand), so there is nothing to inspect"
        )
    return found[-1].parent


def libraries() -> tuple[Path, Path]:
    """(the recording library, the library to preload), built if their sources or the objects changed."""
    import torch

    cxx = shutil.which(os.environ.get("CXX") or "g++")
    if cxx is None:
        raise Unavailable("recording launches needs a C++ compiler, and g++ was not found")
    # Not all that lies there: objects of sources that are gone stay behind.
    objects = [build_folder() / "obj" / f"{source.stem}.cuda.o" for source in sorted(CUDA.glob("*.cu"))]
    if missing := [path.name for path in objects if not path.exists()]:
        raise Unavailable(f"the last build has no {', '.join(missing)}: make build brings it up to date")
    sides = [p for p in sorted(CUDA.glob("*.cpp")) if p.name != "module.cpp"]
    sources = [CUDA / "host" / "recorder.cpp", *sides]
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DSDAN_CUDA_HOST", f"-I{CUDA}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include),
    ]  # fmt: skip
    headers = [*CUDA.glob("*.h"), *CUDA.glob("*.cuh"), CUDA / "host" / "runtime.h"]
    out = build_folder().parent / "recorder"
    out.mkdir(exist_ok=True)
    common = _hash([*headers], cxx, torch.__version__, *flags)

    def compiled(source: Path) -> Path:
        made = out / f"{source.stem}.{_hash([source], common)}.o"
        if not made.exists():
            partial = made.with_suffix(f".{os.getpid()}")
            _run([cxx, *flags, "-c", str(source), "-o", str(partial)])
            partial.replace(made)
        return made

    with ThreadPoolExecutor(2) as pool:
        host = list(pool.map(compiled, sources))
    library = out / f"launches.{_hash([*objects, *host])}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        torch_lib = f"-L{include.parent / 'lib'}"
        _run(
            [
                cxx,
                "-shared",
                "-o",
                str(partial),
                *map(str, host),
                *map(str, objects),
                torch_lib,
                "-ltorch_cpu",
            ]
        )
        partial.replace(library)
    preload = out / f"allocations.{_hash([CUDA / 'host' / 'allocations.cpp'])}.so"
    if not preload.exists():
        partial = preload.with_suffix(f".{os.getpid()}")
        source = CUDA / "host" / "allocations.cpp"
        _run([cxx, "-std=c++20", "-O1", "-fPIC", "-shared", "-o", str(partial), str(source), "-ldl"])
        partial.replace(preload)
    return library, preload


def _hash(files: list[Path], *words: str) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Unavailable(f"building the launch recorder failed: {done.stdout[-1500:]}")


@dataclass(frozen=True)
class CudaLaunch:
    """One launch as the CUDA runtime would get it; arguments: the addresses where their values stand."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: Any

    def value(self, index: int, size: int) -> bytes:
        """The bytes of one argument; valid while the launch is being recorded."""
        return ctypes.string_at(self.arguments[index], size)


class Recorder:
    """The recording library, loaded into this process."""

    def __init__(self, library: Path) -> None:
        import torch

        from sdan_fast.ops._op import OPS, attach_compiled

        for op in OPS.values():
            if "cuda_host" not in op.overloads:
                op.define("cuda_host")
                op.define_backward("cuda_host")
        torch.ops.load_library(str(library))
        attach_compiled("cuda_host", "CPU")
        self._library = ctypes.CDLL(str(library))
        self._type = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
            ctypes.POINTER(ctypes.c_void_p),
        )  # fmt: skip
        self._find = ctypes.CDLL(None).sdan_find_allocation
        self._find.restype = ctypes.c_size_t
        self._find.argtypes = [ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)]

    def allocation(self, pointer: int) -> tuple[int, int] | None:
        """(address, bytes) of the tensor memory that holds a pointer."""
        size = ctypes.c_size_t()
        begin = self._find(pointer, ctypes.byref(size))
        return (begin, size.value) if begin else None

    def record(self, call: Callable[[], Any], on_launch: Callable[[CudaLaunch], None]) -> Any:
        """Run a call, handing each launch to `on_launch`; what that raises, this raises."""
        errors: list[BaseException] = []

        def callback(name: bytes, shape: Any, shared: int, arguments: Any) -> int:
            try:
                on_launch(
                    CudaLaunch(name.decode(), tuple(shape[:3]), tuple(shape[3:6]), shared, arguments)  # type: ignore[arg-type]
                )
            except BaseException as error:
                errors.append(error)
                return 1
            return 0

        function = self._type(callback)
        self._library.sdan_record_launches(function)
        try:
            return call()
        except Exception:
            if errors:
                raise errors[0] from None
            raise
        finally:
            self._library.sdan_record_launches(self._type(0))


def run_child(request: str, *arguments: str, major: int = 9) -> str:
    """Run `python -m sdan_fast.inspecting.cuda_counts` with the allocations watched; what it prints.

    major: the compute capability of the GPU that the launches are recorded for.
    """
    _, preload = libraries()
    environment = {**os.environ, "LD_PRELOAD": str(preload), "SDAN_FAST_RECORDED_MAJOR": str(major)}
    command = [sys.executable, "-m", "sdan_fast.inspecting.cuda_counts", *arguments]
    done = subprocess.run(command, input=request, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"recording the CUDA launches failed:\n{done.stderr[-4000:]}")
    return done.stdout
