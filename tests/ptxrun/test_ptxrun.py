"""Tests of ptxrun against torch on the CPU, NumPy, and C++ code compiled for the host. Needs torch, triton and nvcc."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import ptxrun
from ptxrun import MemoryFault, PTXError, RaceError, Unsupported, bf16_to_f32, f32_to_bf16, run, run_triton

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

NVCC = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
needs_nvcc = pytest.mark.skipif(not os.path.exists(NVCC), reason="no nvcc")


@pytest.fixture(scope="session")
def cuda(tmp_path_factory):
    """CUDA C++ source -> PTX text."""
    at, done = tmp_path_factory.mktemp("cuda"), {}

    def build(src, *flags):
        if (src, flags) not in done:
            f = at / f"k{len(done)}.cu"
            f.write_text(src)
            subprocess.run(
                [NVCC, "-ptx", "-arch=sm_80", *flags, str(f), "-o", str(f.with_suffix(".ptx"))], check=True
            )
            done[src, flags] = f.with_suffix(".ptx").read_text()
        return done[src, flags]

    return build


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want, dtype=torch.float32, scale=1.0):
    tol = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype] * scale
    torch.testing.assert_close(got.double(), want.double(), rtol=tol, atol=tol)


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def vadd(x, y, z, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(z + o, tl.load(x + o, mask=o < n) + tl.load(y + o, mask=o < n), mask=o < n)


@pytest.mark.parametrize("n", [1, 1000, 4096])
def test_vector_add(n):
    x, y, z = rand(n), rand(n, seed=1), torch.full((n,), float("nan"))
    st = run_triton(vadd, (triton.cdiv(n, 256),), x, y, z, n, B=256)
    assert torch.equal(z, x + y)
    assert st.global_store_bytes == 4 * n and st.global_load_bytes == 8 * n
    if n == 4096:
        assert st.load_efficiency == st.store_efficiency == st.lane_efficiency == 1.0
        assert st.footprint["x"] == (4 * n, 0) and st.footprint["z"] == (0, 4 * n)
        assert st.flops == n


@triton.jit
def dwconv_row(x, w, y, H, W, K: tl.constexpr, B: tl.constexpr):
    r, c = tl.program_id(0), tl.program_id(1)
    offs = tl.program_id(2) * B + tl.arange(0, B)
    acc = tl.zeros((B,), tl.float32)
    for k in tl.static_range(K):
        i = offs + k - K // 2
        acc += tl.load(x + (c * H + r) * W + i, mask=(i >= 0) & (i < W), other=0.0).to(tl.float32) * tl.load(
            w + c * K + k
        )
    tl.store(y + (c * H + r) * W + offs, acc, mask=offs < W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cc", [80, 90])
def test_triton_dwconv_k23(dtype, cc):
    C, H, W = 5, 7, 150
    x, w, y = rand(C, H, W, dtype=dtype), rand(C, 23) / 5, torch.full((C, H, W), float("nan")).to(dtype)
    run_triton(dwconv_row, (H, C, triton.cdiv(W, 128)), x, w, y, H, W, K=23, B=128, cc=cc)
    close(
        y, torch.nn.functional.conv2d(x.double(), w.double()[:, None, None], padding=(0, 11), groups=C), dtype
    )


def test_dwconv_speed():
    """48 x 64 x 64, K = 23, and the batch size does not change the result."""
    C, H, W = 48, 64, 64
    x, w = rand(C, H, W), rand(C, 23) / 5
    ys = [torch.empty(C, H, W) for _ in range(2)]
    st = run_triton(dwconv_row, (H, C, 1), x, w, ys[0], H, W, K=23, B=64, num_warps=1)
    assert st.seconds < 60
    run_triton(
        dwconv_row, (H, C, 1), x, w, ys[1], H, W, K=23, B=64, num_warps=1, run_options={"batch_lanes": 999}
    )
    close(ys[0], torch.nn.functional.conv2d(x.double(), w.double()[:, None, None], padding=(0, 11), groups=C))
    assert torch.equal(*ys)


@triton.jit
def layernorm_nchw(x, g, b, y, C, HW, BC: tl.constexpr, BP: tl.constexpr):
    p, c = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BC)
    m = (c[:, None] < C) & (p[None, :] < HW)
    v = tl.load(x + c[:, None] * HW + p[None, :], mask=m, other=0.0).to(tl.float32)
    mu = tl.sum(v, 0) / C
    d = tl.where(c[:, None] < C, v - mu[None, :], 0.0)
    r = tl.rsqrt(tl.sum(d * d, 0) / C + 1e-6)
    o = (
        d * r[None, :] * tl.load(g + c, mask=c < C, other=0.0)[:, None]
        + tl.load(b + c, mask=c < C, other=0.0)[:, None]
    )
    tl.store(y + c[:, None] * HW + p[None, :], o.to(y.dtype.element_ty), mask=m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C,HW,BC,BP,warps", [(48, 100, 64, 32, 4), (64, 256, 64, 8, 8), (60, 33, 64, 1, 2)])
def test_triton_layernorm(dtype, C, HW, BC, BP, warps):
    x, g, b = rand(C, HW, dtype=dtype), rand(C, seed=1), rand(C, seed=2)
    y = torch.full_like(x, float("nan"))
    st = run_triton(layernorm_nchw, (triton.cdiv(HW, BP),), x, g, b, y, C, HW, BC=BC, BP=BP, num_warps=warps)
    close(y, torch.nn.functional.layer_norm(x.double().T, (C,), g.double(), b.double(), 1e-6).T, dtype)
    assert st.warp_instructions["barrier"] > 0 and st.warp_instructions["warp"] > 0 and st.shared_accesses > 0


@triton.jit
def gelu_star(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v, u = tl.load(x + i, mask=i < n).to(tl.float32), tl.load(y + i, mask=i < n).to(tl.float32)
    r = (
        0.5 * v * (1 + tl.math.erf(v * 0.7071067811865476)) * u
        + tl.sigmoid(v) * u
        + tl.exp(-v * v)
        + tl.log(tl.abs(u) + 1)
    )
    tl.store(
        o + i, (r + tl.sqrt(tl.abs(v)) + tl.cos(v) + tl.maximum(u, v)).to(o.dtype.element_ty), mask=i < n
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_gelu_star(dtype):
    x, y, o = 2 * rand(1500, dtype=dtype), rand(1500, seed=1, dtype=dtype), torch.zeros(1500, dtype=dtype)
    st = run_triton(gelu_star, lambda meta: (triton.cdiv(1500, meta["B"]),), x, y, o, 1500, B=512)
    v, u = x.double(), y.double()
    want = (
        torch.nn.functional.gelu(v) * u
        + torch.sigmoid(v) * u
        + torch.exp(-v * v)
        + torch.log(u.abs() + 1)
        + v.abs().sqrt()
        + v.cos()
        + torch.maximum(u, v)
    )
    close(o, want, dtype)
    assert st.warp_instructions["sfu"] > 0
    first = o.clone()
    run_triton(gelu_star, (3,), x, y, o, 1500, B=512, run_options={"approx": "worst"})
    close(o, want, dtype)  # the documented errors are still within tolerance
    assert dtype != torch.float32 or not torch.equal(o, first)


@triton.jit
def scan(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=0.0)
    tl.store(y + o, tl.cumsum(v, 0), mask=o < n)
    tl.store(y + n, tl.max(v, 0))
    tl.store(y + n + 1, tl.argmax(v, 0).to(tl.float32))


@pytest.mark.parametrize("cc", [75, 80, 89, 90, 100, 120])
def test_triton_scan_and_max(cc):
    x, y = rand(200), torch.zeros(202)
    run_triton(scan, (1,), x, y, 200, B=256, cc=cc)
    close(y[:200], x.double().cumsum(0))
    assert y[200] == x.max() and y[201] == x.argmax()


@triton.jit
def matmul(a, b, c, M, N, K, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    i, j = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        u = tl.load(a + i[:, None] * K + k[None, :], mask=(i[:, None] < M) & (k[None, :] < K), other=0.0)
        v = tl.load(b + k[:, None] * N + j[None, :], mask=(k[:, None] < K) & (j[None, :] < N), other=0.0)
        acc = tl.dot(u, v, acc, input_precision=P)
    tl.store(
        c + i[:, None] * N + j[None, :], acc.to(c.dtype.element_ty), mask=(i[:, None] < M) & (j[None, :] < N)
    )


def truncate_tf32(t):
    return torch.from_numpy((t.numpy().view("u4") & np.uint32(0xFFFFE000)).view("f4"))


@pytest.mark.parametrize(
    "dtype,precision",
    [
        (torch.float32, "tf32"),
        (torch.float32, "ieee"),
        (torch.float32, "tf32x3"),
        (torch.float16, "ieee"),
        (torch.bfloat16, "ieee"),
    ],
)
@pytest.mark.parametrize("M,N,K,warps", [(64, 64, 32, 4), (100, 77, 96, 4), (64, 48, 60, 8)])
def test_triton_dot(dtype, precision, M, N, K, warps):
    a, b, c = rand(M, K, dtype=dtype), rand(K, N, dtype=dtype, seed=1), torch.full((M, N), float("nan"))
    st = run_triton(
        matmul,
        (triton.cdiv(M, 64), triton.cdiv(N, 64)),
        a,
        b,
        c,
        M,
        N,
        K,
        precision,
        64,
        64,
        32,
        num_warps=warps,
    )
    if precision == "tf32":
        a, b = truncate_tf32(a), truncate_tf32(b)
    close(c, a.double() @ b.double(), scale=2)
    assert (st.warp_instructions["mma"] > 0) == (precision != "ieee" or dtype != torch.float32)


@triton.jit
def two_stage(x, partial, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=0.0)
    tl.store(partial + tl.program_id(0), tl.sum(v, 0))
    tl.atomic_add(partial + 100, tl.sum(v * v, 0))


def test_triton_two_stage_reduction_and_atomics():
    x, p, out = rand(10000), torch.zeros(128), torch.zeros(128)
    run_triton(two_stage, (20,), x, p, 10000, B=512)
    run_triton(two_stage, (1,), p, out, 20, B=32, num_warps=1)
    close(out[0], x.double().sum(), scale=10)
    close(p[100], (x.double() ** 2).sum())


def test_triton_views_and_aliases():
    base, y = rand(10, 64), rand(1000)
    z = torch.zeros(32, 20).t()  # not contiguous: its span counts
    with pytest.raises(MemoryFault, match="past the end of z"):
        run_triton(vadd, (3,), y, y, z, 768, B=256)
    with pytest.raises(MemoryFault, match=r"of x \(2556 bytes\)"):
        run_triton(vadd, (3,), base[:, ::2], y, torch.zeros(1000), 640, B=256)  # 639 elements up to the last
    x, before = rand(512), rand(512)
    run_triton(vadd, (2,), x, x[16:], x, 256, B=128)  # in place, overlapping
    assert torch.equal(x[256:], before[256:]) and not torch.equal(x[:256], before[:256])
    run_triton(vadd, (1,), torch.zeros(0), torch.zeros(0), torch.zeros(0), 0, B=128)
    st = run_triton(
        vadd, (1,), y[1:129], y[4:132], torch.zeros(128), 128, B=128
    )  # an unaligned view costs a sector
    assert st.global_load_sector_bytes == 4 * 5 * 32 + 4 * 5 * 32 - 4 * 32 or st.load_efficiency < 1


def test_hidden_parameters_are_at_the_end():
    ck, passed, names = ptxrun.compile_triton(vadd, (rand(16), rand(16), rand(16), 16), {"B": 16})
    k = ptxrun.Parser(ck.asm["ptx"]).kernel()
    assert len(k.params) == len(passed) + 2 and all(size == 8 for _, _, size, _ in k.params[-2:])


# -------------------------------------------------------------------------------------------------------------- CUDA

SEPARABLE = r"""
#define K 9
#define T 16
__constant__ float taps[K];
extern "C" __global__ void sep(const float* x, const float* wv, float* y, int H, int W, int sync) {
  __shared__ float tile[T + K - 1][T + K], mid[T][T + K];
  int c = blockIdx.z, r0 = blockIdx.y * T, c0 = blockIdx.x * T, tid = threadIdx.y * blockDim.x + threadIdx.x;
  int n = blockDim.x * blockDim.y;
  for (int i = tid; i < (T + K - 1) * (T + K - 1); i += n) {
    int r = i / (T + K - 1), q = i % (T + K - 1), gr = r0 + r - K / 2, gc = c0 + q - K / 2;
    tile[r][q] = gr >= 0 && gr < H && gc >= 0 && gc < W ? x[(c * H + gr) * W + gc] : 0.f;
  }
  __syncthreads();
  for (int i = tid; i < T * (T + K - 1); i += n) {
    int r = i / (T + K - 1), q = i % (T + K - 1);
    float a = 0;
    for (int k = 0; k < K; k++) a += tile[r + k][q] * wv[c * K + k];
    mid[r][q] = a;
  }
  if (sync) __syncthreads();
  for (int i = tid; i < T * T; i += n) {
    int r = i / T, q = i % T;
    float a = 0;
#pragma unroll
    for (int k = 0; k < K; k++) a += mid[r][q + k] * taps[k];
    if (r0 + r < H && c0 + q < W) y[(c * H + r0 + r) * W + c0 + q] = a;
  }
}"""


@needs_nvcc
@pytest.mark.parametrize("block", [(16, 16), (7, 11), (32, 4)])
@pytest.mark.parametrize("batch", [1, 1 << 15])
def test_cuda_separable_conv(cuda, block, batch):
    C, H, W = 3, 37, 50
    x, wv, wh, y = rand(C, H, W), rand(C, 9), rand(9, seed=2), np.full((C, H, W), np.nan, "f4")
    st = run(
        cuda(SEPARABLE),
        None,
        (-(-W // 16), -(-H // 16), C),
        block,
        [x.numpy(), wv.numpy(), y, H, W, 1],
        symbols={"taps": wh.numpy()},
        batch_lanes=batch,
    )
    v = torch.nn.functional.conv2d(x.double(), wv.double()[:, None, :, None], padding=(4, 0), groups=C)
    want = torch.nn.functional.conv2d(v, wh.double().expand(C, 1, 1, 9), padding=(0, 4), groups=C)
    close(torch.from_numpy(y), want, scale=10)
    assert st.warp_instructions["barrier"] > 0 and st.shared_accesses > 0 and not st.races


@needs_nvcc
def test_missing_barrier_is_a_race(cuda):
    x, w, y = np.ones((1, 32, 32), "f4"), np.ones((1, 9), "f4"), np.zeros((1, 32, 32), "f4")
    with pytest.raises(RaceError, match="touched since the last barrier"):
        run(cuda(SEPARABLE), None, (2, 2, 1), (16, 16), [x, w, y, 32, 32, 0])
    st = run(cuda(SEPARABLE), None, (2, 2, 1), (16, 16), [x, w, y, 32, 32, 0], races="record")
    assert st.races
    run(cuda(SEPARABLE), None, (2, 2, 1), (32, 1), [x, w, y, 32, 32, 0])  # one warp: no race


REDUCE = r"""
extern "C" __global__ void reduce(const float* x, float* out, int n) {
  __shared__ float part[32];
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) s += __shfl_down_sync(~0u, s, o);
    if (threadIdx.x == 0) atomicAdd(out, s);
  }
}
extern "C" __global__ void shuffles(const int* x, int* y) {
  int t = threadIdx.x, v = x[t], n = blockDim.x;
  y[t] = __shfl_up_sync(~0u, v, 3); y[n + t] = __shfl_down_sync(~0u, v, 5, 16);
  y[2 * n + t] = __shfl_sync(~0u, v, t * 7, 8); y[3 * n + t] = __shfl_xor_sync(~0u, v, 9);
  y[4 * n + t] = __ballot_sync(~0u, v > 0); y[5 * n + t] = __any_sync(~0u, v > 90) + 2 * __all_sync(~0u, v > -1000);
  y[6 * n + t] = __reduce_add_sync(~0u, v); y[7 * n + t] = __reduce_max_sync(~0u, v);
  y[8 * n + t] = __syncthreads_count(v > 0); y[9 * n + t] = 0;
  if (t % 3 == 0) y[9 * n + t] = __activemask(); else if (v > 0) y[9 * n + t] = -1;
}"""


@needs_nvcc
def test_cuda_warp_reduction(cuda):
    x, out = rand(5000).numpy(), np.zeros(1, "f4")
    run(cuda(REDUCE), "reduce", 6, 256, [x, out, 5000])
    np.testing.assert_allclose(out[0], x.astype("f8").sum(), rtol=1e-4)


@needs_nvcc
def test_cuda_shuffles(cuda):
    n = 64
    x, y = np.random.default_rng(0).integers(-100, 100, n, dtype="i4"), np.zeros((10, n), "i4")
    run(cuda(REDUCE), "shuffles", 1, n, [x, y])
    w, lane = x.reshape(-1, 32), np.arange(32)
    take = lambda j: w[:, j].reshape(-1)
    np.testing.assert_array_equal(y[0], take(np.where(lane >= 3, lane - 3, lane)))
    np.testing.assert_array_equal(y[1], take(np.where(lane % 16 + 5 < 16, lane + 5, lane)))
    np.testing.assert_array_equal(y[2], take(lane // 8 * 8 + lane * 7 % 8))
    np.testing.assert_array_equal(y[3], take(lane ^ 9))
    bits = ((w > 0).astype("u8") << lane.astype("u8")).sum(1).astype("u4").view("i4")
    np.testing.assert_array_equal(y[4], np.repeat(bits, 32))
    np.testing.assert_array_equal(y[5], np.repeat((w > 90).any(1) + 2, 32))
    np.testing.assert_array_equal(y[6], np.repeat(w.sum(1), 32))
    np.testing.assert_array_equal(y[7], np.repeat(w.max(1), 32))
    assert (y[8] == (x > 0).sum()).all()
    t = np.arange(n)
    thirds = np.array([sum(1 << q for q in range(32) if (32 * h + q) % 3 == 0) for h in range(2)], "u4").view(
        "i4"
    )
    np.testing.assert_array_equal(y[9], np.where(t % 3 == 0, np.repeat(thirds, 32), np.where(x > 0, -1, 0)))


ASYNC = r"""
#include <cuda_pipeline.h>
extern "C" __global__ void stencil(const float* x, float* y, int tiles, int wait) {
  __shared__ __align__(16) float buf[2][512];
  int t = threadIdx.x;
  const float* in = x + (size_t)blockIdx.x * tiles * 512;
  __pipeline_memcpy_async(&buf[0][4 * t], in + 4 * t, 16);
  __pipeline_commit();
  for (int i = 0; i < tiles; i++) {
    if (i + 1 < tiles) __pipeline_memcpy_async(&buf[(i + 1) & 1][4 * t], in + (i + 1) * 512 + 4 * t, 16);
    __pipeline_commit();
    if (wait) __pipeline_wait_prior(1);
    __syncthreads();
    for (int k = 0; k < 4; k++) {
      int q = t + 128 * k;
      y[((size_t)blockIdx.x * tiles + i) * 512 + q] = buf[i & 1][q] + 2 * buf[i & 1][(q + 1) % 512];
    }
    __syncthreads();
  }
}"""


@needs_nvcc
def test_cuda_cp_async_double_buffer(cuda):
    x, y = rand(3, 5, 512).numpy(), np.full((3, 5, 512), np.nan, "f4")
    st = run(cuda(ASYNC), None, 3, 128, [x, y, 5, 1])
    np.testing.assert_allclose(y, x + 2 * np.roll(x, -1, 2), rtol=1e-6)
    assert st.global_load_bytes == x.nbytes and st.load_efficiency == 1.0
    run(cuda(ASYNC), None, 3, 128, [x, y, 5, 0], races="off")  # data must not be visible before the wait
    assert np.isnan(y).all()


ACCESS = r"""
extern "C" __global__ void copy(const float* x, float* y, int stride, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i * stride];
}
extern "C" __global__ void banks(float* y, int stride) {
  extern __shared__ float s[];
  s[threadIdx.x * stride] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x * stride];
}
extern "C" __global__ void banks4(float4* y, int stride) {
  extern __shared__ float4 v[];
  v[threadIdx.x * stride] = make_float4(1, 2, 3, threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = v[threadIdx.x * stride];
}
extern "C" __global__ void stuck(float* y) {
  if (threadIdx.x < 32) { __syncthreads(); y[0] = 1; } else { if (y[1] == 0) asm volatile("bar.sync 1;"); y[2] = 1; }
}
extern "C" __global__ void forever(float* y) { while (y[0] == 0) y[1] += 1; }
extern "C" __global__ void transposed(const float* x, float* y) {
  y[threadIdx.x * 32 + threadIdx.y] = x[threadIdx.y * 32 + threadIdx.x];
}"""


@needs_nvcc
def test_out_of_bounds_raises(cuda):
    x, y = np.ones(100, "f4"), np.zeros(128, "f4")
    with pytest.raises(MemoryFault) as e:
        run(cuda(ACCESS), "copy", 1, 128, [x, y, 1, 128])
    for part in (
        "ld.global",
        "thread (100, 0, 0)",
        "0 bytes past the end of argument 0 (400 bytes)",
        "PTX line",
    ):
        assert part in str(e.value)
    with pytest.raises(MemoryFault, match="before the start of argument 0"):
        run(cuda(ACCESS), "copy", 1, 128, [x, y, -1, 128])
    with pytest.raises(MemoryFault, match="misaligned"):
        run(cuda(ACCESS), "copy", 1, 32, [np.zeros(256, "u1")[2:], y, 1, 32])
    frozen = np.zeros(128, "f4")
    frozen.flags.writeable = False
    with pytest.raises(MemoryFault, match="read-only"):
        run(cuda(ACCESS), "copy", 1, 32, [x, frozen, 1, 32])
    with pytest.raises(MemoryFault, match="shared access"):
        run(cuda(ACCESS), "banks", 1, 32, [y, 2], shared_bytes=128)
    with pytest.raises(MemoryFault):
        run(cuda(ACCESS), "copy", 1, 32, [None, y, 1, 32])
    run(cuda(ACCESS), "copy", 1, 128, [x, y, 1, 100])
    assert (y[:100] == 1).all() and not y[100:].any()


def strip_sectors(W, B, K):
    """Distinct 32-byte float32 sectors of each block of `dwconv_row` along a row, by brute force."""
    per_block = []
    for first in range(0, W, B):
        pixels = {c + k - K // 2 for c in range(first, min(first + B, W)) for k in range(K)}
        per_block.append(len({p // 8 for p in pixels if 0 <= p < W}))
    return per_block


@pytest.mark.parametrize(("W", "B"), [(128, 64), (96, 32), (72, 64)])
def test_traffic_counts_each_sector_once_for_each_block(W, B):
    """However often a block reads a sector; a neighbour's halo counts again; batches do not matter."""
    C, H, K = 2, 3, 23
    x, w, y = rand(C, H, W), rand(C, K), torch.empty(C, H, W)
    grid, expected = (H, C, triton.cdiv(W, B)), strip_sectors(W, B, K)
    for lanes in (1 << 15, 1):
        st = run_triton(
            dwconv_row, grid, x, w, y, H, W, K=K, B=B, num_warps=1, run_options={"batch_lanes": lanes}
        )
        assert st.traffic["x"] == (32 * C * H * sum(expected), 0)
        assert st.traffic["y"] == (0, 4 * C * H * W) == st.footprint["y"]
        assert st.footprint["x"] == (4 * C * H * W, 0) and st.blocks == len(expected) * C * H
        weights = sum(len({(c * K + k) // 8 for k in range(K)}) for c in range(C))
        assert st.traffic["w"] == (32 * weights * H * len(expected), 0)
    assert st.global_load_sector_bytes > 3 * st.traffic["x"][0]  # the taps that a block reads again
    assert st.as_dict()["traffic"] == st.traffic and "once per block" in st.report()


def test_some_blocks_of_a_grid():
    x, y, z = rand(1024), rand(1024, seed=1), torch.zeros(1024)
    st = run_triton(vadd, (4,), x, y, z, 1024, B=256, run_options={"blocks": [1, 3]})
    assert torch.equal(z.view(4, 256)[1::2], (x + y).view(4, 256)[1::2]) and not z.view(4, 256)[::2].any()
    assert st.blocks == 2 and st.traffic["z"] == (0, 2048) and st.global_load_bytes == 2 * 2048
    with pytest.raises(PTXError, match="grid of 4"):
        run_triton(vadd, (4,), x, y, z, 1024, B=256, run_options={"blocks": [4]})


@needs_nvcc
def test_structs_that_hold_pointers(cuda):
    src = """
    struct Args { const float* x; int n; float* y; };
    extern "C" __global__ void twice(const Args a) { if (threadIdx.x < a.n) a.y[threadIdx.x] = 2 * a.x[threadIdx.x]; }"""
    x, y = np.arange(20, dtype="f4"), np.zeros(20, "f4")
    raw = bytes(8) + (20).to_bytes(8, "little") + bytes(8)
    st = run(cuda(src), "twice", 1, 32, [ptxrun.Struct(raw, {0: x, 16: y})])
    np.testing.assert_array_equal(y, 2 * x)
    assert st.footprint["argument 0+0"] == (80, 0) and st.footprint["argument 0+16"] == (0, 80)
    with pytest.raises(MemoryFault, match=r"argument 0\+0"):
        run(cuda(src), "twice", 1, 32, [ptxrun.Struct(raw, {0: x[:8], 16: y})])


@needs_nvcc
@pytest.mark.parametrize("lanes", [1 << 15, 1])
def test_traffic_of_atomics_copies_and_uniform_loads(cuda, lanes):
    """A load of one address by all, atomics, and cp.async count as well; a block that does not read is not charged."""
    src = """
    extern "C" __global__ void mixed(const float* x, const float* one, float* total, const float4* data, float4* y) {
      __shared__ float4 tile[32];
      if (blockIdx.x % 2 == 0) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(
            &tile[threadIdx.x])), "l"(data + blockIdx.x * 32 + threadIdx.x));
        asm volatile("cp.async.wait_all;");
        y[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];
        atomicAdd(total + (threadIdx.x & 15), x[threadIdx.x] * one[0]);
      }
    }"""
    x, one, total = np.ones(32, "f4"), np.ones(1, "f4"), np.zeros(16, "f4")
    data, y = np.ones((6, 32, 4), "f4"), np.zeros((6, 32, 4), "f4")
    st = run(cuda(src), "mixed", 6, 32, [x, one, total, data, y], batch_lanes=lanes)
    t = [st.traffic[f"argument {i}"] for i in range(5)]
    assert t == [(3 * 128, 0), (3 * 32, 0), (3 * 64, 3 * 64), (3 * 512, 0), (0, 3 * 512)]
    assert (total == 6).all() and (y[::2] == 1).all()


@needs_nvcc
def test_uncoalesced_access_shows_in_the_stats(cuda):
    x, y = np.arange(32 * 1024, dtype="f4"), np.zeros(1024, "f4")
    for stride, efficiency in ((1, 1.0), (2, 0.5), (8, 0.125), (32, 0.125)):
        st = run(cuda(ACCESS), "copy", 4, 256, [x, y, stride, 1024])
        np.testing.assert_array_equal(y, x[::stride][:1024])
        assert st.load_efficiency == efficiency and st.store_efficiency == 1.0
        assert st.global_load_sector_bytes == 4096 / efficiency and st.global_load_bytes == 4096
    st = run(cuda(ACCESS), "copy", 4, 256, [x, y, 0, 1024])  # broadcast
    assert st.global_load_unique_bytes == 32 * 4 and st.global_load_sector_bytes == 32 * 32
    m = x[:1024].reshape(32, 32)
    st = run(cuda(ACCESS), "transposed", 1, (32, 32), [m, y])
    np.testing.assert_array_equal(y.reshape(32, 32), m.T)
    assert st.load_efficiency == 1.0 and st.store_efficiency == 0.125
    assert "efficiency 12%" in st.report() and st.hot(1)[0].text.startswith("st.global")


@needs_nvcc
def test_bank_conflicts(cuda):
    for stride, ways in ((1, 1), (2, 2), (8, 8), (32, 32), (33, 1), (3, 1)):
        st = run(cuda(ACCESS), "banks", 1, 64, [np.zeros(64, "f4"), stride], shared_bytes=64 * 4 * stride)
        assert (
            st.shared_accesses == 4
            and st.shared_wavefronts == 4 * ways
            and st.bank_conflicts == 4 * (ways - 1)
        )
    for stride, ways in ((1, 1), (2, 2), (8, 8)):
        y = np.zeros((32, 4), "f4")
        st = run(cuda(ACCESS), "banks4", 1, 32, [y, stride], shared_bytes=512 * stride)
        assert (y[:, 3] == np.arange(32)).all() and st.shared_wavefronts == 2 * 4 * ways


@needs_nvcc
def test_deadlock_endless_loop_and_bad_launches(cuda):
    with pytest.raises(PTXError, match="deadlock"):
        run(cuda(ACCESS), "stuck", 1, 64, [np.zeros(4, "f4")])
    with pytest.raises(PTXError, match="endless"):
        run(cuda(ACCESS), "forever", 1, 32, [np.zeros(4, "f4")], max_steps=10000)
    with pytest.raises(PTXError, match="name one of the kernels"):
        run(cuda(ACCESS), None, 1, 32, [])
    with pytest.raises(PTXError, match="takes 4 arguments"):
        run(cuda(ACCESS), "copy", 1, 32, [])
    with pytest.raises(PTXError, match="compiled for blocks"):
        ck, passed, _ = ptxrun.compile_triton(vadd, (rand(16), rand(16), rand(16), 16), {"B": 16})
        run(ck.asm["ptx"], None, 1, 64, [None] * 4, pad_args=True)


HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 y, .param .f32 z)\n{\n"


@pytest.mark.parametrize(
    "meet",
    [
        "shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;",
        "bar.sync 0; shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;",
        "bar.warp.sync -1; shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;",
    ],
)
def test_threads_meet_after_an_out_of_line_branch(meet):
    """The detour lies behind the meeting point, so the lowest-program-counter order alone would not reconverge."""
    ptx = (
        HEAD
        + """.reg .pred %p<3>; .reg .b32 %r<8>; .reg .b64 %rd<4>;
      mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 1; mov.u32 %r3, %r1; setp.eq.s32 %p1, %r2, 1; setp.gt.u32 %p2, %r1, 63;
      @%p2 bra BACK; @%p1 bra DETOUR;
    BACK: """
        + meet
        + """
      ld.param.u64 %rd1, [y]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.u32 [%rd3], %r4; ret;
    DETOUR: add.s32 %r3, %r3, 1000; bra.uni BACK;
    }"""
    )
    y, t = np.zeros(96, "u4"), np.arange(96)
    st = run(ptx, None, 1, 96, [y, 0])
    np.testing.assert_array_equal(y, (t ^ 1) + np.where(((t ^ 1) & 1) & (t < 64), 1000, 0))
    assert st.warp_instructions["branch"] > 0 and st.lane_efficiency < 1


def test_parameters_through_a_register_where_lanes_are_away():
    """The address stands in a register of the lanes that are there alone."""
    ptx = (
        HEAD
        + """.reg .pred %p1; .reg .f32 %f1; .reg .b32 %r1; .reg .b64 %rd<6>;
      mov.u32 %r1, %tid.x; setp.gt.u32 %p1, %r1, 2; @%p1 bra END;
      mov.b64 %rd5, z; ld.param.f32 %f1, [%rd5+0]; ld.param.u64 %rd1, [y];
      mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.f32 [%rd3], %f1;
    END: ret; }"""
    )
    y = np.zeros(32, "f4")
    run(ptx, "k", 1, 32, [y, 3])
    assert y.tolist() == [3] * 3 + [0] * 29


def test_float_parameters_and_brace_scopes():
    ptx = (
        HEAD
        + """.reg .f32 %f<3>; .reg .b64 %rd1; .reg .b32 t;
      ld.param.u64 %rd1, [y]; ld.param.f32 %f1, [z]; mov.b32 t, 0f40000000;
      { .reg .f32 t; mov.f32 t, 0f3F800000; add.f32 %f1, %f1, t; }
      { .reg .pred p; setp.gt.f32 p, %f1, 0f00000000; @!p bra skip; mul.f32 %f1, %f1, t; skip: }
      st.global.f32 [%rd1+4], %f1; ret; }"""
    )
    y = np.zeros(2, "f4")
    run(ptx, "k", 1, 1, [y, 3])
    assert y.tolist() == [0, 8]
    with pytest.raises(TypeError, match="list"):
        run(ptx, "k", 1, 1, [y, [3]])


@pytest.mark.parametrize(
    "name,f,err",
    [
        ("ex2.approx", np.exp2, 2**-22),
        ("rcp.approx", np.reciprocal, 2**-23),
        ("rsqrt.approx", lambda x: x**-0.5, 2**-22.9),
        ("tanh.approx", np.tanh, 2**-11),
    ],
)
def test_worst_case_approximations(name, f, err):
    ptx = (
        HEAD
        + """.reg .f32 %f<3>; .reg .b32 %r1; .reg .b64 %rd<4>; ld.param.u64 %rd1, [y]; mov.u32 %r1, %tid.x;
      mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; ld.global.f32 %f1, [%rd3]; """
        + name
        + ".f32 %f2, %f1; st.global.f32 [%rd3], %f2; ret; }"
    )
    x = np.random.default_rng(0).uniform(0.1, 4, 256).astype("f4")
    for approx, lo, hi in (("exact", 0, 2**-24), ("worst", err / 2, err + 2**-24)):
        y = x.copy()
        run(ptx, None, 1, 256, [y, 0], approx=approx)
        rel = np.abs(y / f(x.astype("f8")) - 1)
        assert lo <= rel.max() <= hi * 1.0001 and (approx == "exact" or rel.min() >= err - 2**-23)


def test_conflicting_global_stores_are_a_race():
    ptx = (
        HEAD
        + """.reg .b32 %r<3>; .reg .b64 %rd1; ld.param.u64 %rd1, [y]; mov.u32 %r1, %SOURCE; st.global.u32 [%rd1], %r1; ret; }"""
    )
    shared = ptx.replace("st.global.u32 [%rd1]", "st.shared.u32 [s]").replace(
        ".reg .b32", ".shared .u32 s; .reg .b32"
    )
    with pytest.raises(RaceError, match="write to byte 0"):
        run(shared.replace("SOURCE", "tid.x"), None, 1, 33, [np.zeros(1, "u4"), 0])
    run(
        shared.replace("SOURCE", "tid.x"), None, 1, 32, [np.zeros(1, "u4"), 0]
    )  # within a warp one of them wins
    for source, grid, block in (("tid.x", 1, 2), ("ctaid.x", 2, 1)):
        for lanes in (1, 1024):
            with pytest.raises(RaceError, match="store different values"):
                run(
                    ptx.replace("SOURCE", source),
                    None,
                    grid,
                    block,
                    [np.zeros(1, "u4"), 0],
                    batch_lanes=lanes,
                )
    run(ptx.replace("SOURCE", "ntid.x"), None, 2, 2, [np.zeros(1, "u4"), 0])


@pytest.mark.parametrize(
    "k,a_type,acc",
    [
        (8, "f16", "f32"),
        (16, "f16", "f16"),
        (16, "bf16", "f32"),
        (4, "tf32", "f32"),
        (8, "tf32", "f32"),
        (8, "bf16", "f32"),
        (32, "s8", "s32"),
        (16, "u8", "s32"),
    ],
)
def test_mma_fragments(k, a_type, acc):
    """Fragments loaded by the formulas of the PTX manual, one matrix product per warp."""
    wide = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}[a_type]
    na, nb, nd = 16 * k // 32 // wide, 8 * k // 32 // wide, 2 if acc == "f16" else 4
    rng = np.random.default_rng(0)
    lo, hi = {"s8": (-128, 128), "u8": (0, 256)}.get(a_type, (-8, 8))
    A, B = rng.integers(lo, hi, (16, k)), rng.integers(lo, hi, (k, 8))
    C = rng.integers(-9, 9, (16, 8))
    to = {
        "f16": lambda v: v.astype("f2").view("u2"),
        "bf16": lambda v: f32_to_bf16(v.astype("f4")),
        "tf32": lambda v: v.astype("f4").view("u4"),
        "s8": lambda v: v.astype("i1").view("u1"),
        "u8": lambda v: v.astype("u1"),
        "f32": lambda v: v.astype("f4").view("u4"),
        "s32": lambda v: v.astype("i4").view("u4"),
    }
    lane = np.arange(32)
    g, q = lane // 4, lane % 4
    fa = np.stack(
        [
            to[a_type](A[g + 8 * (r % 2), q * wide + e + 4 * wide * (r // 2)])
            for r in range(na)
            for e in range(wide)
        ],
        1,
    )
    fb = np.stack([to[a_type](B[q * wide + e + 4 * wide * r, g]) for r in range(nb) for e in range(wide)], 1)
    fc = np.stack([to[acc](C[g + 8 * (e // 2), 2 * q + e % 2]) for e in range(4)], 1)
    frag = np.concatenate([np.ascontiguousarray(x).view("u4").reshape(32, -1) for x in (fa, fb, fc)], 1)
    n = na + nb + nd
    regs = [f"%r{10 + i}" for i in range(n)]
    loads = "".join(f"ld.global.b32 {r}, [%rd3+{4 * i}]; " for i, r in enumerate(regs))
    d, stores = (
        [f"%r{40 + i}" for i in range(nd)],
        "".join(f"st.global.b32 [%rd3+{4 * i}], %r{40 + i}; " for i in range(nd)),
    )
    vec = lambda v: "{" + ", ".join(v) + "}"
    ptx = (
        HEAD
        + f""".reg .b32 %r<50>; .reg .b64 %rd<4>; mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [y]; mul.wide.u32 %rd2, %r1, {4 * n};
      add.s64 %rd3, %rd1, %rd2; {loads}
      mma.sync.aligned.m16n8k{k}.row.col.{acc}.{a_type}.{a_type}.{acc} {vec(d)}, {vec(regs[:na])}, {vec(regs[na : na + nb])}, {vec(regs[na + nb :])};
      {stores} ret; }}"""
    )
    run(ptx, None, 1, 32, [frag, 0])
    out = np.ascontiguousarray(frag[:, :nd]).view({"f16": "f2", "f32": "f4", "s32": "i4"}[acc])
    D = np.zeros((16, 8))
    for e in range(4):
        D[g + 8 * (e // 2), 2 * q + e % 2] = out[:, e]
    np.testing.assert_array_equal(D, A @ B + C)


def test_unsupported_instructions_are_named():
    with pytest.raises(Unsupported, match="all that is missing: wgmma.fence.sync.aligned, tcgen05.alloc"):
        run(HEAD + "wgmma.fence.sync.aligned; tcgen05.alloc; ret; }", None, 1, 32, [None, 0])
    for text in (
        "wgmma.fence.sync.aligned;",
        "tex.1d.v4.f32.s32 {%r1, %r1, %r1, %r1}, [t, {%r1}];",
        "add.f32.bogus %r1, %r2, %r3;",
    ):
        with pytest.raises(
            Unsupported,
            match=f"{text.split('.')[0]}.*PTX line 7|unsupported instruction {text.split('.')[0]}",
        ):
            run(HEAD + ".reg .b32 %r<4>;\n" + text + "\nret;\n}\n", None, 1, 32, [None, 0])


# --------------------------------------------------------------------------- one source, compiled for host and device

DIFFERENTIAL = r"""
#include <stdint.h>
#include <math.h>
#include <string.h>
#ifndef __CUDACC__
#define __host__
#define __device__
#endif
#define N_OUT 49
__host__ __device__ inline uint32_t bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
__host__ __device__ inline float real(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
__host__ __device__ inline int collatz(uint32_t n) { int s = 0; n = n % 1000 + 1; while (n != 1) { n = n & 1 ? 3 * n + 1 : n / 2; if (++s > 200) break; } return s; }
__host__ __device__ inline void f(const uint32_t* in, uint32_t* o) {
  uint32_t a = in[0], b = in[1], c = in[2], s = c & 31; int32_t x = a, y = b, z = c;
  uint64_t A = (uint64_t)a << 32 | b, B = (uint64_t)b << 32 | c; int64_t X = A, Y = B; unsigned __int128 Q = (unsigned __int128)A * B + A;
  float fa = (float)x * 1e-5f, fb = (float)y * 3e-4f, fc = (float)(z >> 8); double da = x * 1e-3, db = y * 7e-2;
  int k = 0;
  o[k++] = a + b * c; o[k++] = a / (b | 1); o[k++] = a % (b | 1); o[k++] = x / (y | 1); o[k++] = x % (y | 1);
  o[k++] = a << s; o[k++] = a >> s; o[k++] = x >> s; o[k++] = ((uint64_t)a * b) >> 32; o[k++] = ((int64_t)x * y) >> 32;
  o[k++] = (A * B) >> 32; o[k++] = (uint64_t)(Q >> 64) ^ (uint64_t)((Q - B) >> 70) ^ (uint64_t)(((__int128)X * Y) >> 90); o[k++] = (X / (Y | 1)); o[k++] = A % (B | 1); o[k++] = X >> (c & 63); o[k++] = A << (c & 63);
  o[k++] = (a & b) | (~a & c); o[k++] = a ^ b ^ c; o[k++] = (a >> (s & 15)) & 0xff; o[k++] = (int)(x << 7) >> 19;
  o[k++] = x < y ? x : y; o[k++] = a > b ? a : b; o[k++] = x < 0 ? -x : x; o[k++] = (int8_t)a + (int16_t)b + (uint8_t)c;
  o[k++] = (a >> 24) | ((a >> 8) & 0xff00) | ((a << 8) & 0xff0000) | (a << 24);
  o[k++] = (a << s) | (a >> ((32 - s) & 31)); o[k++] = x / 7 + a / 10 + x % 13; o[k++] = collatz(a);
  o[k++] = bits(fa + fb); o[k++] = bits(fa * fb); o[k++] = bits(fmaf(fa, fb, fc)); o[k++] = bits(fa / fb);
  o[k++] = bits(sqrtf(fabsf(fa))); o[k++] = bits(fminf(fa, fb)) ^ bits(fmaxf(fa, fc)); o[k++] = bits((float)a) + bits((float)x);
  o[k++] = (int)fa; o[k++] = (int)rintf(fa) + (int)floorf(fb) + (int)ceilf(fa) + (int)truncf(fb); o[k++] = (uint32_t)fabsf(fb);
  o[k++] = bits((float)(da * db + 1.5)); o[k++] = bits((float)(da / db)); o[k++] = (int64_t)(da * 1e6); o[k++] = (fa < fb) + 2 * (fa >= fc) + 4 * (fa != fb);
  o[k++] = bits(copysignf(fa, fb)); o[k++] = bits((float)A) ^ bits((float)X); o[k++] = (uint32_t)(da > db) + isnan(fa / (fb - fb));
  switch (c % 9) { case 0: o[k] = a; break; case 1: o[k] = b + 1; break; case 2: o[k] = a * b; break; case 3: o[k] = a - b; break;
    case 4: o[k] = a | b; break; case 5: o[k] = 5; break; case 6: o[k] = a & b; break; case 7: o[k] = ~a; break; default: o[k] = 77; }
  k++;
  int t[8]; for (int i = 0; i < 8; i++) t[i] = (a >> (4 * i)) & 15; for (int i = 0; i < 8; i++) t[t[i] & 7] += i; uint32_t h = 0;
  for (int i = 0; i < 8; i++) h = h * 31 + t[(i + c) & 7]; o[k++] = h;
  uint32_t acc = 0; for (uint32_t i = 0; i < (b & 15); i++) { if (i & 1 && a & 2) continue; if ((i ^ a) % 5 == 3) break; for (uint32_t j = 0; j < i; j++) acc += a >> (j & 31); } o[k++] = acc;
  o[k++] = k;
}
#ifdef __CUDACC__
extern "C" __global__ void differential(const uint32_t* in, uint32_t* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) f(in + 3 * i, out + N_OUT * i);
}
#else
extern "C" void differential(const uint32_t* in, uint32_t* out, int n) { for (int i = 0; i < n; i++) f(in + 3 * i, out + N_OUT * i); }
#endif
"""


@needs_nvcc
@pytest.mark.parametrize("flags", [(), ("--dopt=on", "-lineinfo")])
def test_same_source_on_the_host(cuda, tmp_path: Path, flags):
    """Integer, 64-bit, float and control-flow code gives the host compiler's results bit for bit."""
    src, lib = tmp_path / "d.cpp", tmp_path / "d.so"
    src.write_text(DIFFERENTIAL)
    subprocess.run(
        ["g++", "-O1", "-ffp-contract=off", "-fwrapv", "-mfma", "-shared", "-fPIC", str(src), "-o", str(lib)],
        check=True,
    )
    n = 3000
    a = np.random.default_rng(0).integers(0, 2**32, (n, 3), dtype="u4")
    a[:200] >>= np.random.default_rng(1).integers(0, 32, (200, 3), dtype="u4")
    want, got = np.zeros((n, 49), "u4"), np.zeros((n, 49), "u4")
    ptr = lambda v: v.ctypes.data_as(ctypes.c_void_p)
    ctypes.CDLL(str(lib)).differential(ptr(a), ptr(want), n)
    run(cuda(DIFFERENTIAL, "-fmad=false", *flags), None, -(-n // 96), 96, [a, got, n])
    bad = np.flatnonzero((got != want).any(0))
    assert not bad.size, {
        int(b): (got[got[:, b] != want[:, b], b][:3], want[got[:, b] != want[:, b], b][:3]) for b in bad
    }


HALVES = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void halves(const __half2* a, const __half2* b, __half2* c, const __nv_bfloat162* d, const __nv_bfloat162* e, __nv_bfloat162* f, int n) {
  int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i >= n) return;
  c[i] = __hfma2(a[i], b[i], a[i]); c[n + i] = __hadd2(a[i], b[i]); c[2 * n + i] = __hmul2(a[i], b[i]); c[3 * n + i] = __hmax2(a[i], b[i]);
  f[i] = __hfma2(d[i], e[i], d[i]); f[n + i] = __hadd2(d[i], e[i]); f[2 * n + i] = __hmul2(d[i], e[i]); f[3 * n + i] = __hmax2(d[i], e[i]);
  float2 p = __bfloat1622float2(d[i]); f[4 * n + i] = __floats2bfloat162_rn(p.x * 1.1f, p.y + 0.3f);
  float2 q = __half22float2(a[i]); c[4 * n + i] = __floats2half2_rn(q.x * 1.1f, __half2float(__low2half(b[i])) + q.y);
}"""


@needs_nvcc
def test_packed_half_and_bfloat16(cuda):
    n = 2000
    a, b = rand(n, 2).half(), rand(n, 2, seed=1).half()
    d, e = rand(n, 2, seed=2).bfloat16(), rand(n, 2, seed=3).bfloat16()
    c, f = np.zeros((5, n, 2), "f2"), np.zeros((5, n, 2), "u2")
    u = lambda t: t.view(torch.int16).numpy().view("u2")
    run(cuda(HALVES), None, -(-n // 128), 128, [a.numpy(), b.numpy(), c, u(d), u(e), f, n])
    for got, (x, y), ty in (
        (torch.from_numpy(c), (a, b), torch.float16),
        (torch.from_numpy(f.view("i2")).view(torch.bfloat16), (d, e), torch.bfloat16),
    ):
        X, Y = x.double(), y.double()
        for k, want in enumerate((X * Y + X, X + Y, X * Y, torch.maximum(X, Y))):
            assert torch.equal(got[k], want.to(ty)), (ty, k)
    p = d.float()
    assert torch.equal(
        torch.from_numpy(f.view("i2"))[4].view(torch.bfloat16),
        torch.stack([p[:, 0] * 1.1, p[:, 1] + 0.3], 1).bfloat16(),
    )


def test_bfloat16_rounding():
    x = torch.cat(
        [rand(1000), torch.tensor([0.0, -0.0, float("inf"), 3e38, 3.4e38, 1e-40, 1.00390625, 1.01171875])]
    )
    assert np.array_equal(f32_to_bf16(x.numpy()), x.bfloat16().view(torch.int16).numpy().view("u2"))
    y = x.bfloat16()
    assert np.array_equal(bf16_to_f32(y.view(torch.int16).numpy().view("u2")), y.float().numpy())
    tie = np.array([1 + 2.0**-8 + 2.0**-40])  # above the tie: rounds up only without double rounding
    assert f32_to_bf16(tie)[0] == 0x3F81 and f32_to_bf16(tie.astype("f4"))[0] == 0x3F80
