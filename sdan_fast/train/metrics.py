"""How far an enlarged picture is from the original, as papers on super-resolution measure it."""

from __future__ import annotations

import torch
from torch import Tensor

# ITU-R BT.601 luma of 8-bit RGB, in [16, 235].
_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)


def psnr_y(result: Tensor, original: Tensor, border: int) -> float:
    """Peak signal-to-noise ratio in dB of the luma (BT.601), both pictures rounded to 8 bits, without a border.

    Args:
        result: (1, 3, H, W), RGB in [0, 1]; values beyond are cut.
        original: of the same shape.
        border: pixels left out on each side, by convention the scale.

    Returns:
        infinity for equal pictures.

    Raises:
        ValueError: if the shapes differ, or nothing is left within the border.
    """
    if result.shape != original.shape:
        raise ValueError(
            f"result and original must have one shape, and they have {list(result.shape)} and {list(original.shape)}"
        )
    height, width = result.shape[-2:]
    if min(height, width) <= 2 * border:
        raise ValueError(f"a picture of {height}x{width} pixels has none within a border of {border}")
    weights = result.new_tensor(_LUMA, dtype=torch.float64)

    def luma(picture: Tensor) -> Tensor:
        inner = picture[..., border : height - border, border : width - border]
        return torch.einsum("nchw,c->nhw", (inner.double().clamp(0, 1) * 255).round(), weights)

    error = (luma(result) - luma(original)).square().mean()
    return float(10 * torch.log10(255**2 / error))
