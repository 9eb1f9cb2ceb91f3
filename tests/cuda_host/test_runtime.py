"""The host runtime itself: right kernels are right in every thread order, and planted faults are caught."""

from __future__ import annotations

import ctypes
import subprocess

import host_build
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(host_build.compiler() is None, reason="no C++ compiler")
ORDERS = [(0, 0), (1, 0), (2, 1), (2, 2)]
N = 96  # threads of a block


@pytest.fixture(scope="module")
def planted():
    lib = ctypes.CDLL(str(host_build.build_planted()))
    lib.sdan_planted_run.restype = ctypes.c_char_p

    def run(name: str, order: int = 0, seed: int = 0, x: np.ndarray | None = None) -> tuple[np.ndarray, str]:
        x = np.arange(1024, dtype=np.float32) if x is None else x
        y = np.full(1024, -1, np.float32)
        lib.sdan_cuda_host_set_order(order, ctypes.c_ulonglong(seed))
        error = lib.sdan_planted_run(
            name.encode(), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data)
        )
        return y, error.decode()

    run.lib = lib
    return run


@pytest.fixture(scope="module")
def sanitized():
    program = host_build.build_planted(sanitize=True)

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(program), name], capture_output=True, text=True, timeout=60)

    return run


def expected(name: str) -> np.ndarray:
    x = np.arange(1024, dtype=np.float32)
    if name == "reverse":
        return x[: 3 * N].reshape(3, N)[:, ::-1].ravel()
    if name == "shift_twice":
        return np.roll(x[:N], -2) + 1
    if name == "reverse_in_warp":
        return x[:32][::-1]
    if name == "copy_async":
        second = x[128:256].copy()
        second[-2:] = 0  # beyond the bytes that the last copy reads
        return np.concatenate([x[:128], second[::-1]])
    if name == "half_shuffle":
        lane = np.arange(32)
        return x[np.where(lane < 16, lane ^ 1, lane ^ 2)]
    assert name == "sums"
    t = np.arange(64)
    warp, lane8 = t // 32, t % 8
    want = x[:64].reshape(2, 32).sum(1)[warp] + 1000 * (32 * warp + 3)
    want = want + 1000 * (np.where(lane8 < 7, t + 1, t) - np.where(lane8 > 0, t - 1, t))
    return want + 0.5 * (warp == 1) + 0.25 + 2 / 8


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize(
    "name", ["reverse", "shift_twice", "reverse_in_warp", "copy_async", "half_shuffle", "sums"]
)
def test_right_kernels_are_right_in_any_order(planted, name, order, seed):
    y, error = planted(name, order, seed)
    want = expected(name)
    assert not error
    np.testing.assert_array_equal(y[: want.size], want)
    assert (y[want.size :] == -1).all()


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("reverse_without_barrier", "reverse"),
        ("shift_twice_without_second_barrier", "shift_twice"),
        ("reverse_in_warp_without_barrier", "reverse_in_warp"),
    ],
)
def test_missing_barrier_changes_the_answer(planted, name, right):
    want = expected(right)
    wrong = [not np.array_equal(planted(name, *order)[0][: want.size], want) for order in ORDERS]
    assert any(wrong)
    assert all(wrong[2:])  # a shuffled order catches each of them


def test_early_read_of_an_async_copy_is_nan(planted):
    y, error = planted("copy_async_without_wait")
    assert not error
    assert np.isnan(y[:128]).all()
    np.testing.assert_array_equal(y[128:256], expected("copy_async")[128:])


def test_unwritten_shared_memory_is_nan_in_every_launch(planted):
    planted("reverse")
    y, error = planted("reads_unwritten_shared")
    assert not error
    assert np.isnan(y[:N:2]).all() and (y[1:N:2] == np.arange(1, N, 2)).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("never_waits", "a cp.async is never waited for in block (0, 0, 0), thread (0, 0, 0)"),
        ("leaves_before_barrier", "95 threads wait at __syncthreads, 0 at a warp barrier, 1 have left"),
        ("misaligned", "misaligned access"),
        ("writes_outside_shared", "a write outside dynamic shared memory"),
        ("block_too_large", "more than 1024 threads"),
        ("grid_too_tall", "65535"),
        ("too_much_shared", "227 KiB"),
    ],
)
def test_faults_are_reported(planted, name, message):
    _, error = planted(name)
    assert message in error and error.startswith(f"{name}: ")
    assert not planted("reverse")[1]  # the runtime survives a failed launch


@pytest.mark.parametrize("name", ["reverse", "shift_twice", "copy_async"])
def test_sanitizers_pass_right_kernels(sanitized, name):
    done = sanitized(name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reads_outside", "heap-buffer-overflow"),
        ("reads_outside_shared", "use-after-poison"),
        ("writes_outside_shared", "use-after-poison"),
        ("overflows", "signed integer overflow"),
    ],
)
def test_sanitizers_catch(sanitized, name, message):
    done = sanitized(name)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("half", [False, True])
def test_16_bit_conversions(planted, half):
    """All 65536 values, the points halfway between them and their neighbours, against NumPy and torch."""
    torch = pytest.importorskip("torch")
    dtype = torch.float16 if half else torch.bfloat16
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()].sort().values
    middles = (finite[1:].double() + finite[:-1].double()) / 2
    x = torch.cat(
        [values, middles.float(), *(middles.float().nextafter(torch.tensor(s)) for s in (-1e38, 1e38))]
    )
    x = torch.cat([x, torch.tensor([65519.0, 65520.0, 3.3961e38, 3.4e38, 1e-45, -1e-45])]).numpy()
    y, back = np.zeros(x.size, np.uint16), np.zeros(x.size, np.float32)
    at = [ctypes.c_void_p(a.ctypes.data) for a in (x, y, back)]
    planted.lib.sdan_planted_convert(int(half), *at, x.size)
    want = torch.from_numpy(x).to(dtype)
    nan = want.isnan().numpy()
    np.testing.assert_array_equal(y[~nan], want.view(torch.int16).numpy().view(np.uint16)[~nan])
    np.testing.assert_array_equal(back[~nan], want.float().numpy()[~nan])
    assert np.isnan(back[nan]).all()
