"""SDAN's building blocks as `nn.Module`s: parameters and wiring here, arithmetic in `sdan_fast.functional`.

The paper's full text and weights are not public. What is here follows its abstract (arXiv 2506.12475) and the public
development code of its first author, so it is *a reconstruction*. Tensors are N x C x H x W.

A module whose parts are as they were built is one fused op of their parameters. Where a part has a hook, computes a
parameter (pruning, parametrizations) or was replaced, at any depth, the modules around it call their parts instead.
Hooks for all modules (`torch.nn.modules.module.register_module_*`) see the calls that there are, no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from . import functional as F
from .reference import ACTIVATIONS, BranchConv, SDMParameters, StarParameters, output_format

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


def as_built(whole: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether one fused op of its parameters does all that calling the parts of `whole`, a `kind`, would.

    What the module is itself does not matter, nor its own hooks: its forward is what runs.
    """
    eps: set[float] = set()
    return _gather_parts(whole, PARTS[kind], [], eps) and len(eps) <= 1


def gather(part: nn.Module | None, kind: type[nn.Module], tensors: list[Tensor], eps: set[float]) -> bool:
    """Add a part's parameters in state-dict order, if a fused op of them does all that calling the part would.

    It runs in every forward, on every part, so it reads the dicts behind the attributes of `nn.Module`, which are slow.

    Args:
        part: a module, or a list of them, which is never called itself.
        kind: what it was built as.
        tensors: what to append to.
        eps: gets what the LayerNorms add to the variance; a fused op has one for all.

    Returns:
        False if the part or one inside of it is of another type, has a hook, or does not keep its weight itself.
    """
    if type(part) is nn.ModuleList:
        for item in part._modules.values():  # noqa: SIM110 - the generator of `all` takes as long as the rest
            if not gather(item, kind, tensors, eps):
                return False
        return True
    if part is None or type(part) is not kind or hooked(part):
        return False
    inner = PARTS.get(kind)
    if inner is not None:
        return _gather_parts(part, inner, tensors, eps)
    own = part._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None:
        return False
    if isinstance(part, LayerNorm2d):
        eps.add(part.eps)
    tensors.append(weight)
    if bias is not None:
        tensors.append(bias)
    return True


def _gather_parts(
    whole: nn.Module, parts: Mapping[str, type[nn.Module]], tensors: list[Tensor], eps: set[float]
) -> bool:
    modules = whole._modules
    for name, kind in parts.items():  # noqa: SIM110
        if not gather(modules.get(name), kind, tensors, eps):
            return False
    return True


