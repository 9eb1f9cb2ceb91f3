"""Triton or CUDA C++, where both can run a call: a written rule, which a measurement on a GPU replaces.

A measurement is a file `<gpu>.json` in this folder, made by scripts/preferences.py from what `make gpu-check` writes:

    {"gpu": "NVIDIA H100 80GB HBM3", "measured": {...}, "preferences": [
        {"op": "star", "kind": "", "layout": "contiguous", "dtype": "float32", "sizes": [
            {"elements": 1000, "backend": "cuda", "ratio": 1.4},
            {"elements": 3225600, "backend": "triton", "ratio": 1.02}]}, ...]}

`kind` is that of `kind_of`, or "" for any; `elements` those of the op's first tensor, ascending; `ratio` how many times
longer the other backend took. A call takes the first size that is not smaller than its own, else the last; a compiled
one takes the last, so that its graph does not depend on sizes. What a file leaves out, the rule decides.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
FORMAT_KEYS = ("op", "kind", "layout", "dtype")


class Preference(NamedTuple):
    """Which of the two comes first for a call, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """CUDA C++ comes first for the calls of one op that match."""

    op: str
    reason: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    layouts: tuple[str, ...] = ("contiguous", "channels_last")
    kinds: tuple[str, ...] = ("",)

    def matches(self, kind: str, layout: str, dtype: str) -> bool:
        return dtype in self.dtypes and layout in self.layouts and ("" in self.kinds or kind in self.kinds)


# Derived from counts, not from times; docs/decisions.md has the numbers.
_PRODUCT = "its float32 products are cuBLAS's, and Triton's are plain FMAs with bank conflicts"
RULES = (
    Rule("star_conv", _PRODUCT, dtypes=("float32",)),
    Rule("pointwise_gate", _PRODUCT, dtypes=("float32",)),
)
DEFAULT = Preference(
    "triton", "its launches are visible to Inductor, and it needs no kernel image for the GPU at hand"
)

Key = tuple[str, ...]  # in the order of FORMAT_KEYS
Sizes = list[tuple[int, Preference]]
_by_gpu: dict[str, dict[Key, Sizes]] = {}
_gpu_of_device: dict[int, str] = {}


def file_of(gpu: str, folder: Path = FOLDER) -> Path:
    """The file of a GPU by its name: in lower case, with dashes."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def load(path: Path) -> dict[Key, Sizes]:
    """The preferences of one file.

    Raises:
        ValueError: if it is not of the format above; nobody should run on half a measurement.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table: dict[Key, Sizes] = {}
        for entry in found["preferences"]:
            sizes = [
                (
                    int(size["elements"]),
                    Preference(
                        size["backend"],
                        f"measured on {found['gpu']}: {float(size['ratio']):.2f} times as fast",
                    ),
                )
                for size in entry["sizes"]
            ]
            if not sizes or sizes != sorted(sizes, key=lambda s: s[0]):
                raise ValueError("sizes must be ascending, and at least one")
            if any(p.backend not in ("triton", "cuda") for _, p in sizes):
                raise ValueError("backend must be triton or cuda")
            table[tuple(str(entry[key]) for key in FORMAT_KEYS)] = sizes
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of preferences: {error!r}") from error
    return table


def _measured(device: int) -> dict[Key, Sizes]:
    """What was measured on the GPU at hand; read once for each GPU, at its first call."""
    gpu = _gpu_of_device.get(device)
    if gpu is None:
        gpu = _gpu_of_device[device] = torch.cuda.get_device_name(device)
    table = _by_gpu.get(gpu)
    if table is None:
        path = file_of(gpu)
        table = _by_gpu[gpu] = load(path) if path.exists() else {}
    return table


def look_up(op: str, kind: str, layout: str, dtype: str, device: int, elements: int) -> Preference:
    """The preference for a call by its traits; `elements` is -1 in a compiled function."""
    table = _measured(device)
    for k in (kind, ""):
        sizes = table.get((op, k, layout, dtype))
        if sizes is not None:
            fitting = (p for limit, p in sizes if 0 <= elements <= limit)
            return next(fitting, sizes[-1][1])
    for rule in RULES:
        if rule.op == op and rule.matches(kind, layout, dtype):
            return Preference("cuda", rule.reason)
    return DEFAULT


# Dynamo asks once while tracing, and does not look inside. torch.compiler.assume_constant_result sets no more than
# this, but imports all of Dynamo for it, which takes several times as long as the rest of `import sdan_fast`.
look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kind_of(op: str, args: tuple[Any, ...]) -> str:
    """What kernels of one op differ by beside layout and dtype: "row", "column" or "square" taps."""
    if op != "depthwise_conv2d":
        return ""
    return kind_of_taps(*args[1].shape[-2:])


def kind_of_taps(kh: int, kw: int) -> str:
    """The kind of a depth-wise convolution."""
    return "row" if kh == 1 and kw > 1 else "column" if kw == 1 and kh > 1 else "square"


_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def preferred(op: str, args: tuple[Any, ...]) -> Preference:
    """Which of Triton and CUDA C++ comes first for a call that both can run."""
    x: Tensor = args[0]
    last = (
        x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )  # as reference.output_format
    elements = -1 if torch.compiler.is_compiling() else x.numel()
    layout = "channels_last" if last else "contiguous"
    device = x.device.index
    return look_up(op, kind_of(op, args), layout, _NAMES[x.dtype], -1 if device is None else device, elements)
