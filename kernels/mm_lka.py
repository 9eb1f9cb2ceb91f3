"""Large-kernel attention on Triton: the branches' convolutions on channel slices in place, then projection, bias and
gate.

A branch reads its chunk of x and writes its chunk of the concatenation where they lie: nothing is split or
concatenated. In NCHW the default pair of branches, two squares and two strip stages, is two launches for both;
elsewhere a two-stage strip branch is two launches in NCHW, and every other convolution one. Projection, bias and gate
are one more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import depthwise_conv2d as depthwise
from . import heuristics, pointwise, strip_conv_chain
from ._triton import jit, tl
from .depthwise_conv2d import conv_nchw_program
from .launch import ceil_div, image_layout, is_aligned, launch, output_format, unavailable, wide_plane
from .strip_conv_chain import Strip, strip_columns_program, strip_rows_program


@jit
def square_and_rows(
    sx_ptr, sw_ptr, sb_ptr, sy_ptr, SC, S_GROUPS, sx_batch, sy_batch, s_blocks, s_programs,
    x_ptr, w1_ptr, b1_ptr, w2_ptr, field_ptr, y_ptr, C, GROUPS, ROWS, x_batch, y_batch, blocks, H, W, QW,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, SR: tl.constexpr, S_BIAS: tl.constexpr,
    K1: tl.constexpr, D1: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr,
    FIELD: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A square convolution of one chunk and the horizontal pass of another's strips, in one launch."""
    pid = tl.program_id(0)
    if pid < s_programs:
        conv_nchw_program(
            pid, sx_ptr, sw_ptr, sb_ptr, sy_ptr, sy_ptr, sy_ptr, sy_ptr, SC, H, W, QW, S_GROUPS, sx_batch, sy_batch,
            s_blocks, KH, KW, DH, DW, SR, V, BLOCK, 1, True, False, S_BIAS, "none", "none", VECTOR, WIDE,
        )  # fmt: skip
    else:
        strip_rows_program(
            pid - s_programs, x_ptr, w1_ptr, b1_ptr, w2_ptr, field_ptr, y_ptr, C, H, W, QW, GROUPS, ROWS, x_batch,
            y_batch, blocks, K1, D1, K2, D2, R, V, BLOCK, False, BIAS, FIELD, VECTOR, WIDE,
        )  # fmt: skip


