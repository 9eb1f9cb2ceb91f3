"""A seeded SDAN whose last layer is fitted to one picture, for demonstrations: no trained weights are public."""

from __future__ import annotations

import torch
from torch import Tensor

from .sdan import SDAN


def seeded_sdan(
    scale: int = 4, channels: int = 56, blocks: int = 8, groups: int = 2, *, seed: int = 0
) -> SDAN:
    """An SDAN in eval mode with PyTorch's default initialisation from `seed`; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SDAN(scale, channels, blocks, groups).eval()


@torch.no_grad()
def fit_upsampler(model: SDAN, low: Tensor, high: Tensor, *, ridge: float = 1e-6) -> None:
    """Solve for the weights of `model.up`, in place, by least squares from `low` to `high`.

    This is no training of SDAN: all other layers keep the weights that they have. It makes the output of a network of
    random features look like a picture, so that a demonstration shows one, and gives it a picture's range of values.

    Args:
        model: of any configuration.
        low: (1, 3, H, W), RGB in [0, 1].
        high: (1, 3, scale * H, scale * W), the same picture larger.
        ridge: the regularisation, relative to the mean square of the features.
    """
    features = model.features(low)
    columns = torch.nn.functional.unfold(features, 3, padding=1)[0].double()
    columns = torch.cat([columns, torch.ones_like(columns[:1])])
    targets = torch.nn.functional.pixel_unshuffle(high, model.scale)[0].flatten(1).double()
    gram = columns @ columns.T
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, columns @ targets.T).T
    weight, bias = solution[:, :-1], solution[:, -1]
    assert model.up.bias is not None
    model.up.weight.copy_(weight.reshape(model.up.weight.shape))
    model.up.bias.copy_(bias)
