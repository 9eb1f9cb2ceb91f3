"""SDAN's building blocks as `nn.Module`s: parameters and wiring here, arithmetic in `sdan_fast.functional`.

The paper's full text and weights are not public. What is here follows its abstract (arXiv 2506.12475) and the public
development code of its first author, so it is *a reconstruction*. Tensors are N x C x H x W.

The `nn.Conv2d` inside these modules hold parameters (PyTorch's shapes, initialisation and state-dict keys); where a
fused op takes their weights, their own `forward`, and hooks on it, do not run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from . import functional as F
from .reference import ACTIVATIONS, BranchConv, SDMParameters, StarParameters

__all__ = ["BRANCHES", "MMLKA", "RSDAM", "SDM", "LayerNorm2d", "StarConv"]

Pair = tuple[Tensor, "Tensor | None"]
RSDAMParameters = tuple[SDMParameters, list[list[BranchConv]], Pair, Pair, Pair]

# For each number of groups, the (local stage, dilated stage, kernel size) of every branch of MM-LKA.
BRANCHES: dict[int, tuple[tuple[str, str, int], ...]] = {
    1: (("square", "square", 9),),
    2: (("square", "square", 7), ("strip", "strip", 11)),
    3: (("strip", "strip", 3), ("strip", "strip", 7), ("strip", "strip", 9)),
    4: (("square", "square", 5), ("strip", "square", 7), ("square", "strip", 9), ("strip", "strip", 11)),
}


def check_count(name: str, value: int, least: int = 1) -> int:
    """`value` if it is an integer of at least `least`; else one sentence that says what came."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, and it is {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, and it is {value}")
    return value


def check_channels(channels: int, groups: int) -> None:
    """Refuse a number of channels that MM-LKA cannot split into `groups` branches, or SDM into two halves.

    Raises:
        ValueError: if `groups` has no branch table, or `channels` is odd or not divisible by `groups`.
    """
    check_count("channels", channels)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups not in BRANCHES:
        raise ValueError(f"groups must be one of {', '.join(map(str, BRANCHES))}, and it is {groups!r}")
    if channels % 2:
        raise ValueError(f"channels must be even, and it is {channels}")
    if channels % groups:
        raise ValueError(f"channels must be divisible by groups ({groups}), and it is {channels}")


def pointwise(channels_in: int, channels_out: int, *, bias: bool = True) -> nn.Conv2d:
    """A 1x1 convolution."""
    return nn.Conv2d(channels_in, channels_out, 1, bias=bias)


