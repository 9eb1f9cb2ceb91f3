"""Builds what the tests of the CUDA kernels run on the host: the kernels' own sources, compiled by g++.

Everything goes to build/cuda_host, with a key made of the sources, the flags and torch, so that a second run
builds nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_host"
FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-DSDAN_CUDA_HOST",
    f"-I{CUDA}",
)
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g1",
)


def compiler() -> str | None:
    """The C++ compiler to use, None if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _key(paths: Iterable[Path], *words: str) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> list[Path]:
    return [path for path in CUDA.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


def _link(output: Path, key: str, sources: list[Path], flags: tuple[str, ...], link: tuple[str, ...]) -> Path:
    """Compile the sources two at a time and link them, unless a build of the same key is there."""
    stamp = output.with_suffix(".key")
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists() and stamp.exists() and stamp.read_text() == key:
            return output
        stamp.unlink(missing_ok=True)
        cxx = compiler()
        if cxx is None:
            raise RuntimeError("there is no C++ compiler")
        objects = [output.parent / f"{output.stem}.{path.name}.o" for path in sources]
        commands = [
            [cxx, *flags, "-x", "c++", "-c", str(path), "-o", str(obj)]
            for path, obj in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_run, commands))
        _run([cxx, *flags[-len(SANITIZE) :], "-o", str(output), *map(str, objects), *link])
        stamp.write_text(key)
    return output


def build_kernels(sanitize: bool = False) -> Path:
    """The shared object that registers every op's `.cuda_host` overload for the CPU key."""
    import torch

    include = Path(torch.__file__).parent / "include"
    flags = (
        *FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include), "-O1",
        *(SANITIZE if sanitize else ("-g0",) * len(SANITIZE)),
    )  # fmt: skip
    sources = [CUDA / "host" / "runtime.cpp", *sorted(CUDA.glob("*.cu"))]
    sources += [path for path in sorted(CUDA.glob("*.cpp")) if path.name != "module.cpp"]
    name = "kernels_sanitized.so" if sanitize else "kernels.so"
    link = ("-shared", f"-L{include.parent / 'lib'}", "-ltorch_cpu")
    return _link(BUILD / name, _key(_sources(), torch.__version__, *flags), sources, flags, link)


def build_planted(sanitize: bool = False) -> Path:
    """The kernels with planted faults: a shared object, or with sanitizers a program that runs one."""
    planted = Path(__file__).with_name("planted.cpp")
    flags = (*FLAGS, "-O1", *(("-DSDAN_MAIN", *SANITIZE) if sanitize else ("-g0",) * len(SANITIZE)))
    sources = [planted, CUDA / "host" / "runtime.cpp"]
    key = _key([planted, *_sources()], *flags)
    return _link(
        BUILD / ("planted" if sanitize else "planted.so"),
        key,
        sources,
        flags,
        () if sanitize else ("-shared",),
    )
