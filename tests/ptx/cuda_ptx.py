"""Compiles the CUDA kernels to PTX with nvcc and runs them in the PTX interpreter on torch CPU tensors."""

from __future__ import annotations

import functools
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
sys.path.insert(0, str(HERE.parent / "ptxrun"))
sys.path.insert(0, str(HERE.parent / "cuda_host"))
import ptxrun  # noqa: E402


@functools.cache
def nvcc() -> str | None:
    """The nvcc to use: CUDA_HOME's, the one on PATH, or one in a usual place; None if there is none."""
    places = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    found = [os.path.join(p, "bin", "nvcc") for p in places] + [shutil.which("nvcc") or ""]
    found += [str(p / "bin" / "nvcc") for p in sorted(Path("/usr/local").glob("cuda*"), reverse=True)]
    return next((path for path in found if path and os.path.exists(path)), None)


@functools.cache
def ptx(header: str, instances: tuple[str, ...], arch: int = 80) -> str:
    """PTX of explicit instances of the kernels of one header.

    instances: like "void star_forward_kernel<float, 4>(const float*, ...)".
    """
    lines = "\n".join(f"template __global__ {instance};" for instance in instances)
    source = f'#include "{header}"\nnamespace sdan_fast::cuda {{\n{lines}\n}}\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.cu"
        path.write_text(source)
        command = [
            str(nvcc()), "-ptx", f"-arch=sm_{arch}", "-std=c++20", "-O3", "-lineinfo",
            "-Werror", "all-warnings", f"-I{CUDA}", str(path), "-o", str(path.with_suffix(".ptx")),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return path.with_suffix(".ptx").read_text()


def entry(text: str, *parts: str) -> str:
    """The mangled name of the one kernel whose name has all the parts."""
    names = [n for n in re.findall(r"\.entry (\w+)", text) if all(p in n for p in parts)]
    assert len(names) == 1, (parts, names, re.findall(r"\.entry (\w+)", text))
    return names[0]


def as_array(t: Tensor | None) -> np.ndarray | None:
    """The memory span of a tensor as bytes, shared with it."""
    if t is None:
        return None
    whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()
    size = t.element_size()
    start = size * t.storage_offset()
    span = size * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
    return whole[start : start + span]


def run(
    text: str,
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    approx: str = "exact",
) -> ptxrun.Stats:
    """Run one kernel; tensors among `args` are changed in place. Faults, races and deadlocks raise."""
    values = [as_array(a) if isinstance(a, Tensor) else a for a in args]
    return ptxrun.run(text, kernel, grid, block, values, shared_bytes, approx=approx, batch_lanes=1 << 15)


@functools.cache
def _sums() -> str:
    signature = "(const float*, const SumParams)"
    kinds = ("true, 8", "false, 8", "false, 16")
    together = tuple(f"void sum_parts_together_kernel<{k}>(const SumJobs)" for k in (8, 16))
    return ptx("sum_parts.cuh", tuple(f"void sum_parts_kernel<{k}>{signature}" for k in kinds) + together)


def sum_parts(
    parts: Tensor,
    outputs: Sequence[Tensor | None],
    first: Sequence[int],
    outer: int,
    images: int,
    splits: int,
    strides: Sequence[int],
) -> ptxrun.Stats:
    """The second stage of a gradient's sums: `outer` rows of sums, output k has columns first[k] up to first[k + 1].

    strides, in floats: of rows, columns, images and splits of the partial sums.
    """
    raw, pointers, along, sums = sum_params(outputs, first, outer, images, splits, strides)
    name = entry(_sums(), f"sum_parts_kernelILb{int(along)}ELi{sums}E")
    return run(_sums(), name, -(-outer * first[-1] // sums), 256, [parts, ptxrun.Struct(raw, pointers)])


def sum_params(
    outputs: Sequence[Tensor | None], first: Sequence[int], outer: int, images: int, splits: int, strides: Sequence[int]
) -> tuple[bytes, dict[int, Any], bool, int]:  # fmt: skip
    """SumParams: their bytes, the pointers among them; whether terms lie beside each other; the sums of a block."""
    dtype = next(t.dtype for t in outputs if t is not None)
    inner, to = first[-1], [*outputs, *[None] * (4 - len(outputs))]
    at = [*first, *[inner] * (5 - len(first))]
    code = (torch.float32, torch.bfloat16, torch.float16).index(dtype)
    head = struct.pack("<2i7q", code, splits, outer, inner, images, *strides)
    pointers = {len(head) + 8 * i: as_array(t) for i, t in enumerate(to) if t is not None}
    along = strides[3] == 1 and splits > 1
    sums = 16 if not along and outer * inner >= 64 else 8  # of a block
    images_on, splits_on = divmod(256 // sums, splits)
    image, split = strides[2:]
    wrap = image - splits * split
    stride = image if splits == 1 else split if images == 1 or wrap == 0 else 0
    on = 256 // sums * stride if stride else images_on * image + splits_on * split
    way = struct.pack("<5q2q2iq", *at, on, stride, images_on, splits_on, wrap)
    return head + bytes(32) + way, pointers, along, sums


def sums_together(jobs: Sequence[tuple[Tensor, Sequence[Any]]]) -> ptxrun.Stats:
    """Several second stages in one launch: (partial sums, arguments of sum_params) of each."""
    raw, pointers, most, kinds = b"", {}, 0, set()
    for parts, arguments in jobs:
        params, to, along, sums = sum_params(*arguments)
        assert not along
        pointers[len(raw)] = as_array(parts)
        pointers |= {len(raw) + 8 + at: array for at, array in to.items()}
        raw += bytes(8) + params
        most = max(most, -(-arguments[2] * arguments[1][-1] // sums))
        kinds.add(sums)
    (sums,) = kinds
    name = entry(_sums(), f"sum_parts_together_kernelILi{sums}E")
    jobs_raw = raw + bytes(4 * len(raw) // len(jobs) - len(raw))
    return run(_sums(), name, (most, len(jobs)), 256, [ptxrun.Struct(jobs_raw, pointers)])


def weight_sums(
    parts: Tensor, weight: Tensor | None, bias: Tensor | None, channels: int, taps: int, images: int, splits: int,
    strides: Sequence[int],
) -> ptxrun.Stats:  # fmt: skip
    """Of rows of a weight's and a bias's sums; strides, in rows: of images, channels and splits."""
    image, channel, split = (n * (taps + 1) for n in strides)
    return sum_parts(
        parts, [weight, bias], [0, taps, taps + 1], channels, images, splits, [channel, 1, image, split]
    )
