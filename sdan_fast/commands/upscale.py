"""`sdan-fast upscale`: enlarge pictures with a checkpoint, in tiles, without ever leaving a half-written file."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from torch import Tensor

from sdan_fast import use_backend
from sdan_fast.models import SDAN
from sdan_fast.models.files import replacing

from . import terminal

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DEFAULT_TILE = 384
DEFAULT_OVERLAP = 64
_LUMA = (0.299, 0.587, 0.114)
# What a file of this kind can hold besides 8-bit RGB and grayscale.
_ALPHA = {"PNG", "TIFF", "WEBP", "JPEG2000", "TGA", "AVIF"}
_GRAY16 = {"PNG", "TIFF", "JPEG2000"}
# EXIF tags that describe the file or the pixels' order, and not the picture: TIFF keeps both in one table.
_ABOUT_THE_FILE = (
    *(
        0x0100,
        0x0101,
        0x0102,
        0x0103,
        0x0106,
        0x010A,
        0x0111,
        0x0112,
        0x0115,
        0x0116,
        0x0117,
        0x011C,
        0x013D,
        0x0140,
    ),
    *(0x00FE, 0x0142, 0x0143, 0x0144, 0x0145, 0x0152, 0x0153, 0x8773),
)
# Modes whose colour profile still holds for the grayscale or RGB picture that is made of them.
_SAME_SPACE = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa")
_SAVE: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}


class PictureError(Exception):
    """A picture that cannot be read, enlarged or written; the message is one sentence."""


@dataclass
class Picture:
    """What is needed of a picture file: colours for the model, and what has to reach the result untouched by it.

    Attributes:
        rgb: (1, 3, H, W) float32 in [0, 1]; a grayscale picture three times.
        gray: whether the result is grayscale again.
        bits: 8 or 16 a channel, in the result as in the file.
        alpha: an 8-bit "L" image, or None.
        exif: without the orientation, which is applied to the pixels.
        icc: the colour profile; only where the result has the file's colour space.
        notes: what could not be kept, one sentence each.
    """

    rgb: Tensor
    gray: bool = False
    bits: int = 8
    alpha: Image.Image | None = None
    exif: bytes | None = None
    icc: bytes | None = None
    notes: list[str] = field(default_factory=list)


# --- reading -----------------------------------------------------------------------------------------------------


def read_picture(path: Path) -> Picture:
    """Read any picture that Pillow reads.

    Raises:
        PictureError: if there is none, it is damaged, too large to be meant (Pillow's limit), or of a kind that has
            no meaning here (32-bit values).
    """
    try:
        with warnings.catch_warnings(record=True) as said, Image.open(path) as image:
            warnings.simplefilter("always")
            frames = getattr(image, "n_frames", 1)
            deep_colour = _deeper_than_read(image)
            image.load()
            exif, icc = image.getexif(), image.info.get("icc_profile")
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise PictureError(f"there is no file {path}") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{path} is not a picture that Pillow reads") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        reason = str(error).strip() or type(error).__name__
        raise PictureError(f"{path} cannot be read: {reason}") from error
    if 0 in upright.size:
        raise PictureError(f"{path} has no pixels")
    picture = _converted(upright, path)
    for tag in _ABOUT_THE_FILE:
        exif.pop(tag, None)
    picture.exif = exif.tobytes() if len(exif) else None
    if upright.mode in _SAME_SPACE or upright.mode.startswith("I"):
        picture.icc = icc
    elif icc:
        picture.notes.append(
            f"{path}: the colour profile is that of {upright.mode} and does not fit the RGB result"
        )
    # What Pillow has to say (a very large picture, damaged metadata), as a line like every other.
    picture.notes += dict.fromkeys(f"{path}: {warning.message}" for warning in said)
    if frames > 1:
        picture.notes.append(f"{path} has {frames} frames, and only the first was enlarged")
    if deep_colour:
        picture.notes.append(f"{path} has 16-bit colours, which Pillow reads as 8-bit ones")
    return picture


def _deeper_than_read(image: Image.Image) -> bool:
    """Whether the file has 16 bits a channel where Pillow keeps 8 of them: it has no such colour mode."""
    rawmodes = [
        tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in getattr(image, "tile", [])
    ]
    return not image.mode.startswith("I") and any(";16" in str(mode) for mode in rawmodes)


def _converted(image: Image.Image, path: Path) -> Picture:
    """Colours and alpha of an upright image."""
    mode = image.mode
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError(f"{path} has 32-bit values beyond 0..65535, whose meaning is unknown")
        gray = torch.from_numpy(values.astype(np.float32) / 65535)
        return Picture(gray.expand(1, 3, -1, -1), gray=True, bits=16)
    if mode == "F":
        raise PictureError(f"{path} has 32-bit floating values, whose range is unknown")
    alpha = None
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    rgb = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    return Picture(rgb, gray=mode in ("1", "L", "LA", "La"), alpha=alpha)


# --- enlarging ---------------------------------------------------------------------------------------------------


def windows(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Cut an axis into tiles: (start, stop) of what is kept of each, then (start, stop) of what the model sees."""
    if tile <= 0 or tile >= length:
        return [(0, length, 0, length)]
    cuts = [*range(0, length, tile), length]
    return [(a, b, max(0, a - overlap), min(length, b + overlap)) for a, b in itertools.pairwise(cuts)]


def enlarge(
    model: SDAN,
    rgb: Tensor,
    *,
    tile: int,
    overlap: int,
    on_tile: Callable[[int, int], object] = lambda done, of: None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Run the model over a picture in tiles: (top, left, (1, 3, h, w) float32) of each piece of the result.

    Each tile is computed from a window that is `overlap` pixels larger on each side, where the picture goes on. With
    `overlap >= model.receptive_radius` the result is that of the whole picture at once, but for rounding.

    Args:
        model: in eval mode, on its device.
        rgb: (1, 3, H, W) float32 in [0, 1], anywhere.
        tile: side of a tile in input pixels; 0 for the whole picture at once.
        overlap: in input pixels.
        on_tile: told after each tile how many are done and how many there are.

    Raises:
        PictureError: if the model produces NaN or infinity.
    """
    weight = model.up.weight
    rows, columns = windows(rgb.shape[2], tile, overlap), windows(rgb.shape[3], tile, overlap)
    s = model.scale
    done = 0
    for top, bottom, above, below in rows:
        for left, right, before, after in columns:
            window = rgb[:, :, above:below, before:after].to(weight.device, weight.dtype).contiguous()
            result = model(window)
            kept = result[
                :, :, s * (top - above) : s * (bottom - above), s * (left - before) : s * (right - before)
            ]
            if not torch.isfinite(kept).all():
                raise PictureError(
                    "the model produced NaN or infinite values: its weights do not fit this dtype"
                )
            yield s * top, s * left, kept.float().cpu()
            done += 1
            on_tile(done, len(rows) * len(columns))


def upscale_picture(
    model: SDAN, picture: Picture, *, tile: int, overlap: int, on_tile: Callable[[int, int], object]
) -> Image.Image:
    """The enlarged picture as an image of the same kind: grayscale, 16-bit, with alpha."""
    s = model.scale
    height, width = (side * s for side in picture.rgb.shape[2:])
    kind = np.uint16 if picture.bits == 16 else np.uint8
    top_value = np.iinfo(kind).max
    pixels = np.empty((height, width) if picture.gray else (height, width, 3), dtype=kind)
    luma = torch.tensor(_LUMA).view(1, 3, 1, 1)
    for top, left, piece in enlarge(model, picture.rgb, tile=tile, overlap=overlap, on_tile=on_tile):
        if picture.gray:
            piece = (piece * luma).sum(dim=1, keepdim=True)
        values = (piece[0].clamp(0, 1) * top_value).round().permute(1, 2, 0).numpy().astype(kind)
        h, w = values.shape[:2]
        pixels[top : top + h, left : left + w] = values[..., 0] if picture.gray else values
    image = Image.fromarray(pixels)
    if picture.alpha is not None:
        image.putalpha(picture.alpha.resize((width, height), Image.Resampling.BICUBIC))
    return image


# --- writing -----------------------------------------------------------------------------------------------------


def format_of(path: Path) -> str:
    """Pillow's name of the format that a path's suffix means.

    Raises:
        PictureError: if there is none, or Pillow cannot write it.
    """
    name = Image.registered_extensions().get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        suffix = path.suffix or "a name without one"
        raise PictureError(
            f"{path} cannot be written: no picture format that Pillow writes has the suffix {suffix}"
        )
    return name


def check_fits(picture: Picture, path: Path) -> str:
    """The format of `path`, if it can hold this picture.

    Raises:
        PictureError: where alpha or 16 bits would be lost in silence.
    """
    name = format_of(path)
    if picture.alpha is not None and name not in _ALPHA:
        raise PictureError(f"{path}: {name} holds no transparency, which this picture has; .png does")
    if picture.bits == 16 and name not in _GRAY16:
        raise PictureError(f"{path}: {name} does not hold 16-bit grayscale, which this picture is; .png does")
    return name


def write_picture(image: Image.Image, picture: Picture, path: Path, name: str) -> None:
    """Write the result, with the EXIF and ICC data of its origin, whole or not at all.

    Raises:
        PictureError: if that is not possible.
    """
    extra = dict(_SAVE.get(name, {}))
    if picture.exif:
        extra["exif"] = picture.exif
    if picture.icc:
        extra["icc_profile"] = picture.icc
    try:
        with replacing(path) as temporary:
            image.save(temporary, format=name, **extra)
    except (OSError, ValueError, KeyError) as error:
        raise PictureError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error


# --- the command -------------------------------------------------------------------------------------------------


def plan(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Which file becomes which.

    Raises:
        PictureError: if there is nothing to do, or it cannot be done as asked.
    """
    Image.init()
    if not source.exists():
        raise PictureError(f"there is no file or folder {source}")
    if not source.is_dir():
        path = target / f"{source.stem}.png" if target.is_dir() else target
        format_of(path)
        if not path.parent.is_dir():
            raise PictureError(f"there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise PictureError(f"the folder {path.parent} cannot be written to")
        pairs = [(source, path)]
    else:
        if target.exists() and not target.is_dir():
            raise PictureError(f"{source} is a folder, so {target} must be one too, and it is a file")
        readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
        files = sorted(f for f in source.iterdir() if f.is_file() and f.suffix.lower() in readable)
        if not files:
            raise PictureError(f"there are no pictures in the folder {source}")
        pairs = [(f, target / f"{f.stem}.png") for f in files]
        origins: dict[Path, Path] = {}
        for origin, path in pairs:
            if path in origins:
                raise PictureError(f"{origins[path].name} and {origin.name} would both become {path.name}")
            origins[path] = origin
    for origin, path in pairs:
        if path.exists() and path.samefile(origin):
            raise PictureError(f"{path} would overwrite the picture that it is made of")
    return pairs


def _overlap(text: str, model: SDAN) -> int:
    if text == "exact":
        return model.receptive_radius
    if not text.isdecimal():
        raise typer.BadParameter(
            f"must be a number of pixels or `exact`, and it is {text!r}", param_hint="--overlap"
        )
    return int(text)


def upscale(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A picture, or a folder of them.", show_default=False)
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The file to write, or a folder (for PNG files).", show_default=False
        ),
    ],
    weights: Annotated[
        Path,
        typer.Option(
            "--weights", "-w", metavar="FILE", help="A safetensors checkpoint of SDAN.", show_default=False
        ),
    ],
    tile: Annotated[
        int,
        typer.Option(
            "--tile",
            metavar="N",
            min=0,
            help="Side of a tile in input pixels, which bounds the memory; 0: no tiles.",
        ),
    ] = DEFAULT_TILE,
    overlap: Annotated[
        str,
        typer.Option(
            "--overlap",
            metavar="PIXELS",
            help="How far the model sees beyond a tile, in input pixels; `exact` is its whole receptive field.",
        ),
    ] = str(DEFAULT_OVERLAP),
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="reference, cpu, triton, cuda, or auto: the first that can.",
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help=f"{', '.join(DTYPES)}.")] = "float32",
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, or auto: cuda where there is one.")
    ] = "auto",
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave results alone that are already there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")] = False,
) -> None:
    """Enlarge a picture, or every picture of a folder, by the factor of the checkpoint.

    Grayscale, 16-bit grayscale, transparency, EXIF (rotation applied) and colour profiles are kept. A result appears
    whole or not at all. Exit code 0: all written; 1: some pictures failed, the others were written; 2: wrong use.
    """
    terminal.require_backend(backend)
    if dtype not in DTYPES:
        raise typer.BadParameter(
            f"must be one of {', '.join(DTYPES)}, and it is {dtype!r}", param_hint="--dtype"
        )
    try:
        place = torch.device(
            "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        )
        model = SDAN.from_checkpoint(weights, dtype=DTYPES[dtype])
        pairs = plan(source, target)
        model = model.to(place).eval()
    except (OSError, ValueError, PictureError, RuntimeError, AssertionError) as error:
        terminal.fail(str(error).splitlines()[0])
    pixels = _overlap(overlap, model)
    if source.is_dir():
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            terminal.fail(f"cannot make the folder {target}: {error.strerror}")
        if not os.access(target, os.W_OK):
            terminal.fail(f"the folder {target} cannot be written to")
    if skip_existing:
        pairs = [(origin, path) for origin, path in pairs if not path.exists()]

    failures = 0
    with torch.inference_mode(), use_backend(backend), nullcontext() if quiet else terminal.progress() as bar:
        whole = bar.add_task("pictures", total=len(pairs)) if bar and len(pairs) > 1 else None
        for origin, path in pairs:
            try:
                size = _upscale_file(model, origin, path, tile, pixels, bar)
            except PictureError as error:
                failures += 1
                terminal.error(str(error))
            except (RuntimeError, MemoryError) as error:
                failures += 1
                terminal.error(f"{origin}: {_why(error)}")
            else:
                if not quiet:
                    terminal.console().print(f"{origin} -> {path}, {size[0]} x {size[1]}", soft_wrap=True)
            if bar and whole is not None:
                bar.advance(whole)
    if failures:
        if len(pairs) > 1:
            terminal.error(f"{failures} of {len(pairs)} pictures failed")
        raise typer.Exit(terminal.FAILED)


def _why(error: BaseException) -> str:
    """A torch error in one line; running out of memory with what helps."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in text.lower():
        return f"out of memory; try a smaller --tile ({text})"
    return text


def _upscale_file(
    model: SDAN, origin: Path, path: Path, tile: int, overlap: int, bar: Any
) -> tuple[int, int]:
    """Read, enlarge, write; the (width, height) of the result."""
    picture = read_picture(origin)
    name = check_fits(picture, path)  # before the work, not after it
    task = bar.add_task(f"{origin.name} (tiles)", total=None) if bar else None
    try:
        image = upscale_picture(
            model,
            picture,
            tile=tile,
            overlap=overlap,
            on_tile=lambda done, of: bar and bar.update(task, completed=done, total=of),
        )
    finally:
        if bar:
            bar.remove_task(task)
    write_picture(image, picture, path, name)
    for note in picture.notes:
        terminal.warn(note)
    return image.size
