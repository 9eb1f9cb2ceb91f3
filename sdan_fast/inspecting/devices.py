"""What NVIDIA publishes of its architectures (limits of an SM) and of two GPUs (rates, for the model of time)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor, from the CUDA programming guide's table of compute capabilities.

    shared_sm, shared_block: bytes of shared memory of an SM, and the most that a block may ask for. shared_reserved:
    what the driver takes of each block's share. shared_unit, register_unit: allocation granularities, in bytes for
    a block and in registers for a warp (those of NVIDIA's occupancy calculator).
    """

    capability: int
    warps: int
    blocks: int
    shared_sm: int
    shared_block: int
    shared_reserved: int = 1024
    shared_unit: int = 128
    registers: int = 65536
    register_unit: int = 256
    registers_thread: int = 255
    registers_block: int = 65536
    partitions: int = 4

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"


KIB = 1024
ARCHITECTURES = {
    a.capability: a
    for a in (
        Architecture(75, 32, 16, 64 * KIB, 64 * KIB, shared_reserved=0, shared_unit=256),
        Architecture(80, 64, 32, 164 * KIB, 163 * KIB),
        Architecture(86, 48, 16, 100 * KIB, 99 * KIB),
        Architecture(89, 48, 24, 100 * KIB, 99 * KIB),
        Architecture(90, 64, 32, 228 * KIB, 227 * KIB),
        Architecture(100, 64, 32, 228 * KIB, 227 * KIB),
        Architecture(120, 48, 24, 100 * KIB, 99 * KIB),
    )
}
AMD_SHARED_BLOCK = {"gfx942": 64 * KIB}  # LDS of a workgroup, from AMD's CDNA 3 ISA document


@dataclass(frozen=True)
class Gpu:
    """A GPU's public rates. Per clock and SM: warp instructions issued, and lanes of each unit.

    bandwidth: bytes per second of DRAM. tensor: dense 16-bit multiply-adds per second with float32 sums.
    round_trip: clocks from a load to its value where that lies in DRAM, as measured by pointer chasing (ROUND_TRIPS).
    """

    name: str
    source: str
    capability: int
    sms: int
    clock: float
    bandwidth: float
    tensor: float
    round_trip: int
    issue: int = 4
    fma_lanes: int = 64
    int_lanes: int = 64
    special_lanes: int = 16
    load_store_lanes: int = 32
    shared_bytes: int = 128

    @property
    def fma(self) -> float:
        """float32 multiply-adds per second."""
        return self.sms * self.clock * self.fma_lanes

    @property
    def latency(self) -> float:
        """Seconds of a round trip to DRAM."""
        return self.round_trip / self.clock


ROUND_TRIPS = "pointer chasing by others, github.com/markdewing/AI_kernels, latency/README.md"
GPUS = {
    "A100": Gpu(
        "A100 SXM4 80 GB",
        "NVIDIA A100 datasheet (2,039 GB/s, 312 TFLOP/s bfloat16 dense, 19.5 TFLOP/s float32) and GA100 whitepaper "
        "(108 SMs, 1.41 GHz boost, 64 float32 lanes an SM)",
        80,
        108,
        1.41e9,
        2.039e12,
        156e12,
        550,
    ),
    "H100": Gpu(
        "H100 SXM5 80 GB",
        "NVIDIA H100 datasheet (3.35 TB/s, 989 TFLOP/s bfloat16 dense, 67 TFLOP/s float32) and GH100 whitepaper "
        "(132 SMs, 128 float32 lanes an SM; 67 TFLOP/s means 1.98 GHz)",
        90,
        132,
        1.98e9,
        3.35e12,
        494.7e12,
        700,
        fma_lanes=128,
    ),
}