def depthwise(channels: int, kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> nn.Conv2d:
    """A depth-wise convolution with bias and "same" zero padding; a dilation counts along an axis with taps only."""
    (kh, kw), (dh, dw) = kernel_size, dilation
    padding = (dh * (kh - 1) // 2, dw * (kw - 1) // 2)
    return nn.Conv2d(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels)


def stage(shape: str, channels: int, k: int, dilation: int) -> list[nn.Conv2d]:
    """One stage of a branch: a k x k convolution ("square"), or a 1 x k and a k x 1 one ("strip")."""
    if shape == "square":
        return [depthwise(channels, (k, k), (dilation, dilation))]
    return [depthwise(channels, (1, k), (1, dilation)), depthwise(channels, (k, 1), (dilation, 1))]


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels at each pixel, affine.

    Args:
        channels: C, the length of `weight` (ones at first) and `bias` (zeros at first).
        eps: added to the variance.

    Shape: (N, C, H, W) -> (N, C, H, W), in the input's dtype and memory format.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm2d(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class StarConv(nn.Module):
    """Star convolution: z = LN(x), y = outer(GELU(DW3x3(PW1 z)) * PW2 z), in one op.

    PW1 and PW2 are 1x1 without bias, DW3x3 is depth-wise with bias, GELU the exact (erf) one. The second branch has
    no activation, and no projection follows the star.

    Args:
        channels_in: Ci.
        channels_out: Co.
        outer: an activation of the product, fused into the op: "none", "gelu", "relu6", "relu" or "silu".

    Shape: (N, Ci, H, W) -> (N, Co, H, W).
    """

    def __init__(self, channels_in: int, channels_out: int, *, outer: str = "none") -> None:
        super().__init__()
        check_count("channels_in", channels_in)
        check_count("channels_out", channels_out)
        if outer not in tuple(ACTIVATIONS):
            raise ValueError(f"outer must be one of {', '.join(ACTIVATIONS)}, and it is {outer!r}")
        self.outer = outer
        self.norm = LayerNorm2d(channels_in)
        self.pw1 = pointwise(channels_in, channels_out, bias=False)
        self.dw = depthwise(channels_out, (3, 3))
        self.pw2 = pointwise(channels_in, channels_out, bias=False)

    def parameters_in_order(self) -> StarParameters:
        """As `sdan_fast.functional.star_conv` takes them."""
        norm, dw = self.norm, self.dw
        return norm.weight, norm.bias, self.pw1.weight, dw.weight, dw.bias, self.pw2.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.star_conv(x, *self.parameters_in_order(), outer=self.outer, eps=self.norm.eps)

    def extra_repr(self) -> str:
        return f"outer={self.outer!r}"


class SDM(nn.Module):
    """Star distillation module: three levels that distil half of the channels and refine the rest, then a fusion.

    With h = C/2 and G = GELU: d1 = G(c1 x), r1 = G(S1 x); d2 = G(c2 r1), r2 = G(S2 r1); d3 = G(c3 r2), r3 = G(S3 r2);
    r4 = G(S4 r3); out = fuse([d1, d2, d3, r4]). The ci are 1x1 C->h, S1..S3 are StarConv(C, C), S4 is StarConv(C, h).

    Args:
        channels: C, even.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if check_count("channels", channels) % 2:
            raise ValueError(f"channels must be even, and it is {channels}")
        half = channels // 2
        self.distill = nn.ModuleList(pointwise(channels, half) for _ in range(3))
        self.star = nn.ModuleList(
            StarConv(channels, co, outer="gelu") for co in (channels, channels, channels, half)
        )
        self.fuse = pointwise(4 * half, channels)

    def parameters_in_order(self) -> SDMParameters:
        """(distill, star, fuse) as `sdan_fast.functional.sdm` takes them."""
        distill = [(conv.weight, conv.bias) for conv in cast("Iterable[nn.Conv2d]", self.distill)]
        star = [level.parameters_in_order() for level in cast("Iterable[StarConv]", self.star)]
        return distill, star, (self.fuse.weight, self.fuse.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.sdm(x, *self.parameters_in_order(), eps=cast("StarConv", self.star[0]).norm.eps)


class MMLKA(nn.Module):
    """Multi-shape multi-scale large-kernel attention: out = x * proj(concat of the branches), with no sigmoid.

    The channels are split into `groups` equal chunks, one branch each. A branch of kernel size k runs a local stage
    and then one of dilation (k + 1) / 2; a "square" stage is one k x k depth-wise convolution, a "strip" stage a 1 x k
    and a k x 1 one. All have bias, with no activation in between. `BRANCHES` is the table.

    Args:
        channels: C, even and divisible by `groups`.
        groups: 1, 2, 3 or 4.

    Shape: (N, C, H, W) -> (N, C, H, W).

    Raises:
        ValueError: for channels or groups that have no branches.
    """

    def __init__(self, channels: int, groups: int = 2) -> None:
        super().__init__()
        check_channels(channels, groups)
        self.channels = channels
        self.groups = groups
        chunk = channels // groups
        self.branches = nn.ModuleList(
            nn.ModuleList([*stage(local, chunk, k, 1), *stage(dilated, chunk, k, (k + 1) // 2)])
            for local, dilated, k in BRANCHES[groups]
        )
        self.proj = pointwise(channels, channels)

    def branches_in_order(self) -> list[list[BranchConv]]:
        """As `sdan_fast.functional.mm_lka` takes them."""
        branches = cast("Iterable[Iterable[nn.Conv2d]]", self.branches)
        return [[(conv.weight, conv.bias, conv.dilation) for conv in branch] for branch in branches]

    def forward(self, x: Tensor) -> Tensor:
        return F.mm_lka(x, self.branches_in_order(), self.proj.weight, self.proj.bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}"


class RSDAM(nn.Module):
    """Residual star distillation attention module, SDAN's block: out = x + LN(proj(MMLKA(SDM(x)))).

    Args:
        channels: C, even and divisible by `groups`.
        groups: the number of MM-LKA's branches.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, channels: int, groups: int = 2) -> None:
        super().__init__()
        self.sdm = SDM(channels)
        self.attn = MMLKA(channels, groups)
        self.proj = pointwise(channels, channels)
        self.norm = LayerNorm2d(channels)

    def parameters_in_order(self) -> RSDAMParameters:
        """(distillation, branches, attention_proj, proj, norm) as `sdan_fast.functional.rsdam` takes them."""
        attn, proj, norm = self.attn, self.proj, self.norm
        return (
            self.sdm.parameters_in_order(),
            attn.branches_in_order(),
            (attn.proj.weight, attn.proj.bias),
            (proj.weight, proj.bias),
            (norm.weight, norm.bias),
        )

    def tensors_in_order(self) -> list[Tensor]:
        """Every parameter, in state-dict order, as `torch.ops.sdan_fast.sdan` takes them."""
        (distill, star, fuse), branches, *pairs = self.parameters_in_order()
        convs = [conv[:2] for branch in branches for conv in branch]
        groups: list[tuple[Tensor | None, ...]] = [*distill, *star, fuse, *convs, *pairs]
        return [tensor for group in groups for tensor in group if tensor is not None]

    def forward(self, x: Tensor) -> Tensor:
        return F.rsdam(x, *self.parameters_in_order(), eps=self.norm.eps)
