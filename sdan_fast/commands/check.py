"""The error bound of every result here: at most twice eager PyTorch's error plus two units in the last place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How far a result is from the float64 reference, and how far it may be.

    The bound is 2 max|eager's error| + 2 eps(dtype) max|reference|, with eager PyTorch in the same dtype on the same
    input as the yardstick.
    """

    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """False for a NaN anywhere, too."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """The error as a share of the bound: at most 1 if all is well."""
        if self.bound > 0:
            return self.error / self.bound
        return 0.0 if self.error == 0 else math.inf


def distance(result: Tensor, reference: Tensor) -> float:
    """max|result - reference| in float64; NaN if either has one, 0 for empty tensors, inf for another shape."""
    if result.shape != reference.shape:
        return math.inf
    difference = (result.to(reference) - reference).abs()
    return float(difference.max()) if difference.numel() else 0.0


def agreement(result: Tensor, eager: Tensor, reference: Tensor) -> Agreement:
    """Hold a result against the float64 reference.

    Args:
        result: in the dtype that is checked.
        eager: what plain PyTorch computes in that dtype.
        reference: what plain PyTorch computes in float64 from the same input.
    """
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    bound = 2 * distance(eager, reference) + 2 * torch.finfo(result.dtype).eps * largest
    return Agreement(distance(result, reference), bound)


def gradient_agreement(
    result: Sequence[Tensor], eager: Sequence[Tensor], reference: Sequence[Tensor]
) -> Agreement:
    """The same bound for the gradient of many ops in a row, as one vector and in the root mean square.

    Through many ops, the largest error among a few elements is a matter of luck, eager's as well as ours, and says
    nothing about a factor of two; the mean over all of them does. Each tensor counts in units of its largest exact
    value, so that none is hidden by larger ones.
    """
    units = [
        r.abs().max().clamp_min(torch.finfo(r.dtype).tiny) if r.numel() else r.new_ones(()) for r in reference
    ]

    def vector(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([(t.to(r) / u).flatten() for t, r, u in zip(tensors, reference, units, strict=True)])

    def rms(v: Tensor) -> float:
        return float(v.square().mean().sqrt())

    if any(a.shape != b.shape for a, b in zip(result, reference, strict=True)):
        return Agreement(math.inf, 0.0)
    exact = vector(reference)
    bound = 2 * rms(vector(eager) - exact) + 2 * torch.finfo(result[0].dtype).eps * rms(exact)
    return Agreement(rms(vector(result) - exact), bound)


def worst(agreements: Sequence[Agreement]) -> Agreement:
    """The one with the largest share of its bound; a NaN is the worst of all."""
    return max(agreements, key=lambda a: math.inf if math.isnan(a.share) else a.share)
