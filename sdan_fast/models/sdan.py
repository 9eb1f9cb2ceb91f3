"""SDAN, the whole super-resolution network, and its checkpoints (safetensors only, nothing is ever unpickled).

The paper's full text and weights are not public. This follows its abstract (arXiv 2506.12475) and the public
development code of its first author, so it is *a reconstruction*.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..modules import (
    BRANCHES,
    PARTS,
    RSDAM,
    DepthwiseConv2d,
    PointwiseConv2d,
    check_channels,
    check_count,
    gather,
)
from ..reference import pixel_shuffle
from .files import replacing

__all__ = ["SDAN", "BSConv", "CheckpointError"]

# The head's 1x1 convolution sees the picture repeated this often on its channels.
_REPEATS = 4


class CheckpointError(ValueError):
    """A file or a state dict that is not one whole, finite SDAN; the message is one sentence that says why."""


def check_picture(x: Tensor) -> None:
    """Refuse what is no batch of RGB pictures.

    Raises:
        TypeError: if `x` is no tensor.
        ValueError: if `x` is not N x 3 x H x W.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, and it is a {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"x must have the shape (N, 3, H, W), and it has {tuple(x.shape)}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must have at least one row and one column, and its shape is {list(x.shape)}")


class BSConv(nn.Module):
    """Blueprint separable convolution: 1x1 without bias, then DW3x3 with bias.

    Args:
        channels_in: Ci.
        channels_out: Co.

    Shape: (N, Ci, H, W) -> (N, Co, H, W).
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        check_count("channels_in", channels_in)
        check_count("channels_out", channels_out)
        self.pw = PointwiseConv2d(channels_in, channels_out, bias=False)
        self.dw = DepthwiseConv2d(channels_out, (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.dw(self.pw(x))


PARTS[BSConv] = {"pw": PointwiseConv2d, "dw": DepthwiseConv2d}


class SDAN(nn.Module):
    """Star Distillation Attention Network for lightweight image super-resolution (a reconstruction).

    s = BSConv(x repeated 4 times on its channels); f_0 = s, f_i = RSDAM(f_{i-1}); f = tail(GELU(fuse([f_1..f_n]))) + s
    with fuse 1x1 nC->C and tail BSConv(C, C); out = PixelShuffle(up(f)), up dense 3x3 C->3*scale^2 with bias.

    Args:
        scale: how many times larger the output is, on each axis.
        channels: C, even and divisible by `groups`.
        blocks: n, the number of RSDAM blocks.
        groups: the number of branches of each block's MM-LKA, 1 to 4.

    Shape: (N, 3, H, W) -> (N, 3, scale * H, scale * W), RGB in [0, 1]; the output is not clamped.

    Raises:
        ValueError: for a configuration that does not exist, and in `forward` for an input that is not N x 3 x H x W.
    """

    def __init__(self, scale: int = 4, channels: int = 56, blocks: int = 8, groups: int = 2) -> None:
        super().__init__()
        self.scale = check_count("scale", scale)
        check_channels(channels, groups)
        self.channels = channels
        self.groups = groups
        self.head = BSConv(3 * _REPEATS, channels)
        self.blocks = nn.ModuleList(RSDAM(channels, groups) for _ in range(check_count("blocks", blocks)))
        self.fuse = PointwiseConv2d(blocks * channels, channels)
        self.tail = BSConv(channels, channels)
        self.up = nn.Conv2d(channels, 3 * scale * scale, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H, W): f, what the upsampling convolution `up` reads.

        Raises:
            ValueError: if `x` is not N x 3 x H x W.
        """
        check_picture(x)
        shallow = self.head(x.repeat(1, _REPEATS, 1, 1))
        deep = []
        f = shallow
        for block in self.blocks:
            f = block(f)
            deep.append(f)
        return self.tail(nn.functional.gelu(self.fuse(torch.cat(deep, dim=1)))) + shallow

    def forward(self, x: Tensor) -> Tensor:
        check_picture(x)
        call = self._as_one_op()
        if call is None:
            # Somebody looks at a part, or has put another in its place: each has to be called.
            return pixel_shuffle(self.up(self.features(x)), self.scale)
        tensors, layout = call
        return ops.sdan(x, *tensors, scale=self.scale, block_count=len(self.blocks), **layout)

    def _as_one_op(self) -> tuple[tuple[list[Tensor], ...], dict[str, Any]] | None:
        """The parameters and the layout of the blocks as `ops.sdan` takes them; None if the parts have to be called."""
        tensors: tuple[list[Tensor], ...] = ([], [], [], [], [])
        eps: set[float] = set()
        for part, found in zip(PARTS[SDAN], tensors, strict=True):
            if not gather(self._modules[part], PARTS[SDAN][part], found, eps):
                return None
        layouts = [cast("RSDAM", block).attn.layout() for block in self.blocks]
        lengths, dilations = layouts[0]
        whole = (3, len(layouts) * (38 + len(dilations)), 2, 3, 2)  # what there is with all biases
        if tuple(map(len, tensors)) != whole or len(eps) > 1 or any(other != layouts[0] for other in layouts):
            return None
        return tensors, {"lengths": lengths, "dilations": dilations, "eps": eps.pop()}

    @property
    def receptive_radius(self) -> int:
        """How many input pixels away, on each axis, an input pixel can still change an output one.

        Each block adds the four 3x3 star convolutions in a row (4) and the widest branch of MM-LKA; head, tail and up
        add 1 each. 315 at the defaults: an output pixel sees 631 x 631 input pixels.
        """
        widest = max((k - 1) // 2 * (1 + (k + 1) // 2) for _, _, k in BRANCHES[self.groups])
        return len(self.blocks) * (4 + widest) + 3

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, channels={self.channels}, blocks={len(self.blocks)}, groups={self.groups}"
        )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, source: str = "the state dict") -> SDAN:
        """Rebuild a model from a state dict alone: scale, channels, blocks and groups come from keys and shapes.

        Args:
            state: every parameter of one SDAN, all of one floating dtype, all finite. The model takes these tensors
                over without copying them.
            source: what to call the state dict in an error, usually its path.

        Raises:
            CheckpointError: naming the keys or shapes that do not fit.
        """
        scale, channels, blocks, groups = _configuration(state, source)
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            model = cls(scale, channels, blocks, groups)
        _check_state(model, state, source)
        model.load_state_dict(state, assign=True)
        return model

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> SDAN:
        """Rebuild a model from a safetensors file alone; metadata is not needed and no pickle is ever loaded.

        Args:
            path: the file. For a BasicSR-style .pth see `sdan_fast.models.convert`.
            device: where to put the parameters.
            dtype: a floating dtype to convert them to; None keeps the file's.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is not safetensors, is damaged, or holds something else than one whole SDAN.
        """
        model = cls.from_state_dict(_read_safetensors(Path(path)), source=str(path))
        return model.to(device=device, dtype=dtype)

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters to one safetensors file, whole or not at all.

        The configuration goes into the metadata for people who look; `from_checkpoint` does not need it.

        Raises:
            OSError: if the file cannot be written; an older file of that name is then untouched.
        """
        from safetensors.torch import save

        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        metadata = {
            "format": "pt",
            "architecture": "SDAN",
            "scale": str(self.scale),
            "channels": str(self.channels),
            "blocks": str(len(self.blocks)),
            "groups": str(self.groups),
        }
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(save(state, metadata))


PARTS[SDAN] = {
    "head": BSConv,
    "blocks": RSDAM,
    "fuse": PointwiseConv2d,
    "tail": BSConv,
    "up": nn.Conv2d,
}  # in the order of the op's arguments


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or a clear error."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading checkpoints needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        hint = ""
        if path.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin"):
            hint = "; a BasicSR-style .pth is read by `python -m sdan_fast.models.convert`"
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}){hint}") from error


def _configuration(state: Mapping[str, Tensor], source: str) -> tuple[int, int, int, int]:
    """(scale, channels, blocks, groups) from keys and shapes."""

    def count(pattern: str, what: str) -> int:
        """How many indices n match, which must be 0..n-1."""
        found = {int(m[1]) for key in state if (m := re.match(pattern, key))}
        if not found:
            raise CheckpointError(f"{source} is not an SDAN checkpoint: it has no {what}")
        if found != set(range(len(found))):
            raise CheckpointError(
                f"{source} is not a whole SDAN checkpoint: its {what} are not numbered 0, 1, 2, ..."
            )
        return len(found)

    for key in ("head.pw.weight", "up.weight"):
        if key not in state or state[key].dim() != 4:
            what = "no" if key not in state else "no 4-D"
            raise CheckpointError(f"{source} is not an SDAN checkpoint: it has {what} tensor {key!r}")
    blocks = count(r"blocks\.(\d{1,9})\.", "blocks")
    groups = count(r"blocks\.0\.attn\.branches\.(\d{1,9})\.", "branches in block 0")
    channels = state["head.pw.weight"].shape[0]
    outputs = state["up.weight"].shape[0]
    scale = math.isqrt(outputs // 3)
    if scale < 1 or 3 * scale * scale != outputs:
        raise CheckpointError(f"{source}: 'up.weight' must have 3*scale^2 outputs, and it has {outputs}")
    try:
        check_channels(channels, groups)
    except ValueError as error:
        raise CheckpointError(f"{source} is not an SDAN checkpoint: {error}") from error
    return scale, channels, blocks, groups


def _check_state(model: SDAN, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state dict that is not exactly this model's, in one floating dtype and finite."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        parts = [f"{word} {few(keys)}" for word, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise CheckpointError(f"{source} does not hold an SDAN of its shape: {'; '.join(parts)}")
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise CheckpointError(
                f"{source}: {key!r} must have the shape {shape}, and it has {tuple(state[key].shape)}"
            )
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    if len(dtypes) > 1 or not state["up.weight"].is_floating_point():
        raise CheckpointError(
            f"{source}: all tensors must have one floating dtype, and they have {', '.join(dtypes)}"
        )
    for key, value in state.items():
        if not torch.isfinite(value.to(torch.float32) if value.element_size() < 2 else value).all():
            raise CheckpointError(f"{source}: {key!r} holds NaN or infinite values")


def few(keys: list[str], most: int = 4) -> str:
    """The first few keys, quoted, and how many more there are."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(repr(key) for key in keys[:most]) + more
