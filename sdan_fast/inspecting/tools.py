"""The CUDA tools that read compiled kernels: those of the triton package, else the toolkit's."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class Unavailable(RuntimeError):
    """Something that an inspection needs is not here; the message says what, in one sentence."""


@functools.cache
def find_tool(name: str) -> Path:
    """cuobjdump, nvdisasm, ptxas or nvcc."""
    places: list[Path] = []
    spec = find_spec("triton")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)
    places += [Path(os.environ[v]) / "bin" / name for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places += [Path("/usr/local/cuda/bin") / name, *sorted(Path("/usr/local").glob(f"cuda-*/bin/{name}"))]
    for place in places:
        if os.access(place, os.X_OK):
            return place
    if found := shutil.which(name):
        return Path(found)
    raise Unavailable(
        f"{name} was not found: neither in the triton package, nor in a CUDA toolkit, nor on PATH"
    )


def run_tool(name: str, *args: Any) -> str:
    """What a tool prints; the last argument is a file's path, or a cubin's or fat binary's bytes."""
    *options, subject = args
    if not isinstance(subject, bytes):
        return _run([find_tool(name), *options, subject])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(subject)
        file.flush()
        return _run([find_tool(name), *options, file.name])


def _run(command: list[Any], cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise Unavailable(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:500]}")
    return done.stdout


def extract(kind: str, what: str, path: Path) -> dict[str, bytes]:
    """Cubins ("elf") or PTX files ("ptx") of a fat binary by file name; `what` is a name, part of one, or "all"."""
    with tempfile.TemporaryDirectory() as folder:
        _run([find_tool("cuobjdump"), f"-x{kind}", what, path.resolve()], cwd=Path(folder))
        return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def version_of(name: str) -> str:
    """A tool's version, like "13.0.88"; "none" where it is not found."""
    try:
        text = run_tool(name, "--version")
    except Unavailable:
        return "none"
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else "unknown"


def resource_usage(subject: Path | bytes) -> dict[str, dict[str, int]]:
    """Registers (reg), stack, static shared and local bytes of each kernel of a cubin, by mangled name."""
    text = run_tool("cuobjdump", "--dump-resource-usage", subject)
    return {
        name: {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for name, line in re.findall(r"Function ([^:\n]+):\n([^\n]+)", text)
    }


def disassembly(cubin: bytes) -> str:
    """The code of a cubin, with labels."""
    return run_tool("nvdisasm", "-c", "-ndf", cubin)


def demangle(names: list[str]) -> dict[str, str]:
    """Kernels' names as C++ writes them, without namespaces and arguments; unchanged where c++filt is missing."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: _short(line) for name, line in zip(names, done.stdout.splitlines(), strict=True)}


def _short(name: str) -> str:
    """`void sdan_fast::cuda::f<float, 4>(int)` -> `f<float, 4>`."""
    name = re.sub(r"\(anonymous namespace\)::|\b(?:sdan_fast|cuda|at|native|c10)::", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            return name[:i]
    return name
