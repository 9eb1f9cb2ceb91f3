"""Settings per device: optional JSON files that replace choices of heuristics.py; `sdan-fast tune` writes one.

A file is looked for once, at the first launch on a GPU: in the folder that SDAN_FAST_SETTINGS names, then in settings/
beside this module. Nothing is ever timed here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VARIABLE = "SDAN_FAST_SETTINGS"
FORMAT = 1

# What may be chosen, by kernel: every combination gives right results, if not every one compiles on every device.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "star": {"BLOCK": (512, 1024, 2048), "warps": (2, 4, 8)},
    "conv_nchw_rows": {"R": (1, 2, 4), "M": (1, 2, 4), "warps": (2, 4, 8)},
    "conv_nchw_columns": {"R": (2, 4, 8)},
    "conv_nchw_squares": {"R": (1, 2, 4), "warps": (2, 4, 8)},
    "wgrad_nchw": {"CHUNKS": (2, 4, 8, 16)},
    "conv_nhwc": {"P": (4, 8, 16), "warps": (2, 4, 8)},
    "wgrad_nhwc": {"P": (4, 8), "CHUNKS": (2, 4, 8, 16)},
    "layer_norm2d": {"elements": (1024, 2048, 4096, 8192)},
    "layer_norm2d_backward": {"elements": (1024, 2048, 4096)},
    "pointwise": {"BO": (16, 32, 64), "BI": (16, 32, 64), "BP": (32, 64, 128), "warps": (4, 8)},
    "pointwise_wgrad": {"BP": (32, 64), "TILES": (4, 8, 16)},
    "pointwise_wgrad_planes": {"CHUNKS": (4, 8, 16, 32)},
    "norm_pointwise": {"BO": (16, 32, 64), "BP": (16, 32, 64)},
    "norm_pointwise_grad": {"BO": (16, 32, 64), "BP": (16, 32, 64)},
}

Table = dict[str, dict[str, dict[str, int]]]  # kernel -> class of calls -> choice -> value

_table: Table | None = None  # of this process's device; None until the first launch asks


class SettingsError(ValueError):
    """A settings file that cannot be used, with the place and what was expected there."""


def file_name(device: str) -> str:
    """The name of a device's file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def validated(content: Any, where: str) -> Table:
    """The settings of a file's content; SettingsError with the place of the first thing that is wrong."""
    if not isinstance(content, dict):
        raise SettingsError(f"{where}: expected a JSON object, got {type(content).__name__}")
    if content.get("format") != FORMAT:
        raise SettingsError(f"{where}: format must be {FORMAT}, got {content.get('format')!r}")
    kernels = content.get("settings")
    if not isinstance(kernels, dict):
        raise SettingsError(f"{where}: settings must be an object of kernels, got {type(kernels).__name__}")
    for kernel, classes in kernels.items():
        if kernel not in CHOICES:
            raise SettingsError(f"{where}: settings has no kernel {kernel!r} (it has {', '.join(CHOICES)})")
        if not isinstance(classes, dict):
            raise SettingsError(f"{where}: settings.{kernel} must be an object, got {type(classes).__name__}")
        for name, chosen in classes.items():
            place = f"{where}: settings.{kernel}[{name!r}]"
            if not isinstance(chosen, dict):
                raise SettingsError(f"{place} must be an object, got {type(chosen).__name__}")
            for choice, value in chosen.items():
                allowed = CHOICES[kernel].get(choice)
                if allowed is None:
                    raise SettingsError(
                        f"{place} has no choice {choice!r} (it has {', '.join(CHOICES[kernel])})"
                    )
                if isinstance(value, bool) or value not in allowed:
                    values = ", ".join(map(str, allowed))
                    raise SettingsError(f"{place}.{choice} must be one of {values}, got {value!r}")
    return kernels


def load(path: Path) -> Table:
    """The settings in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path}: is not JSON: {error}") from None
    return validated(content, str(path))


def write(path: Path, device: str, table: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Write a device's file."""
    content = {"format": FORMAT, "device": device, "settings": table}
    validated(content, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def find(device: str) -> Path | None:
    """The file of a device, or None: in SDAN_FAST_SETTINGS' folder first, then among the shipped ones."""
    folders = [Path(__file__).with_name("settings")]
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_dir():
            raise SettingsError(f"{VARIABLE} names {named}, which is not a folder")
        folders.insert(0, Path(named))
    return next((f for folder in folders if (f := folder / file_name(device)).is_file()), None)


def table() -> Table:
    """The settings in force: of the current GPU, read at the first call, and none where there is no GPU."""
    global _table
    if _table is None:
        path = find(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        _table = load(path) if path is not None else {}
    return _table


def tuned(kernel: str, calls: str, **defaults: int) -> dict[str, int]:
    """The choices of a kernel for a class of calls: the defaults, but for what the device's file says otherwise."""
    if _recorder is not None:
        _recorder.setdefault((kernel, calls), dict(defaults))
    chosen = table().get(kernel, {}).get(calls)
    return {**defaults, **{k: v for k, v in chosen.items() if k in defaults}} if chosen else defaults


_recorder: dict[tuple[str, str], dict[str, int]] | None = None


@contextmanager
def recorded() -> Iterator[dict[tuple[str, str], dict[str, int]]]:
    """Collect what the launches of this block ask for: {(kernel, class of calls): defaults}."""
    global _recorder
    before, _recorder = _recorder, {}
    try:
        yield _recorder
    finally:
        _recorder = before


@contextmanager
def in_force(new: Table) -> Iterator[None]:
    """Use these settings in this block, in the place of the device's."""
    global _table
    before, _table = _table, new
    try:
        yield
    finally:
        _table = before
