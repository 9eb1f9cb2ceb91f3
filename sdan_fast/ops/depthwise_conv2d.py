"""`depthwise_conv2d`: one depth-wise convolution, strip or square, with "same" zero padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from . import _check
from ._conv import Conv, Shape, chain_backward, chain_backward_flops, conv_flops
from ._op import Op

Pair = Sequence[int]


def check(x: Any, weight: Any, bias: Any = None, *, dilation: Any = (1, 1)) -> None:
    _check.image("x", x)
    _check.depthwise("", weight, bias, x.shape[1], like=x)
    _check.dilations("dilation", dilation, 2)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: Pair = (1, 1),
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    convs = [Conv(weight, bias, reference.pair(dilation))]
    need_x, need_weight, need_bias = output_mask
    gx, [(gw, gb)] = chain_backward(grad, [x], convs, need_x, [(need_weight, need_bias)])
    return [gx, gw, gb]


def convolution_autocast(
    tensors: Sequence[Tensor], low: torch.dtype, device_type: str
) -> tuple[torch.dtype, torch.dtype]:
    """Autocast runs convolutions in the lower precision."""
    return low, low


def flops(x: Shape, weight: Shape, bias: Shape | None = None, **_: Any) -> int:
    return conv_flops(x, weight)


def backward_flops(
    x: Shape, weight: Shape, bias: Shape | None = None, *, output_mask: Sequence[bool], **_: Any
) -> int:
    return chain_backward_flops(x, [weight], output_mask[0], [(output_mask[1], output_mask[2])])


depthwise_conv2d = Op(
    name="depthwise_conv2d",
    arguments="Tensor x, Tensor weight, Tensor? bias=None, *, int[2] dilation=1",
    check=check,
    reference=reference.depthwise_conv2d,
    reference_backward=backward,
    autocast=convolution_autocast,
    flops=flops,
    backward_flops=backward_flops,
    kernel_checks=lambda *_, dilation=(): all(type(d) is int for d in dilation),
)


LARGE = 400_000  # elements from which oneDNN's own channels_last kernels are ahead where they are
_REACH = 12  # columns between the outermost taps up to which they are used for dilated kernels


# With short vectors the kernels lose where oneDNN's channels_last kernels do not, and the other way about.
_SET, _, _TILES = (backends.kernel_instruction_set() or "").partition("+")
AVX2: bool = _SET == "avx2"
AMX: bool = _TILES == "amx"  # whether both we and oneDNN multiply bfloat16 in matrix tiles
_LANES: int = {"avx2": 8, "avx512": 16}.get(_SET, 1 << 30)
HUGE = 4_000_000  # elements from which, with long vectors, oneDNN's horizontal strips are ahead again
_PAIRED = 24  # channels from which ours are ahead of its horizontal strips in bfloat16
# Where a processor multiplies pairs of bfloat16; elsewhere nobody measured PyTorch's bfloat16 against ours.
_PAIRS: bool = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def in_large_channels_last(x: Tensor, dtype: torch.dtype, least: int = LARGE) -> bool:
    """Whether x is a tensor of that dtype, of so many elements at least, in channels_last and nothing else."""
    return (
        not torch.compiler.is_compiling()  # first: a size looked at is a size that a graph is bound to
        and x.dtype is dtype
        and (dtype is torch.float32 or _PAIRS)
        and x.numel() >= least
        and reference.output_format(x) is torch.channels_last
    )


def read_in_place(x: Tensor, rows: int = 0) -> bool:
    """Whether kernels read this large channels_last image where it lies, and oneDNN's, of so many rows of taps if it is
    one convolution, are not ahead."""
    strip = rows == 1 and not AVX2 and x.numel() >= HUGE
    return x.dtype is torch.float32 and x.shape[1] >= _LANES and not strip


def _read_pairs_in_place(x: Tensor, rows: int) -> bool:
    """The same for bfloat16, which was measured where processors have matrix tiles."""
    return AMX and x.dtype is torch.bfloat16 and x.shape[1] >= (_PAIRED if rows == 1 else _LANES)


def short(taps: int, dilation: int) -> bool:
    """Whether a horizontal strip is one of those that oneDNN is fast for."""
    reach = (
        8 if AVX2 and dilation > 1 else _REACH
    )  # with 11 columns they no longer are: six to sixty times slower
    return taps <= 11 and (taps - 1) * dilation <= reach


def _few(kh: int, kw: int, dh: int, dw: int, low: bool) -> bool:
    """Whether a kernel has so few taps that oneDNN is ahead: of float32, or of pairs of bfloat16 (`low`)."""
    if kh == 1:
        return kw > 1 and short(kw, dw)
    if kw == 1:
        return kh <= 11 and AVX2 or (kh <= 11 or dh >= 4 if low else kh <= 7 and dh >= 4)
    if (kh, kw) == (3, 3):
        return short(kw, dw) and (low or AVX2 or dh >= 3)
    if (dh, dw) == (1, 1):
        return max(kh, kw) <= 7 and not AVX2
    return max(kh, kw) <= 5 and max(dh, dw) <= 2


def slower(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: Pair = (1, 1)) -> str | None:
    """Kernels of few taps on large channels_last images: how few, was measured for each form and dtype."""
    if not torch.compiler.is_compiling() and x.numel() < LARGE:
        return None
    kh, kw = weight.shape[2], weight.shape[3]
    dh, dw = reference.pair(dilation)
    for dtype in (torch.float32, torch.bfloat16):
        few = _few(kh, kw, dh, dw, dtype is torch.bfloat16)
        if not few or not in_large_channels_last(x, dtype):
            continue
        if not read_in_place(x, kh) and not _read_pairs_in_place(x, kh):
            return f"PyTorch's own convolution is faster with {kh}x{kw} taps in channels_last"
    return None


depthwise_conv2d.slower["cpu"] = slower
