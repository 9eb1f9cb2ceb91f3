"""The occupancy calculator against values worked out by hand from the published limits."""

from __future__ import annotations

import pytest

from sdan_fast.inspecting.devices import ARCHITECTURES, GPUS
from sdan_fast.inspecting.occupancy import occupancy

KIB = 1024


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "blocks", "limit"),
    [
        # 256 threads are 8 warps of 32 x 32 = 1024 registers: 64 warps fit, and that is all an SM has.
        (80, 256, 32, 0, 8, "warps"),
        # 33 registers round up to 5 units of 256: 1280 a warp, 12 warps a partition, 48 an SM, 6 blocks of 8.
        (80, 256, 33, 0, 6, "registers"),
        # 255 registers: 8192 a warp, 2 warps a partition, 8 an SM, one block of 8.
        (90, 256, 255, 0, 1, "registers"),
        # 128 registers: 4096 a warp, 4 a partition, 16 an SM: 4 blocks of 4 warps.
        (90, 128, 128, 0, 4, "registers"),
        # One-warp blocks: an SM takes 32 of them, on sm_86 16, on sm_89 and sm_120 24.
        (80, 32, 16, 0, 32, "blocks"),
        (86, 32, 16, 0, 16, "blocks"),
        (89, 32, 16, 0, 24, "blocks"),
        (120, 32, 16, 0, 24, "blocks"),
        (75, 32, 16, 0, 16, "blocks"),
        # Shared memory: 48 KiB and the reserved one make 49; 164 / 49 = 3, 228 / 49 = 4, 100 / 49 = 2.
        (80, 128, 16, 48 * KIB, 3, "shared memory"),
        (90, 128, 16, 48 * KIB, 4, "shared memory"),
        (100, 128, 16, 48 * KIB, 4, "shared memory"),
        (86, 128, 16, 48 * KIB, 2, "shared memory"),
        # sm_75 reserves none: 64 / 32 = 2.
        (75, 128, 16, 32 * KIB, 2, "shared memory"),
        # Up to the limit of a block, and beyond it.
        (90, 1024, 32, 227 * KIB, 1, "shared memory"),
        (90, 1024, 32, 227 * KIB + 1, 0, "shared memory"),
        (120, 256, 32, 99 * KIB + 1, 0, "shared memory"),
        # 1024 threads of 65 registers: 9 units of 256 x 32 warps is more than the 65536 of a block.
        (90, 1024, 65, 0, 0, "registers"),
        (90, 1024, 64, 0, 1, "registers"),
        (90, 128, 256, 0, 0, "registers"),
        # Blocks of 48 threads are two warps; a third of sm_86's 48 slots at 16 blocks is 32 warps.
        (86, 48, 20, 0, 16, "blocks"),
    ],
)
def test_by_hand(capability, threads, registers, shared, blocks, limit):
    got = occupancy(ARCHITECTURES[capability], threads, registers, shared)
    assert (got.blocks, got.limit) == (blocks, limit)
    assert got.share == blocks * -(-threads // 32) / ARCHITECTURES[capability].warps


def test_a_partial_warp_counts_whole():
    assert occupancy(ARCHITECTURES[80], 33, 32, 0).blocks == occupancy(ARCHITECTURES[80], 64, 32, 0).blocks


def test_the_data_sheets_rates_follow_from_lanes_and_clock():
    """The stated TFLOP/s of the units are lanes x clock x SMs x 2 to their printed digits."""
    assert 2 * GPUS["A100"].fma == pytest.approx(19.5e12, rel=0.005)
    assert 2 * GPUS["H100"].fma == pytest.approx(67e12, rel=0.005)


def test_the_reserved_kilobyte_is_counted_once():
    """cuobjdump adds it to the static bytes from sm_90 on, the calculator from sm_80 on."""
    from sdan_fast.inspecting.cuda_table import static_shared

    assert static_shared({"shared": 1024 + 384}, 90) == static_shared({"shared": 384}, 80) == 384
    assert static_shared({"shared": 0}, 90) == 0
