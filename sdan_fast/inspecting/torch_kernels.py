"""PyTorch's own depth-wise kernels, read from the installed libtorch_cuda.so, for perspective.

The library holds half a gigabyte of fat binaries, one for each of its source files. Each is a small file of its own
as far as cuobjdump is concerned: they are cut out of the section one by one until the one with the wanted kernels turns
up, and where that was is remembered in the user's cache folder.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from .tools import Unavailable, extract, run_tool

_FATBIN_MAGIC = 0xBA55ED50
WANTED = "conv_depthwise2d"


def library() -> Path:
    """The installed libtorch_cuda.so."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed")
    path = Path(spec.origin).parent / "lib" / "libtorch_cuda.so"
    if not path.is_file():
        raise Unavailable(
            "the installed torch has no libtorch_cuda.so (a build for CPUs), so its kernels cannot be shown"
        )
    return path


def _fat_binaries(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """(offset, size) of every fat binary in the .nv_fatbin section of an ELF file."""
    at, entry, count, names = (*struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HHH", data, 0x3A))
    headers = [struct.unpack_from("<IIQQQQ", data, at + i * entry) for i in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, size in headers:
        if data[strings + name : strings + name + 11] == b".nv_fatbin\0":
            start, end = offset, offset + size
            break
    else:
        raise Unavailable("libtorch_cuda.so has no section of fat binaries")
    while start + 16 <= end:
        magic, _, header, size = struct.unpack_from("<IHHQ", data, start)
        if magic != _FATBIN_MAGIC:
            start += 8
            continue
        yield start, header + size
        start += header + size


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "sdan_fast" / "torch_kernels.json"


def fat_binary(path: Path | None = None) -> bytes:
    """The fat binary that holds the depth-wise kernels."""
    path = path or library()
    about = path.stat()
    identity = f"{path} {about.st_size} {about.st_mtime_ns}"
    try:
        remembered = json.loads(_cache().read_text()).get(identity)
    except (OSError, ValueError):
        remembered = None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        if remembered:
            return data[remembered[0] : remembered[0] + remembered[1]]
        for start, size in _fat_binaries(data):
            blob = data[start : start + size]
            if WANTED in run_tool("cuobjdump", "-symbols", "-arch", "sm_90", blob):
                try:
                    _cache().parent.mkdir(parents=True, exist_ok=True)
                    _cache().write_text(json.dumps({identity: [start, size]}))
                except OSError:
                    pass  # a read-only home only makes the next search as long as this one
                return blob
    raise Unavailable(f"libtorch_cuda.so has no kernel named {WANTED} for sm_90")


def cubins() -> dict[str, bytes]:
    """The cubins of PyTorch's depth-wise kernels, by architecture."""
    with tempfile.NamedTemporaryFile(suffix=".fatbin") as file:
        file.write(fat_binary())
        file.flush()
        found = extract("elf", "all", Path(file.name))
    return {name.split(".")[-2]: data for name, data in found.items()}
