"""How many blocks of a kernel fit on an SM, and so what share of its warp slots they fill."""

from __future__ import annotations

from dataclasses import dataclass

from .devices import Architecture


@dataclass(frozen=True)
class Occupancy:
    """blocks: resident blocks of an SM. share: resident warps over the warp slots. limit: what binds first."""

    blocks: int
    share: float
    limit: str


def round_up(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least n."""
    return -(-n // unit) * unit


def occupancy(arch: Architecture, threads: int, registers: int, shared: int) -> Occupancy:
    """Theoretical occupancy of blocks of `threads` threads, `registers` each, and `shared` bytes (static and dynamic).

    Registers are handed out to warps in units of 256 within each of the SM's four partitions; shared memory to blocks,
    with the kilobyte that the driver reserves from sm_80 on. A kernel that cannot be launched has 0 blocks.
    """
    warps = -(-threads // 32)
    limits = {"warps": arch.warps // warps, "blocks": arch.blocks}
    if registers > arch.registers_thread or threads > 1024 or warps == 0:
        return Occupancy(0, 0.0, "registers" if registers > arch.registers_thread else "threads")
    if registers:
        per_warp = round_up(registers * 32, arch.register_unit)
        resident = arch.registers // arch.partitions // per_warp * arch.partitions
        limits["registers"] = resident // warps
        if round_up(warps, arch.partitions) * per_warp > arch.registers_block:
            limits["registers"] = 0
    if shared > arch.shared_block:
        limits["shared memory"] = 0
    elif shared or arch.shared_reserved:
        limits["shared memory"] = arch.shared_sm // round_up(shared + arch.shared_reserved, arch.shared_unit)
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps / arch.warps, limit)
