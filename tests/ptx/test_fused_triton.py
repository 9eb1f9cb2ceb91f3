"""Rung 5: the PTX of LayerNorm, gate, strip chain, StarConv and attention, executed: values, faults, races, traffic."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip(
        "this process interprets kernels; PTX needs one without TRITON_INTERPRET", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))
from triton_cases import (
    attention_args,
    attention_reference,
    chain_args,
    chain_reference,
    gate_args,
    norm_args,
    star_conv_args,
)
from triton_harness import FORMATS, catching, check_op, fma_share, ptx_interpreted

from sdan_fast import reference
from sdan_fast.inspecting.triton_kernels import compile_specialized
from sdan_fast.kernels import layer_norm2d, mm_lka, pointwise_gate, star_conv, strip_conv_chain
from sdan_fast.kernels.branches_nchw import kind_of

formats = pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "channels_last"])
BF16, NCHW = torch.bfloat16, torch.contiguous_format


def conflicts(stats):
    """Bank conflicts over wavefronts, of all launches together."""
    return sum(s.bank_conflicts for s in stats) / max(1, sum(s.shared_wavefronts for s in stats))


def unshifted(st):
    """Sector efficiency of the 128-bit loads."""
    wide = [s for s in st.sites if s.space == "global" and s.kind == "ld" and s.size == 16]
    assert wide
    return min(s.efficiency for s in wide)


@formats
def test_layer_norm(fmt):
    for shape in ((1, 28, 5, 7), (2, 3, 1, 1)):
        with ptx_interpreted():
            check_op(layer_norm2d, reference.layer_norm2d, norm_args(shape, BF16, fmt))
    with ptx_interpreted() as stats:
        check_op(layer_norm2d, reference.layer_norm2d, norm_args((1, 56, 8, 32), BF16, fmt))
    forward, backward, _ = stats
    assert (
        unshifted(forward) >= 0.85 and forward.store_efficiency >= 0.85 and backward.store_efficiency >= 0.85
    )
    assert conflicts(stats) < 0.1


@formats
@pytest.mark.parametrize("cc", [80, 89])
def test_gate(cc, fmt):
    with ptx_interpreted(cc=cc) as stats:
        check_op(pointwise_gate, reference.pointwise_gate, gate_args((1, 56, 4, 32), 56, BF16, fmt))
    assert conflicts(stats) < 0.1
    for st in stats:
        assert st.load_efficiency >= 0.85 and st.store_efficiency >= 0.85
    assert all(any("mma" in op for op in st.opcodes) for st in stats[:4])  # the tensor cores do the work


def test_gate_of_one_pixel():
    """What is 1 becomes a constant of the compiled kernel."""
    with ptx_interpreted():
        args = gate_args((1, 3, 1, 1), 2, torch.float32, NCHW)
        check_op(pointwise_gate, reference.pointwise_gate, args)
        args = star_conv_args((1, 3, 1, 1), 2, torch.float32, NCHW)
        star_conv.backward(star_conv.forward(*args), *args, output_mask=[True] * 7)


@pytest.mark.slow
@formats
@pytest.mark.parametrize("cc", [80, 89])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_gate_sweep(dtype, cc, fmt):
    cases = [((1, 28, 5, 7), 40), ((2, 48, 4, 8), 48), ((2, 3, 1, 1), 2)]
    for shape, out in cases if cc == 80 else cases[:1]:  # see test_sm_89_runs_what_sm_80_runs
        with ptx_interpreted(cc=cc):
            check_op(pointwise_gate, reference.pointwise_gate, gate_args(shape, out, dtype, fmt))


@formats
def test_float32_products_have_no_bank_conflicts(fmt):
    """Plain FMAs, with shared memory for both operands; the weight's gradient in NCHW has none but for its sums."""
    with ptx_interpreted() as stats:
        check_op(pointwise_gate, reference.pointwise_gate, gate_args((1, 28, 2, 40), 28, torch.float32, fmt))
        args = star_conv_args((1, 28, 2, 16), 28, torch.float32, fmt)
        star_conv.backward(star_conv.forward(*args), *args, output_mask=[True] * 7)
    wgrad = "pointwise_wgrad_planes" if fmt == NCHW else "pointwise_wgrad"
    names = {"pointwise_product", "norm_pointwise", "norm_pointwise_grad", wgrad}
    products = [st for st in stats if st.kernel in names]
    assert {st.kernel for st in products} == names
    for st in products:
        assert conflicts([st]) < 0.1, (st.kernel, conflicts([st]))


