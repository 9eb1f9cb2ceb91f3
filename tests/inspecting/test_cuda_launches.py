"""The CUDA C++ ops with every launch recorded as the runtime gets it, and its PTX executed: rung 5 for whole ops."""

from __future__ import annotations

import pytest

from sdan_fast.inspecting import cuda_counts, recorder, torch_kernels
from sdan_fast.inspecting.cuda_table import kernels_of
from sdan_fast.inspecting.tools import Unavailable


@pytest.fixture(scope="module", autouse=True)
def module():
    try:
        return recorder.build_folder() / "_C_cuda.abi3.so"
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_the_bytes_of_a_parameter_that_a_kernel_reads():
    ptx = """.visible .entry k(
	.param .align 8 .b8 k_param_0[32],
	.param .u64 k_param_1
)
{
	ld.param.u64 %rd1, [k_param_0+8];
	ld.param.v2.u32 {%r1, %r2}, [k_param_0+16];
	ld.param.s32 %r3, [k_param_0];
}
"""
    read = cuda_counts.read_bytes(ptx, "k_param_0", 32)
    assert [i for i, byte in enumerate(read) if byte] == [*range(4), *range(8, 24)]
    assert not any(cuda_counts.read_bytes(ptx, "k_param_1", 8))
    indexed = ptx.replace("ld.param.s32 %r3, [k_param_0];", "mov.b64 %rd2, k_param_0;")
    assert all(cuda_counts.read_bytes(indexed, "k_param_0", 32)), "whatever lies there may be read"


def check(only: str) -> list[dict]:
    """What runs on a GPU, from the op's entry to its results: within the error bound of float64."""
    verified = cuda_counts.verify(only)
    assert verified
    beyond = [v for v in verified if not v["share"] <= 1]
    assert not beyond, beyond
    assert all(v["kernels"] for v in verified), "an op that launches nothing proves nothing"
    return verified


def test_some_whole_ops():
    verified = check(r"^(star gelu|depthwise_conv2d 1x11 d6|layer_norm2d) bf16 nchw .* forward")
    assert {v["call"].split()[0] for v in verified} == {"star", "depthwise_conv2d", "layer_norm2d"}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["f32 nchw", "bf16 nhwc"])
def test_every_whole_op(which):
    check(which)


def test_the_ptx_of_each_kernel_stands_alone(module):
    """One entry, no line tables."""
    texts = cuda_counts.ptx_of_kernels(module)
    assert texts
    for name, text in list(texts.items())[:5]:
        assert text.count(".entry") == 1 and f".entry {name}(" in text and ".loc" not in text
        assert cuda_counts.interpreter().Parser(text).kernel(name).params


def test_pytorchs_own_kernels():
    """Cut out of libtorch_cuda.so: the forward kernel for each architecture that torch was built for."""
    try:
        cubins = torch_kernels.cubins()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert "sm_90" in cubins
    names = [name for name, used, code in kernels_of(cubins["sm_90"]) if used["reg"] and code.opcodes["FFMA"]]
    assert any("conv_depthwise2d_forward_kernel" in name for name in names)
