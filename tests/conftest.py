"""Every test runs with NaN in freshly allocated memory, a fixed seed, and two threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, from Python and from C++, so no unwritten output passes."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.isnan(torch.empty(64)).all(), "memory is not poisoned"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def threads() -> None:
    """Two threads unless OMP_NUM_THREADS says otherwise: one would hide races, and many drown such small calls."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2)