def test_float32_weight_gradient_in_planes():
    """Eight chunks of pixels, as a program has them in SDAN's images: mostly FMAs, whole sectors, no bank conflicts."""
    args = gate_args((1, 8, 64, 64), 8, torch.float32, NCHW)
    with ptx_interpreted() as stats:
        check_op(pointwise_gate, reference.pointwise_gate, args, needed=[False, False, True, True])
    st = next(s for s in stats if s.kernel == "pointwise_wgrad_planes")
    assert fma_share(st) >= 0.3 and conflicts([st]) < 0.1 and unshifted(st) >= 0.85, fma_share(st)


def read_once(st, argument):
    """Bytes that a launch reads of a tensor, each counted once; a tensor may be several of its arguments."""
    (read,) = (n for name, (n, _) in st.footprint.items() if argument in name.split("/"))
    return read


STAGES, MASK = [(3, 1), (3, 2)], [True] * 4


def kinds(stats):
    """What the jobs of a launch are: "square", "rows", "columns"."""
    return [kind_of(job) for job in stats.constexprs.get("JOBS", ())]


@formats
def test_chain(fmt):
    """Forward and input gradient: two launches each, exact at the borders."""
    args, kwargs = chain_args((1, 4, 9, 16), STAGES, MASK, BF16, fmt)
    with ptx_interpreted() as stats:
        check_op(strip_conv_chain, chain_reference, args, kwargs, needed=[True] + [False] * 8)
    assert [kinds(st) for st in stats] == [["rows"], ["columns"]] * 2


@pytest.mark.slow
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_chain_sweep(dtype, fmt):
    """SDAN's stages last, and of float16, which differs from bfloat16 by two conversions, the odd shape alone.

    12 channels are vectors of four and no power of two of them, as SDAN's 28 are.
    """
    cases = [((2, 6, 9, 11), STAGES), ((1, 8, 2, 8), STAGES), ((1, 12, 12, 32), [(11, 1), (11, 6)])]
    for shape, stages in cases[: 1 if dtype == torch.float16 else 3]:
        args, kwargs = chain_args(shape, stages, MASK, dtype, fmt)
        with ptx_interpreted():
            check_op(strip_conv_chain, chain_reference, args, kwargs)


@pytest.mark.slow
@formats
@pytest.mark.parametrize("shape", [(1, 2, 1, 4400), (1, 2, 4400, 8)], ids=["rows", "columns"])
def test_chain_longer_than_a_program(shape, fmt):
    """Programs that go around several times, and hold what lies between two strips in a tensor of its own."""
    args, kwargs = chain_args(shape, STAGES, MASK, BF16, fmt)
    with ptx_interpreted() as stats:
        check_op(strip_conv_chain, chain_reference, args, kwargs, needed=[True] + [False] * 8)
    long = ["rows"] if shape[2] == 1 else ["columns"]
    assert [kinds(st) for st in stats] == [["rows"], ["columns"]] * 2
    assert all(st.kernel == ("branches_nchw" if fmt == NCHW else "branches_nhwc") for st in stats)
    assert all(job[15] for st in stats if kinds(st) == long for job in st.constexprs["JOBS"])


@formats
def test_star_conv(fmt):
    args = star_conv_args((1, 8, 5, 16), 8, BF16, fmt)
    with ptx_interpreted() as stats:
        y = star_conv.forward(*args)
        exact = reference.star_conv(*(v.double() for v in args))
        error, eager = ((v.double() - exact).abs().max() for v in (y, reference.star_conv(*args)))
        assert error <= 2 * eager + 2 * torch.finfo(BF16).eps * exact.abs().max()
    assert len(stats) == 2