def hooked(part: nn.Module) -> bool:
    """Whether a call of the module would do more than its class's forward."""
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__
    )


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution, by this package's op.

    Args:
        channels_in: Ci.
        channels_out: Co.
        bias: whether there is one.

    Shape: (N, Ci, H, W) -> (N, Co, H, W).
    """

    def __init__(self, channels_in: int, channels_out: int, *, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.pointwise_conv2d(input, self.weight, self.bias)


class DepthwiseConv2d(nn.Conv2d):
    """A depth-wise convolution with bias and "same" zero padding, by this package's op.

    Args:
        channels: C.
        kernel_size: (kh, kw), odd.
        dilation: (dh, dw); it counts along an axis with taps only.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(
        self, channels: int, kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1)
    ) -> None:
        (kh, kw), (dh, dw) = kernel_size, dilation
        padding = (dh * (kh - 1) // 2, dw * (kw - 1) // 2)
        super().__init__(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        return F.depthwise_conv2d(input, self.weight, self.bias, dilation=self.dilation)


def stage(shape: str, channels: int, k: int, dilation: int) -> list[DepthwiseConv2d]:
    """One stage of a branch: a k x k convolution ("square"), or a 1 x k and a k x 1 one ("strip")."""
    if shape == "square":
        return [DepthwiseConv2d(channels, (k, k), (dilation, dilation))]
    return [
        DepthwiseConv2d(channels, (1, k), (1, dilation)),
        DepthwiseConv2d(channels, (k, 1), (dilation, 1)),
    ]


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
        self.pw1 = PointwiseConv2d(channels_in, channels_out, bias=False)
        self.dw = DepthwiseConv2d(channels_out, (3, 3))
        self.pw2 = PointwiseConv2d(channels_in, channels_out, bias=False)

    def parameters_in_order(self) -> StarParameters:
        """As `sdan_fast.functional.star_conv` takes them."""
        norm, dw = self.norm, self.dw
        return norm.weight, norm.bias, self.pw1.weight, dw.weight, dw.bias, self.pw2.weight

    def forward(self, x: Tensor) -> Tensor:
        if as_built(self, StarConv):
            return F.star_conv(x, *self.parameters_in_order(), outer=self.outer, eps=self.norm.eps)
        z = self.norm(x)
        return F.star(self.dw(self.pw1(z)), self.pw2(z), activation="gelu", outer=self.outer)

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
        self.distill = nn.ModuleList(PointwiseConv2d(channels, half) for _ in range(3))
        self.star = nn.ModuleList(
            StarConv(channels, co, outer="gelu") for co in (channels, channels, channels, half)
        )
        self.fuse = PointwiseConv2d(4 * half, channels)

    def parameters_in_order(self) -> SDMParameters:
        """(distill, star, fuse) as `sdan_fast.functional.sdm` takes them."""
        distill = [(conv.weight, conv.bias) for conv in cast("Iterable[nn.Conv2d]", self.distill)]
        star = [level.parameters_in_order() for level in cast("Iterable[StarConv]", self.star)]
        return distill, star, (self.fuse.weight, self.fuse.bias)

    def forward(self, x: Tensor) -> Tensor:
        if as_built(self, SDM):
            return F.sdm(x, *self.parameters_in_order(), eps=cast("StarConv", self.star[0]).norm.eps)
        distilled = []
        for conv, level in zip(self.distill, self.star, strict=False):
            distilled.append(nn.functional.gelu(conv(x)))
            x = level(x)
        for level in self.star[len(self.distill) :]:
            x = level(x)
        return self.fuse(torch.cat([*distilled, x], dim=1))


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
        self.proj = PointwiseConv2d(channels, channels)

    def branches_in_order(self) -> list[list[BranchConv]]:
        """As `sdan_fast.functional.mm_lka` takes them."""
        branches = cast("Iterable[Iterable[nn.Conv2d]]", self.branches)
        return [[(conv.weight, conv.bias, conv.dilation) for conv in branch] for branch in branches]

    def layout(self) -> tuple[list[int], list[int]]:
        """(how many convolutions each branch has, all their dilations in order, two each)."""
        branches = [list(branch) for branch in cast("Iterable[Iterable[nn.Conv2d]]", self.branches)]
        return [len(branch) for branch in branches], [
            d for b in branches for conv in b for d in conv.dilation
        ]

    def forward(self, x: Tensor) -> Tensor:
        if as_built(self, MMLKA):
            return F.mm_lka(x, self.branches_in_order(), self.proj.weight, self.proj.bias)
        chunks = list(x.chunk(len(self.branches), dim=1))
        for i, branch in enumerate(cast("Iterable[Iterable[nn.Module]]", self.branches)):
            for conv in branch:
                chunks[i] = conv(chunks[i])
        return (x * self.proj(torch.cat(chunks, dim=1))).contiguous(memory_format=output_format(x))

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
        self.proj = PointwiseConv2d(channels, channels)
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

    def forward(self, x: Tensor) -> Tensor:
        if as_built(self, RSDAM):
            return F.rsdam(x, *self.parameters_in_order(), eps=self.norm.eps)
        y = x + self.norm(self.proj(self.attn(self.sdm(x))))
        return y.contiguous(memory_format=output_format(x))


# What each module was built of, in state-dict order; of a list, its items.
PARTS: dict[type[nn.Module], dict[str, type[nn.Module]]] = {
    StarConv: {
        "norm": LayerNorm2d,
        "pw1": PointwiseConv2d,
        "dw": DepthwiseConv2d,
        "pw2": PointwiseConv2d,
    },
    SDM: {"distill": PointwiseConv2d, "star": StarConv, "fuse": PointwiseConv2d},
    MMLKA: {"branches": DepthwiseConv2d, "proj": PointwiseConv2d},
    RSDAM: {"sdm": SDM, "attn": MMLKA, "proj": PointwiseConv2d, "norm": LayerNorm2d},
}