@jit
def square_and_columns(
    sx_ptr, sw_ptr, sb_ptr, sy_ptr, SC, S_GROUPS, sx_batch, sy_batch, s_blocks, s_programs,
    x_ptr, w1_ptr, b1_ptr, b2_ptr, field_ptr, w2_ptr, b3_ptr, y_ptr, C, GROUPS1, GROUPS2, x_batch, y_batch, blocks,
    H, W, QW,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, SR: tl.constexpr, S_BIAS: tl.constexpr,
    K1: tl.constexpr, D1: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, BG: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, BIAS3: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A square convolution of one chunk and the vertical pass of another's strips, in one launch."""
    pid = tl.program_id(0)
    if pid < s_programs:
        conv_nchw_program(
            pid, sx_ptr, sw_ptr, sb_ptr, sy_ptr, sy_ptr, sy_ptr, sy_ptr, SC, H, W, QW, S_GROUPS, sx_batch, sy_batch,
            s_blocks, KH, KW, DH, DW, SR, V, BLOCK, 1, True, False, S_BIAS, "none", "none", VECTOR, WIDE,
        )  # fmt: skip
    else:
        strip_columns_program(
            pid - s_programs, x_ptr, w1_ptr, b1_ptr, b2_ptr, field_ptr, w2_ptr, b3_ptr, y_ptr, C, H, W, QW, GROUPS1,
            GROUPS2, x_batch, y_batch, blocks, K1, D1, K2, D2, R, V, BG, BLOCK // BG, False, BIAS1, BIAS2, BIAS3,
            VECTOR, WIDE,
        )  # fmt: skip


def _squares_and_strips(
    sx: Tensor, squares: Sequence[Strip], sy: Tensor, x: Tensor, strips: Sequence[Strip], y: Tensor
) -> bool:
    """Both branches of SDAN's default, in NCHW, in two launches; False where a row or a column is too long for that."""
    N, C, H, W = x.shape
    middle, s_middle = torch.empty_like(y), torch.empty_like(sy)
    h1, v1, h2, v2 = strips
    aligned = is_aligned(sx, sy, x, y, middle, s_middle)
    s = heuristics.strip_chain(x.element_size(), W, H, v1.dilation, v2.dilation, aligned)
    if s is None:
        return False
    BLOCK = s.BLOCK
    QW = ceil_div(W, s.V)
    field = x.new_empty((C, W) if v1.bias is not None else (1, 1), dtype=torch.float32)
    common = dict(V=s.V, BLOCK=BLOCK, VECTOR=s.VECTOR, WIDE=wide_plane(x, sx), num_warps=BLOCK // 32)

    def square(t: Strip, src: Tensor, dst: Tensor) -> tuple[list, dict, int]:
        KH, KW = t.weight.shape[2:]
        DH, DW = t.dilations
        R = heuristics.conv_nchw(KH, KW, DH, W, H, x.element_size(), aligned).R
        groups = H if R == 1 else ceil_div(H, R * DH) * DH
        blocks = ceil_div(groups * QW, BLOCK)
        programs = N * src.shape[1] * blocks
        args = [src, t.weight.contiguous(), t.weight if t.bias is None else t.bias.contiguous(), dst, src.shape[1],
                groups, src.stride(0), dst.stride(0), blocks, programs]  # fmt: skip
        return args, dict(KH=KH, KW=KW, DH=DH, DW=DW, SR=R, S_BIAS=t.bias is not None), programs

    pointer = strip_conv_chain.bias_pointer
    args, flags, programs = square(squares[0], sx, s_middle)
    groups, rows = ceil_div(H, s.R_ROWS), BLOCK // QW
    blocks = ceil_div(groups, rows)
    launch(square_and_rows, (programs + N * C * blocks,), *args, x, h1.weight.contiguous(), pointer(h1),
           h2.weight.contiguous(), field, middle, C, groups, rows, x.stride(0), middle.stride(0), blocks, H, W, QW,
           **flags, K1=h1.taps, D1=h1.dilation, K2=h2.taps, D2=h2.dilation, R=s.R_ROWS, BIAS=h1.bias is not None,
           FIELD=v1.bias is not None, **common)  # fmt: skip
    args, flags, programs = square(squares[1], s_middle, sy)
    groups1, groups2 = (ceil_div(H, s.R * t.dilation) * t.dilation for t in (v1, v2))
    blocks = ceil_div(QW, BLOCK // s.BG)
    launch(square_and_columns, (programs + N * C * blocks,), *args, middle, v1.weight.contiguous(), pointer(v1),
           pointer(h2), field, v2.weight.contiguous(), pointer(v2), y, C, groups1, groups2, middle.stride(0),
           y.stride(0), blocks, H, W, QW, **flags, K1=v1.taps, D1=v1.dilation, K2=v2.taps, D2=v2.dilation, R=s.R,
           BG=s.BG, BIAS1=v1.bias is not None, BIAS2=h2.bias is not None, BIAS3=v2.bias is not None,
           **common)  # fmt: skip
    return True


def _branches(
    weights: Sequence[Tensor], biases: Sequence[Tensor], bias_mask: Sequence[bool], dilations: Sequence[int],
    lengths: Sequence[int],
) -> list[list[Strip]]:  # fmt: skip
    present = iter(biases)
    convs = [
        Strip(w, next(present) if has else None, (dilations[2 * i], dilations[2 * i + 1]))
        for i, (w, has) in enumerate(zip(weights, bias_mask, strict=True))
    ]
    out, at = [], 0
    for length in lengths:
        out.append(convs[at : at + length])
        at += length
    return out


def _chunks(x: Tensor, branches: Sequence[Sequence[Strip]]) -> list[Tensor]:
    """The branches' slices of the channels of x: views."""
    return list(torch.split(x, [branch[0].weight.shape[0] for branch in branches], dim=1))


def _concatenation(x: Tensor, branches: Sequence[Sequence[Strip]], fmt: torch.memory_format) -> Tensor:
    """The branches' results side by side."""
    out = torch.empty_like(x, memory_format=fmt)
    sources, results = _chunks(x, branches), _chunks(out, branches)
    kinds = [[conv.axis for conv in branch] for branch in branches]
    if fmt == torch.contiguous_format and sorted(kinds, key=len) == [["hw", "hw"], ["w", "h", "w", "h"]]:
        a, b = (0, 1) if len(kinds[0]) == 2 else (1, 0)
        if _squares_and_strips(sources[a], branches[a], results[a], sources[b], branches[b], results[b]):
            return out
    for chunk, result, branch in zip(sources, results, branches, strict=True):
        strip_conv_chain.run(chunk, branch, result)
    return out


def supports(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None, *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int],
) -> str | None:  # fmt: skip
    """None if the kernels can run this call, else the reason why not."""
    for weight in weights:
        if reason := depthwise.refuses_filter(weight):
            return reason
    return unavailable(x, *weights, *biases, proj_weight, proj_bias)


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None, *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    """x * proj(concatenation of the branches): x (N, C, H, W), x's memory format; see the op's schema for the lists.

    Workspace: the concatenation, and up to three tensors of a chunk.
    """
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = torch.empty_like(x, memory_format=fmt)
    if y.numel() > 0:
        merged = _concatenation(x, _branches(weights, biases, bias_mask, dilations, lengths), fmt)
        lay = image_layout(fmt, merged, x, y)
        pointwise.product(merged, proj_weight, y, lay, lay, bias=proj_bias, gate=x, wide=wide_plane(x))
    return y


def backward(
    grad_output: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], proj_weight: Tensor,
    proj_bias: Tensor | None = None, *, bias_mask: Sequence[bool], dilations: Sequence[int], lengths: Sequence[int],
    output_mask: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients in [x, weights..., biases..., proj_weight, proj_bias] where `output_mask` asks for them.

    The branches are run again; then the gated projection's gradients (one launch each for x and the concatenation,
    two for its parameters) and each branch's, as in strip_conv_chain.
    """
    fmt = output_format(x)
    g, x = grad_output.contiguous(memory_format=fmt), x.contiguous(memory_format=fmt)
    branches = _branches(weights, biases, bias_mask, dilations, lengths)
    present = iter(output_mask[1 + len(weights) : 1 + len(weights) + len(biases)])
    need_x, need_w = output_mask[0], output_mask[1 : 1 + len(weights)]
    need_b = [next(present) if has else False for has in bias_mask]
    need_pw, need_pb = output_mask[-2:]
    gx = torch.empty_like(x, memory_format=fmt)
    gw, gb = proj_weight.new_empty(proj_weight.shape), proj_weight.new_empty(proj_weight.shape[:1])
    grads: list[tuple[Tensor | None, Tensor | None]] = []
    if g.numel() == 0:
        gw.zero_()
        gb.zero_()
        grads = [
            (torch.zeros_like(t.weight) if w else None, t.weight.new_zeros(t.weight.shape[0]) if b else None)
            for t, w, b in zip([t for branch in branches for t in branch], need_w, need_b, strict=True)
        ]
    else:
        lay, wide = image_layout(fmt, g, x, gx), wide_plane(x)
        if need_x or need_pw or need_pb:
            merged = _concatenation(x, branches, fmt)
            if need_x:
                pointwise.product(merged, proj_weight, gx, lay, lay, bias=proj_bias, gate=g, wide=wide)
            if need_pw or need_pb:
                pointwise.weight_grad(g, merged, gw, gb, lay, lay, factor=x, wide=wide)
        through = torch.empty_like(x, memory_format=fmt)
        pointwise.product(g, proj_weight, through, lay, lay, factor=x, transposed=True, wide=wide)
        below = torch.empty_like(x, memory_format=fmt) if need_x else x
        at = 0
        parts = zip(
            _chunks(through, branches), _chunks(x, branches), _chunks(below, branches), branches, strict=True
        )
        for through_chunk, chunk, below_chunk, branch in parts:
            end = at + len(branch)
            _, part = strip_conv_chain.gradients(
                through_chunk,
                chunk,
                branch,
                need_x,
                need_w[at:end],
                need_b[at:end],
                below_chunk if need_x else None,
            )
            grads += part
            at = end
        if need_x:
            gx.add_(below)
    out = [gx] if need_x else []
    out += [w for w, _ in grads if w is not None] + [b for _, b in grads if b is not None]
    return out + [t for t, need in ((gw, need_pw), (gb, need_pb)) if need]