@pytest.mark.slow
@formats
@pytest.mark.parametrize(
    ("cc", "dtype"), [(80, torch.float32), (80, BF16), (89, BF16)], ids=["80-f32", "80-bf16", "89-bf16"]
)
def test_star_conv_sweep(cc, dtype, fmt):
    cases = [((1, 28, 9, 16), 28), ((1, 56, 8, 32), 28), ((1, 8, 6, 8), 12)]
    for shape, out in cases if cc == 80 else cases[:1]:  # see test_sm_89_runs_what_sm_80_runs
        with ptx_interpreted(cc=cc):
            check_op(
                star_conv, reference.star_conv, star_conv_args(shape, out, dtype, fmt), {"outer": "gelu"}
            )


def without_locations(ttgir):
    """Without source files and lines: a cached kernel has those of the checkout that it was compiled in."""
    lines = (line for line in ttgir.splitlines() if not line.startswith("#loc"))
    return "\n".join(re.sub(r"(?: loc\((?:[^()]|\([^()]*\))*\))+", "", line) for line in lines)


@pytest.mark.slow
@formats
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_sm_89_runs_what_sm_80_runs(dtype, fmt):
    """The same Triton GPU IR, of which LLVM orders some instructions otherwise; so a sweep has one shape for sm_89."""
    gate, args = gate_args((1, 28, 5, 7), 40, dtype, fmt), star_conv_args((1, 28, 9, 16), 28, dtype, fmt)
    with catching() as launches:
        y = pointwise_gate.forward(*gate)
        pointwise_gate.backward(y, *gate, output_mask=[True] * 4)
        y = star_conv.forward(*args, outer="gelu")
        star_conv.backward(y, *args, outer="gelu", output_mask=[True] * 7)
    for launch in launches:
        made = {
            cc: without_locations(compile_specialized(launch.specialized(cc)).asm["ttgir"]) for cc in (80, 89)
        }
        assert "ttg.target" in made[80] and "tt.store" in made[80]
        assert made[89].replace("cuda:89", "cuda:80") == made[80], launch.name


STRIPS = [(1, 3, 1), (3, 1, 1), (1, 3, 2), (3, 1, 2)]
BRANCHES = [[(3, 3, 1), (3, 3, 2)], STRIPS]
MIXED = [[(3, 3, 1), (3, 3, 2)], [*STRIPS[:2], (3, 3, 2)], [(3, 3, 1), *STRIPS[2:]], STRIPS]
SHORT = [[(3, 3, 2)], [(1, 3, 1), (3, 1, 2)]]


@formats
def test_attention(fmt):
    """The default branches in small: two launches for squares and strips, one for projection, bias and gate."""
    args, kwargs = attention_args((1, 16, 6, 16), BRANCHES, BF16, fmt)
    with ptx_interpreted() as stats:
        check_op(mm_lka, attention_reference, args, kwargs, backward=False)
    assert [kinds(st) for st in stats] == [["square", "rows"], ["square", "columns"], []]
    assert stats[-1].kernel == "pointwise_product"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "fmt"), [(torch.float32, NCHW), (BF16, torch.channels_last)], ids=["float32-nchw", "bf16-nhwc"]
)
def test_attention_sweep(dtype, fmt):
    """All kinds of jobs in one launch, channel by channel; then short branches for vectors of channels, two images, and
    filters that are larger than the image: the compiler takes the cube of a kernel's length.
    """
    for shape, branches in (((1, 12, 6, 16), MIXED), ((2, 24, 7, 11), SHORT), ((1, 16, 3, 8), SHORT)):
        args, kwargs = attention_args(shape, branches, dtype, fmt)
        with ptx_interpreted():
            check_op(mm_lka, attention_reference, args, kwargs)
