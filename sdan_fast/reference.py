"""Every op in plain PyTorch: the definition that each kernel of this package is a fast way to compute.

Tensors are N x C x H x W. Convolutions have stride 1 and "same" zero padding of the input of *each* convolution, so
inside a chain the intermediate (bias included) counts as zero outside the image. The functions here check nothing;
`sdan_fast.functional` has the same signatures with checks, fast backends and fuller documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

Dilation = int | Sequence[int]
StripStage = tuple[Tensor, "Tensor | None", Tensor, "Tensor | None", Dilation]
BranchConv = tuple[Tensor, "Tensor | None", Dilation]
Pointwise = tuple[Tensor, "Tensor | None"]  # weight (Co, Ci, 1, 1), bias (Co,)
StarParameters = tuple[
    Tensor, "Tensor | None", Tensor, Tensor, "Tensor | None", Tensor
]  # as star_conv takes them
SDMParameters = tuple[Sequence[Pointwise], Sequence[StarParameters], Pointwise]  # distill, star, fuse

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "relu6": F.relu6,
    "relu": F.relu,
    "silu": F.silu,
}


def pair(dilation: Dilation) -> tuple[int, int]:
    """(dh, dw) of an int or of a pair."""
    if isinstance(dilation, int):
        return dilation, dilation
    dh, dw = dilation
    return dh, dw


def output_format(x: Tensor) -> torch.memory_format:
    """The memory format that an op's output takes after its first tensor: channels_last only where `x` is just that."""
    if x.dim() != 4 or x.is_contiguous():
        return torch.contiguous_format
    # vmap does not tell how an example lies: the strides that it shows are not the example's own.
    if torch._C._are_functorch_transforms_active() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: Dilation = 1
) -> Tensor:
    """Depth-wise convolution with "same" zero padding; see `sdan_fast.functional.depthwise_conv2d`."""
    dh, dw = pair(dilation)
    kh, kw = weight.shape[-2:]
    padding = (dh * (kh - 1) // 2, dw * (kw - 1) // 2)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if kw > 13 and x.is_cpu and dtype in (torch.bfloat16, torch.float16):
        # In 16 bits PyTorch 2.14.1 may never return (docs/decisions.md). It sums in float32 anyway.
        x, weight = x.to(dtype).float(), weight.to(dtype).float()
        bias = None if bias is None else bias.to(dtype).float()
        with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
            y = F.conv2d(x, weight, bias, padding=padding, dilation=(dh, dw), groups=weight.shape[0])
        return y.to(dtype)
    return F.conv2d(x, weight, bias, padding=padding, dilation=(dh, dw), groups=weight.shape[0])


def strip_conv_chain(x: Tensor, stages: Sequence[StripStage]) -> Tensor:
    """For each stage a 1xk, then a kx1 depth-wise convolution; see `sdan_fast.functional.strip_conv_chain`."""
    for weight_h, bias_h, weight_v, bias_v, dilation in stages:
        x = depthwise_conv2d(x, weight_h, bias_h, dilation=dilation)
        x = depthwise_conv2d(x, weight_v, bias_v, dilation=dilation)
    return x


def gated_strip_conv_chain(u: Tensor, x: Tensor, stages: Sequence[StripStage]) -> Tensor:
    """u * the strip chain of x; see `sdan_fast.functional.gated_strip_conv_chain`."""
    return u * strip_conv_chain(x, stages)


def separable_conv2d(
    x: Tensor,
    weight_h: Tensor,
    bias_h: Tensor | None,
    weight_v: Tensor,
    bias_v: Tensor | None,
    *,
    dilation: Dilation = 1,
) -> Tensor:
    """The strip chain of one stage; see `sdan_fast.functional.separable_conv2d`."""
    return strip_conv_chain(x, [(weight_h, bias_h, weight_v, bias_v, dilation)])


def star(a: Tensor, b: Tensor, *, activation: str = "gelu", outer: str = "none") -> Tensor:
    """outer(activation(a) * b); see `sdan_fast.functional.star`."""
    return ACTIVATIONS[outer](ACTIVATIONS[activation](a) * b)


def layer_norm2d(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over C at each pixel; see `sdan_fast.functional.layer_norm2d`."""
    y = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=output_format(x))


def pixel_shuffle(x: Tensor, scale: int) -> Tensor:
    """(N, C * scale^2, H, W) -> (N, C, scale * H, scale * W); PyTorch's own fails in the backward of an empty batch."""
    if x.shape[0] > 0:
        return F.pixel_shuffle(x, scale)
    _, c, h, w = x.shape
    y = x.view(0, c // scale**2, scale, scale, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(0, c // scale**2, scale * h, scale * w)


def pointwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """activation(1x1 convolution of x); see `sdan_fast.functional.pointwise_conv2d`."""
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias))


def pointwise_gate(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """u * (1x1 convolution of x); see `sdan_fast.functional.pointwise_gate`."""
    return u * F.conv2d(x, weight, bias)


def star_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    pw1_weight: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw2_weight: Tensor,
    *,
    outer: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """outer(GELU(DW(PW1 LN(x))) * PW2 LN(x)); see `sdan_fast.functional.star_conv`."""
    z = layer_norm2d(x, norm_weight, norm_bias, eps)
    a = depthwise_conv2d(F.conv2d(z, pw1_weight), dw_weight, dw_bias)
    return star(a, F.conv2d(z, pw2_weight), activation="gelu", outer=outer)


def mm_lka(
    x: Tensor,
    branches: Sequence[Sequence[BranchConv]],
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
) -> Tensor:
    """x * proj(concat of the depth-wise branches over channel chunks); see `sdan_fast.functional.mm_lka`."""
    chunks = torch.split(x, [branch[0][0].shape[0] for branch in branches], dim=1)
    outputs = []
    for chunk, branch in zip(chunks, branches, strict=True):
        for weight, bias, dilation in branch:
            chunk = depthwise_conv2d(chunk, weight, bias, dilation=dilation)
        outputs.append(chunk)
    return pointwise_gate(x, torch.cat(outputs, dim=1), proj_weight, proj_bias)


def sdm(
    x: Tensor,
    distill: Sequence[Pointwise],
    star: Sequence[StarParameters],
    fuse: Pointwise,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The star distillation module; see `sdan_fast.functional.sdm`."""
    parts = []
    for conv, level in zip(distill, star, strict=False):
        parts.append(F.gelu(F.conv2d(x, *conv)))
        x = star_conv(x, *level, outer="gelu", eps=eps)
    for level in star[len(distill) :]:
        x = star_conv(x, *level, outer="gelu", eps=eps)
    return F.conv2d(torch.cat([*parts, x], dim=1), *fuse)


def rsdam(
    x: Tensor,
    distillation: SDMParameters,
    branches: Sequence[Sequence[BranchConv]],
    attention_proj: Pointwise,
    proj: Pointwise,
    norm: tuple[Tensor, Tensor | None],
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The residual block around SDM and MM-LKA; see `sdan_fast.functional.rsdam`."""
    t = mm_lka(sdm(x, *distillation, eps=eps), branches, *attention_proj)
    return x + layer_norm2d(F.conv2d(t, *proj), *norm, eps)
