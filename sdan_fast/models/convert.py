"""Turns a BasicSR-style .pth into this package's state dict or safetensors file.

    python -m sdan_fast.models.convert net_g.pth sdan_x4.safetensors

The file is read with `torch.load(weights_only=True)`: tensors and plain containers, never code. The layout is the
first author's, that of the public development code for groups=2, or this package's own, as someone who trains
`sdan_fast.models.SDAN` saves it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sdan import SDAN, CheckpointError, few

__all__ = ["convert_state_dict", "from_basicsr"]

# The first author's names, as patterns, and ours. Blocks count from 1 there and from 0 here.
_STAR = {"pixel_norm": "norm", "pw1": "pw1", "dw1.0": "dw", "pw2": "pw2"}
_BRANCH = {"LSK1": 0, "LSK2": 1}  # the square branch, the strips
_TOP = {
    "fea_conv.pw": "head.pw",
    "fea_conv.dw": "head.dw",
    "c1": "fuse",
    "c2.pw": "tail.pw",
    "c2.dw": "tail.dw",
    "upsampler.0": "up",
}
# What names in this package's layout begin with; none of the first author's does.
_OURS = ("head.", "blocks.", "fuse.", "tail.", "up.")
_IN_BLOCK = {"c5": "sdm.fuse", "atten.pointwise": "attn.proj", "c6": "proj", "pixel_norm": "norm"}


def _renamed(name: str) -> str | None:
    """Our name of one of the first author's modules (no ".weight" or ".bias"); None if there is none."""
    if name in _TOP:
        return _TOP[name]
    block = re.fullmatch(r"B([1-9]\d{0,8})\.(.+)", name)
    if block is None:
        return None
    prefix, inner = f"blocks.{int(block[1]) - 1}.", block[2]
    if inner in _IN_BLOCK:
        return prefix + _IN_BLOCK[inner]
    if m := re.fullmatch(r"c([123])_d", inner):
        return f"{prefix}sdm.distill.{int(m[1]) - 1}"
    if (m := re.fullmatch(r"c(?:([123])_r|4)\.(.+)", inner)) and m[2] in _STAR:
        return f"{prefix}sdm.star.{int(m[1] or 4) - 1}.{_STAR[m[2]]}"
    if m := re.fullmatch(r"atten\.(LSK[12])\.(\d{1,2})", inner):
        return f"{prefix}attn.branches.{_BRANCH[m[1]]}.{int(m[2])}"
    return None


def convert_state_dict(state: Mapping[str, Any], *, source: str = "the state dict") -> dict[str, Tensor]:
    """A state dict in this package's layout, renamed from the first author's if need be; tensors are not copied.

    Args:
        state: a flat state dict in either layout, or BasicSR's dict of them, of which `params_ema` is preferred to
            `params`. A `module.` prefix on every key (DataParallel's) is dropped.
        source: what to call it in an error, usually its path.

    Raises:
        CheckpointError: naming the keys that have no place here.
    """
    state = _flat(state, source)
    ours = _is_ours(state)
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in state.items():
        name, _, leaf = key.rpartition(".")
        renamed = _renamed(name) if not ours else name if key.startswith(_OURS) else None
        if renamed is None or leaf not in ("weight", "bias") or not isinstance(value, Tensor):
            unknown.append(key)
        else:
            converted[f"{renamed}.{leaf}"] = value
    if unknown:
        layout = "this package's" if ours else "the first author's"
        raise CheckpointError(f"{source} has keys that {layout} SDAN layout does not: {few(unknown)}")
    return converted


def _flat(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The state dict itself, out of BasicSR's dict of them and without DataParallel's prefix."""
    for key in ("params_ema", "params"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not state:
        raise CheckpointError(f"{source} holds no parameters")
    flat = {str(key): value for key, value in state.items()}
    if all(key.startswith("module.") for key in flat):
        flat = {key.removeprefix("module."): value for key, value in flat.items()}
    return flat


def _is_ours(flat: Mapping[str, Any]) -> bool:
    """Whether a flat state dict is in this package's layout."""
    return any(key.startswith(_OURS) for key in flat)


def from_basicsr(path: str | os.PathLike[str]) -> SDAN:
    """An SDAN from a BasicSR-style .pth file.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, needs code to load, or does not hold one whole SDAN.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file makes the unpickler raise is anybody's guess
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as a plain PyTorch checkpoint ({reason})") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} must hold a dict of tensors, and it holds a {type(loaded).__name__}")
    flat = _flat(loaded, str(path))
    source = str(path) if _is_ours(flat) else f"{path} (renamed)"
    return SDAN.from_state_dict(convert_state_dict(flat, source=str(path)), source=source)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sdan_fast.models.convert IN.pth OUT.safetensors`; exit code 2 for wrong input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        print("usage: python -m sdan_fast.models.convert IN.pth OUT.safetensors", file=sys.stderr)
        return 2
    try:
        model = from_basicsr(arguments[0])
        model.save_checkpoint(arguments[1])
    except (OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments[1]}: SDAN({model.extra_repr()})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
