"""The reader of disassemblies: on a listing written by hand, and on a small kernel compiled for two architectures."""

from __future__ import annotations

import re
import subprocess

import pytest

from sdan_fast.inspecting import sass, tools

LISTING = """
//--------------------- .text.kernel_one --------------------------
\t.section\t.text.kernel_one,"ax",@progbits
.text.kernel_one:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*0020*/                   HFMA2 R4, -RZ, RZ, 1.5, 0 ;
.L_x_0:
        /*0030*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
.L_x_1:
        /*0040*/                   FFMA R4, R8, R9, R4 ;
        /*0050*/                   FFMA R5, R8.reuse, R10, R5 ;
        /*0060*/                   IADD3 R6, R6, 0x1, RZ ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/              @!P1 LDG.E.U16 R12, desc[UR4][R2.64+0x2] ;
        /*0090*/                   FFMA R4, R12, R9, R4 ;
        /*00a0*/              @!P2 BRA `(.L_x_0) ;
        /*00b0*/                   STG.E.64 desc[UR4][R14.64], R4 ;
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
        /*00e0*/                   NOP;
//--------------------- .text.unrolled --------------------------
\t.section\t.text.unrolled,"ax",@progbits
.text.unrolled:
        /*0000*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0010*/               @P3 EXIT ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/                   HFMA2.BF16_V2 R4, R8, R10, R4 ;
        /*0040*/                   STL [R1], R4 ;
        /*0050*/                   BRA `(.L_x_9) ;
.L_x_9:
        /*0060*/                   STG.E.128 desc[UR4][R14.64], R4 ;
        /*0070*/                   EXIT ;
"""


def test_a_listing():
    codes = dict(sass.parse(LISTING))
    assert list(codes) == ["kernel_one", "unrolled"]
    one = codes["kernel_one"]
    assert len(one.instructions) == 14 and one.opcodes["FFMA"] == 3
    assert one.loops == [(3, 10), (4, 7)]  # the closing branch to itself is none
    kind, body = one.hot_loop
    assert kind == "loop" and [i.base for i in body] == ["FFMA", "FFMA", "IADD3", "BRA"]
    assert one.hot_fma_share == 0.5
    assert one.widest("LDG") == 128 and one.widest("STG") == 64 and one.widest("LDS") == 0
    assert one.share_of_width("LDG", 128) == 0.5 and one.share_of_width("STG", 128) == 0.0
    assert sum(i.is_fma for i in one.instructions) == 3  # the two HFMA2 move constants
    assert one.spill_instructions == 0


def test_an_unrolled_kernel_has_a_hot_block():
    code = dict(sass.parse(LISTING))["unrolled"]
    kind, body = code.hot_loop
    assert kind == "block" and len(body) == 6  # a predicated exit does not end a block
    assert code.hot_fma_share == pytest.approx(2 / 6)
    assert code.spill_instructions == 1


SOURCE = """
extern "C" __global__ void strip(const float4* __restrict__ x, float4* __restrict__ y, int n, float w) {
  float4 acc = make_float4(0, 0, 0, 0);
  #pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const float4 v = x[i * blockDim.x + threadIdx.x];
    #pragma unroll
    for (int k = 0; k < 8; ++k) {
      acc.x = fmaf(acc.x, v.x, w); acc.y = fmaf(acc.y, v.y, w);
      acc.z = fmaf(acc.z, v.z, w); acc.w = fmaf(acc.w, v.w, w);
    }
  }
  y[blockIdx.x * blockDim.x + threadIdx.x] = acc;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        tools.find_tool("nvcc")
    except tools.Unavailable as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("sass")
    (folder / "strip.cu").write_text(SOURCE)
    return folder


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_a_compiled_kernel(folder, arch):
    """A loop of 32 FMAs and one 128-bit load, as written."""
    cubin = folder / f"strip.{arch}.cubin"
    command = [tools.find_tool("nvcc"), f"-arch={arch}", "-cubin", folder / "strip.cu", "-o", cubin]
    subprocess.run(command, check=True)
    ((name, code),) = sass.parse(tools.disassembly(cubin.read_bytes()))
    assert name == "strip"
    kind, body = code.hot_loop
    fmas = sum(i.is_fma for i in body)
    packed = sum(i.base == "FFMA2" for i in body)
    assert kind == "loop" and fmas + packed == 32
    assert code.hot_fma_share == fmas / len(body) >= 0.5
    assert code.widest("LDG") == code.widest("STG") == 128 and code.share_of_width("LDG", 128) == 1.0
    used = tools.resource_usage(cubin.read_bytes())["strip"]
    assert 8 <= used["reg"] <= 64 and used["stack"] == used["local"] == used["shared"] == 0


def test_names_are_read_without_namespaces():
    names = ["_ZN9sdan_fast4cuda15conv_row_kernelILi11EEEvPKvS3_S3_PvNS0_10ConvParamsE", "plain"]
    short = tools.demangle(names)
    assert short["plain"] == "plain"
    assert re.fullmatch(r"conv_row_kernel<11>|_ZN.*", short[names[0]])  # the latter without c++filt
