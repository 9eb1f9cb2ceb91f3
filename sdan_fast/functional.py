"""Stateless ops: differentiable, autocast-aware, compilable, and run by the fastest backend that can.

Tensors are N x C x H x W, float32, bfloat16, float16 or float64 (all tensors of a call share one dtype; kernels
accumulate in float32), with any strides. Contiguous and channels_last inputs are fast, and the output keeps the memory
format of the first tensor. Convolutions have stride 1 and "same" zero padding: d(k-1)/2 on each axis, of the input of
each convolution. Every op raises TypeError for a wrong type or dtype (mixed floating dtypes included, except under
autocast) and ValueError for a wrong shape, device or value; RuntimeError if `use_backend` names a backend that cannot
run the call. A batch may be empty; images without channels, rows or columns are refused by every op but `star`. Under
autocast an op returns the dtype that its plain PyTorch sequence returns on that device.

The formulas are those of SDAN (arXiv 2506.12475) as reconstructed from its abstract and its first author's public
development code; `sdan_fast.reference` has each of them in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import ops
from .reference import BranchConv, Dilation, Pointwise, SDMParameters, StarParameters, StripStage

__all__ = [
    "depthwise_conv2d",
    "gated_strip_conv_chain",
    "layer_norm2d",
    "mm_lka",
    "pointwise_conv2d",
    "pointwise_gate",
    "rsdam",
    "sdm",
    "separable_conv2d",
    "star",
    "star_conv",
    "strip_conv_chain",
]


def _pair(dilation: Any, name: str = "dilation") -> list[int]:
    if isinstance(dilation, int):
        return [dilation, dilation]
    try:
        pair = list(dilation)
    except TypeError:
        raise TypeError(f"{name} must be a positive int or a pair of them, and it is {dilation!r}") from None
    if len(pair) != 2:
        raise ValueError(f"{name} must be a positive int or a pair of them, and it is {dilation!r}")
    return pair


def _items(name: str, value: Any, form: str = "a list", count: int | None = None) -> list[Any]:
    """The items of `value`, `count` of them; else one sentence that says that it must be `form`, and what came."""
    try:
        items = list(value)
    except TypeError:
        raise TypeError(f"{name} must be {form}, and it is a {type(value).__name__}") from None
    if count is not None and len(items) != count:
        raise ValueError(f"{name} must be {form}, and it has {len(items)} items")
    return items


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: Dilation = 1
) -> Tensor:
    """Depth-wise convolution with "same" zero padding.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, kh, kw), kh and kw odd: a strip (1xk, kx1) or any rectangle.
        bias: (C,) or None.
        dilation: int or (dh, dw), at least 1.

    Returns:
        (N, C, H, W), the dtype of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation.
    """
    return ops.depthwise_conv2d(x, weight, bias, dilation=_pair(dilation))


def strip_conv_chain(x: Tensor, stages: Sequence[StripStage]) -> Tensor:
    """A chain of 1-D depth-wise convolutions, two a stage: 1xk, then kx1.

    The decomposition of a large kernel into strips, as in large-kernel attention: usually a plain stage, then a dilated
    one. Each convolution pads its own input with zeros, so an intermediate counts as zero outside the image.

    Args:
        x: (N, C, H, W).
        stages: for each stage (weight_h, bias_h, weight_v, bias_v, dilation), with weight_h (C, 1, 1, k), weight_v
            (C, 1, k, 1), k odd, biases (C,) or None, and dilation an int or (dh, dw): dw is that of the 1xk
            convolution, dh that of the kx1.

    Returns:
        (N, C, H, W), the dtype of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation; an empty `stages` is refused.
    """
    weights, biases, layout = _flat_stages(stages)
    return ops.strip_conv_chain(x, weights, biases, **layout)


def gated_strip_conv_chain(u: Tensor, x: Tensor, stages: Sequence[StripStage]) -> Tensor:
    """u * strip_conv_chain(x, stages): an attention whose strips come last, after the 1x1 convolution that makes `x`.

    In inference a kernel multiplies while it writes the chain's result, where there is one; else, and where a gradient
    is needed, the chain and the product run one after the other.

    Args:
        u: (N, C, H, W), what is gated.
        x: (N, C, H, W), the input of the chain.
        stages: as `strip_conv_chain` takes them.

    Returns:
        (N, C, H, W), the dtype of `u`.

    Raises:
        TypeError, ValueError: see the module's documentation; an empty `stages` is refused.
    """
    weights, biases, layout = _flat_stages(stages)
    return ops.gated_strip_conv_chain(u, x, weights, biases, **layout)


def _flat_stages(stages: Sequence[StripStage]) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Stages as the ops' schemas take them: weights, present biases, and how they are laid out."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    bias_mask: list[bool] = []
    dilations: list[int] = []
    for i, stage in enumerate(_items("stages", stages)):
        form = "(weight_h, bias_h, weight_v, bias_v, dilation)"
        weight_h, bias_h, weight_v, bias_v, dilation = _items(f"stages[{i}]", stage, form, 5)
        dh, dw = _pair(dilation, f"stages[{i}].dilation")
        weights += [weight_h, weight_v]
        biases += [bias for bias in (bias_h, bias_v) if bias is not None]
        bias_mask += [bias_h is not None, bias_v is not None]
        dilations += [dw, dh]
    return weights, biases, {"bias_mask": bias_mask, "dilations": dilations}


def separable_conv2d(
    x: Tensor,
    weight_h: Tensor,
    bias_h: Tensor | None,
    weight_v: Tensor,
    bias_v: Tensor | None,
    *,
    dilation: Dilation = 1,
) -> Tensor:
    """A 1xk, then a kx1 depth-wise convolution: `strip_conv_chain` with one stage, and the same op.

    Args:
        x: (N, C, H, W).
        weight_h: (C, 1, 1, k), k odd.
        bias_h: (C,) or None.
        weight_v: (C, 1, k, 1), k odd.
        bias_v: (C,) or None.
        dilation: int or (dh, dw), at least 1; dw is that of the 1xk convolution, dh that of the kx1.

    Returns:
        (N, C, H, W), the dtype of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation.
    """
    return strip_conv_chain(x, [(weight_h, bias_h, weight_v, bias_v, dilation)])


def star(a: Tensor, b: Tensor, *, activation: str = "gelu", outer: str = "none") -> Tensor:
    """The star: outer(activation(a) * b), element by element.

    Args:
        a: the branch to activate, usually (N, C, H, W); any shape will do.
        b: the linear branch, the shape of `a`.
        activation: "gelu" (the exact, erf one), "relu6", "relu", "silu" or "none".
        outer: the activation of the product, from the same list.

    Returns:
        The shape and dtype of `a`.

    Raises:
        TypeError, ValueError: see the module's documentation.
    """
    if (
        activation == "gelu" and outer == "none"
    ):  # the defaults: parsing two strings costs as much as the op itself
        return ops.star(a, b)
    return ops.star(a, b, activation=activation, outer=outer)


def layer_norm2d(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over C at each pixel: (x - mean) / sqrt(variance + eps) * weight + bias, the biased variance.

    Args:
        x: (N, C, H, W).
        weight: (C,).
        bias: (C,) or None.
        eps: positive.

    Returns:
        (N, C, H, W), the dtype of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation.
    """
    return ops.layer_norm2d(x, weight, bias, eps)


def pointwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """activation(1x1 convolution of x), with kernels for CPUs; on GPUs it is PyTorch's own, whatever backend is named.

    Args:
        x: (N, Ci, H, W).
        weight: (Co, Ci, 1, 1).
        bias: (Co,) or None.
        activation: "none", "gelu" (the exact, erf one), "relu6", "relu" or "silu".

    Returns:
        (N, Co, H, W), the dtype and memory format of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation.
    """
    return ops.pointwise_conv2d(x, weight, bias, activation=activation)


def pointwise_gate(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """u * (1x1 convolution of x): the gate that ends a large-kernel attention. No sigmoid.

    Args:
        u: (N, Co, H, W), what is gated.
        x: (N, Ci, H, W).
        weight: (Co, Ci, 1, 1).
        bias: (Co,) or None.

    Returns:
        (N, Co, H, W), the dtype of `u`.

    Raises:
        TypeError, ValueError: see the module's documentation.
    """
    return ops.pointwise_gate(u, x, weight, bias)


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
    """SDM's star convolution: outer(GELU(DW(PW1 z)) * PW2 z) with z = LN(x).

    Args:
        x: (N, Ci, H, W).
        norm_weight: (Ci,), of the LayerNorm over channels.
        norm_bias: (Ci,) or None.
        pw1_weight: (Co, Ci, 1, 1).
        dw_weight: (Co, 1, kh, kw), kh and kw odd; 3x3 in SDAN.
        dw_bias: (Co,) or None.
        pw2_weight: (Co, Ci, 1, 1).
        outer: activation of the product: "none", "gelu", "relu6", "relu" or "silu".
        eps: of the LayerNorm, positive.

    Returns:
        (N, Co, H, W), the dtype of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation.
    """
    return ops.star_conv(
        x, norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight, outer=outer, eps=eps
    )


def mm_lka(
    x: Tensor,
    branches: Sequence[Sequence[BranchConv]],
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
) -> Tensor:
    """Multi-shape multi-scale large-kernel attention: x * proj(concat of the branches).

    Branch i is a chain of depth-wise convolutions of the i-th chunk of the channels of `x`; its first weight says how
    many channels the chunk has.

    Args:
        x: (N, C, H, W).
        branches: for each branch its convolutions in order, each (weight, bias, dilation) as in `depthwise_conv2d`.
        proj_weight: (C, C, 1, 1).
        proj_bias: (C,) or None.

    Returns:
        (N, C, H, W), the dtype of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation; branches that do not cover the channels are refused.
    """
    weights, biases, layout = _flat_branches(branches)
    return ops.mm_lka(x, weights, biases, proj_weight, proj_bias, **layout)


def _flat_branches(
    branches: Sequence[Sequence[BranchConv]],
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Branches as the ops' schemas take them: weights, present biases, and how they are laid out."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    bias_mask: list[bool] = []
    dilations: list[int] = []
    lengths: list[int] = []
    for b, branch in enumerate(_items("branches", branches)):
        convs = _items(f"branches[{b}]", branch)
        lengths.append(len(convs))
        for j, conv in enumerate(convs):
            weight, bias, dilation = _items(f"branches[{b}][{j}]", conv, "(weight, bias, dilation)", 3)
            weights.append(weight)
            bias_mask.append(bias is not None)
            if bias is not None:
                biases.append(bias)
            dilations += _pair(dilation, f"branches[{b}][{j}].dilation")
    return weights, biases, {"bias_mask": bias_mask, "dilations": dilations, "lengths": lengths}


def sdm(
    x: Tensor,
    distill: Sequence[Pointwise],
    star: Sequence[StarParameters],
    fuse: Pointwise,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The star distillation module: levels that distil a part of the channels and refine the rest, then a fusion.

    d_i = GELU(c_i r_{i-1}), r_i = GELU(S_i r_{i-1}), r_0 = x; the result is fuse([d_1, d_2, ..., r_n]). SDAN has four
    levels, the last without a distilled part. In inference a fused kernel runs it where there is one; else, and
    where a gradient is needed, its parts run, each on its own backend.

    Args:
        x: (N, C, H, W).
        distill: for each level that distils (weight (h, Ci, 1, 1), bias (h,)).
        star: for each level the parameters of its `star_conv`, in its order; at least one level.
        fuse: (weight (Co, sum of h + channels of the last level, 1, 1), bias (Co,)).
        eps: of the LayerNorms, positive.

    Returns:
        (N, Co, H, W), the dtype of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation. All biases have to be there.
    """
    return ops.sdm(x, *_flat_sdm(distill, star, fuse), eps=eps)


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
    """SDAN's block: x + LN(proj(MMLKA(SDM(x)))), fused in inference where a kernel can.

    Args:
        x: (N, C, H, W).
        distillation: (distill, star, fuse) as `sdm` takes them.
        branches: of MM-LKA, as `mm_lka` takes them.
        attention_proj: MM-LKA's (weight (C, C, 1, 1), bias (C,)).
        proj: (weight (C, C, 1, 1), bias (C,)).
        norm: of the LayerNorm, (weight (C,), bias (C,)).
        eps: of all LayerNorms, positive.

    Returns:
        (N, C, H, W), the dtype of `x`.

    Raises:
        TypeError, ValueError: see the module's documentation. Only the biases of branches may be None.
    """
    weights, biases, layout = _flat_branches(branches)
    return ops.rsdam(
        x,
        *_flat_sdm(*_items("distillation", distillation, "(distill, star, fuse)", 3)),
        weights,
        biases,
        *(
            _items(name, pair, _PAIR, 2)
            for name, pair in (("attention_proj", attention_proj), ("proj", proj), ("norm", norm))
        ),
        **layout,
        eps=eps,
    )


_PAIR = "(weight, bias)"
_LEVEL = "(norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight)"


def _flat_sdm(distill: Any, star: Any, fuse: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """The parameters of a distillation module as the ops' schemas take them."""
    pairs = [_items(f"distill[{i}]", pair, _PAIR, 2) for i, pair in enumerate(_items("distill", distill))]
    levels = [_items(f"star[{i}]", level, _LEVEL, 6) for i, level in enumerate(_items("star", star))]
    return (
        [t for pair in pairs for t in pair],
        [t for level in levels for t in level],
        _items("fuse", fuse, _PAIR, 2),
    )
