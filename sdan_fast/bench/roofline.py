"""What this machine can do at best, measured now, and an interleaved timer to hold functions against it."""

from __future__ import annotations

import ctypes
import importlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

LEAST_ROUNDS = 3  # fewer have no median to speak of


@dataclass(frozen=True)
class Roofline:
    """A device's measured limits.

    Attributes:
        clone_bandwidth: bytes per second of `torch.clone` on tensors beyond the caches, read and write.
        gemm_rate: floating-point operations per second (two for a multiply-add) of a large square `torch.mm`.
        fma_rate: the same of float32 multiply-adds on registers; 0 where it was not measured.
    """

    clone_bandwidth: float
    gemm_rate: float
    fma_rate: float = 0.0

    @property
    def arithmetic_rate(self) -> float:
        """The faster of the two rates: what bounds a kernel."""
        return max(self.gemm_rate, self.fma_rate)

    def floor(self, multiply_adds: int, bytes_moved: int) -> float:
        """Seconds that no implementation beats here: the larger of arithmetic over rate and bytes over bandwidth."""
        return max(2 * multiply_adds / self.arithmetic_rate, bytes_moved / self.clone_bandwidth)


@dataclass
class Timing:
    """The times of one function, in seconds, one for each round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what it was given; on a CPU there is nothing to wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, from idle device to idle device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    budget: float = math.inf,
    device: torch.device | str = "cpu",
    on_call: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Time functions side by side, A B C A B C ..., so that a busy spell of the machine hits all of them.

    Args:
        functions: what to call, by name.
        rounds: timed calls of each.
        warmup: calls of each before, not timed.
        budget: seconds after which no further round begins, once there are `LEAST_ROUNDS` or `rounds` of them.
        device: what to wait for after each call.
        on_call: told the name after each call, for a progress bar; its time is not counted.

    Raises:
        ValueError: if `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, and it is {rounds}")
    timings = {name: Timing() for name in functions}
    start = time.perf_counter()
    for turn in range(-warmup, rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        for name, function in functions.items():
            seconds = timed(function, device)
            if turn >= 0:
                timings[name].seconds.append(seconds)
            on_call(name)
    return timings


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, so that no timing has the system's part of new memory in it.

    By default glibc returns a freed tensor of some megabytes to the system at once, or does not, as the heap happens to
    lie. Where it does, the next call's output is new pages, each cleared and mapped at its first touch, which takes
    longer than most kernels here: of functions timed in turn some would pay for it, always, and others never. Memory
    is new once all the same: large tensors allocated and freed after this (`clone_bandwidth`), provide it.

    Returns:
        Whether the C library could be told so: glibc can (`mallopt`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # as <malloc.h> numbers them
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def clone_bandwidth(device: torch.device | str = "cpu", *, megabytes: int = 256, rounds: int = 7) -> float:
    """Bytes per second of `torch.clone` (read plus write) on a tensor of this size, the best of `rounds`."""
    x = torch.ones(megabytes * 2**18, device=device)
    x.clone()  # the first call pays for the pages
    best = min(timed(x.clone, device) for _ in range(rounds))
    return 2 * x.numel() * x.element_size() / best


def gemm_rate(
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    size: int = 1024,
    rounds: int = 15,
) -> float:
    """Floating-point operations per second of a square `torch.mm`, the best of `rounds`; TF32 stays as torch has it."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    b = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    multiply()
    return 2 * size**3 / min(timed(multiply, device) for _ in range(rounds))


def fma_rate(*, rounds: int = 15, loops: int = 200_000) -> float:
    """Floating-point operations per second of float32 multiply-adds on registers, on all of torch's threads.

    The CPU kernels' own instruction set, the best of `rounds`; 0 where the kernels were not built.
    """
    try:
        loop = importlib.import_module("sdan_fast._C_cpu").fma_loop
    except (ImportError, AttributeError):
        return 0.0
    workers = torch.get_num_threads()

    def once() -> float:
        ready = threading.Barrier(workers + 1)
        done: list[float] = []

        def work() -> None:
            ready.wait()
            done.append(loop(loops))

        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        ready.wait()
        for thread in threads:
            thread.join()
        return sum(done) / (time.perf_counter() - start)

    once()
    return max(once() for _ in range(rounds))


def measure(device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32) -> Roofline:
    """The limits of a device, measured now: about a second on a CPU. From then on the process keeps freed memory."""
    large = torch.device(device).type != "cpu"
    keep_freed_memory()
    return Roofline(
        clone_bandwidth=clone_bandwidth(device, megabytes=1024 if large else 256),
        gemm_rate=gemm_rate(device, dtype=dtype, size=8192 if large else 1024),
        fma_rate=0.0 if large else fma_rate(),
    )


def multiply_adds(function: Callable[[], object]) -> int:
    """Multiply-adds of one call as `FlopCounterMode` counts them (it counts two operations for each)."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of the elements of tensors."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
