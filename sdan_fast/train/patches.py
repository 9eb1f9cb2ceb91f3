"""Pairs of patches, low and high resolution, drawn from pictures that stay in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def downscale(picture: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """(low, high): the picture cut to a multiple of `scale`, and a `scale`-th of it, bicubic with antialiasing.

    Args:
        picture: (1, 3, H, W) uint8.
        scale: at least 1.

    Returns:
        two uint8 pictures; the smaller one is rounded, as it would be in a file.

    Raises:
        ValueError: if the picture has fewer than `scale` rows or columns.
    """
    height, width = (side - side % scale for side in picture.shape[-2:])
    if height == 0 or width == 0:
        raise ValueError(
            f"a picture must have at least {scale} rows and columns, and it has {list(picture.shape[-2:])}"
        )
    high = picture[..., :height, :width]
    low = torch.nn.functional.interpolate(
        high.float(), (height // scale, width // scale), mode="bicubic", antialias=True
    )
    return low.round().clamp(0, 255).to(torch.uint8), high


class Patches:
    """Random patches of pictures, turned and mirrored; a batch depends on the seed and its number alone.

    So a run that goes on after a break draws what it would have drawn without one.

    Args:
        pictures: (1, 3, H, W) uint8 each, high resolution.
        scale: between a low and a high resolution patch.
        patch: side of a low resolution patch, in pixels.
        seed: of everything that is drawn.

    Raises:
        ValueError: if there are no pictures, or one is smaller than a patch.
    """

    def __init__(self, pictures: Sequence[Tensor], *, scale: int, patch: int, seed: int = 0) -> None:
        if not pictures:
            raise ValueError("pictures must hold at least one picture, and it is empty")
        self.scale, self.patch, self.seed = scale, patch, seed
        self.pairs = [downscale(picture, scale) for picture in pictures]
        for low, high in self.pairs:
            if min(low.shape[-2:]) < patch:
                raise ValueError(
                    f"every picture must have at least {patch * scale} rows and columns for patches of {patch} x "
                    f"{scale}, and one has {high.shape[-2]} x {high.shape[-1]}"
                )

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """(low, high) of batch `number`: (size, 3, patch, patch) and (size, 3, scale patch, scale patch), in [0, 1]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)

        def draw(end: int) -> int:
            return int(torch.randint(end, (), generator=generator))

        lows: list[Tensor] = []
        highs: list[Tensor] = []
        for _ in range(size):
            low, high = self.pairs[draw(len(self.pairs))]
            top, left = (draw(side - self.patch + 1) for side in low.shape[-2:])
            turns, mirror = draw(4), draw(2)
            for picture, factor, patches in ((low, 1, lows), (high, self.scale, highs)):
                side = factor * self.patch
                piece = picture[..., factor * top :, factor * left :][..., :side, :side]
                piece = torch.rot90(piece, turns, (-2, -1))
                patches.append(piece.flip(-1) if mirror else piece)
        return torch.cat(lows).float() / 255, torch.cat(highs).float() / 255
