"""Pictures as tensors and back, and the photographs that scikit-image ships."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")  # inside scikit-image's wheel: no download


def photograph(name: str) -> Tensor:
    """(1, 3, H, W) float32, RGB in [0, 1], of one of `PHOTOGRAPHS`."""
    import skimage.data

    return torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float() / 255


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, with antialiasing when it becomes smaller, clamped to [0, 1]."""
    return torch.nn.functional.interpolate(picture, (height, width), mode="bicubic", antialias=True).clamp(
        0, 1
    )


def cover(picture: Tensor, height: int, width: int) -> Tensor:
    """The picture at the size that just covers height x width, then its middle: (1, 3, height, width)."""
    factor = max(height / picture.shape[2], width / picture.shape[3])
    picture = resize(
        picture, max(height, round(picture.shape[2] * factor)), max(width, round(picture.shape[3] * factor))
    )
    top, left = (picture.shape[2] - height) // 2, (picture.shape[3] - width) // 2
    return picture[:, :, top : top + height, left : left + width].contiguous()


def write_png(picture: Tensor, path: Path) -> None:
    """Write (1, 3, H, W), RGB in [0, 1], as an 8-bit PNG, whole or not at all."""
    from PIL import Image

    from sdan_fast.models.files import replacing

    pixels = (picture[0].float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
