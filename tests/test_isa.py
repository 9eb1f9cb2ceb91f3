"""Every op's values on each instruction set of the CPU kernels, not only on the best one of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdan_fast import backends

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(backends.BACKENDS["cpu"].missing is not None, reason="needs the cpu kernels")


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    """A child process whose kernels use no more than `isa`; it is chosen once, when the module is loaded."""
    environment = {**os.environ, "SDAN_FAST_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )


def available() -> list[str]:
    from sdan_fast import _C_cpu

    order = ["portable", "avx2", "avx512"]
    return [isa for isa in order if isa in _C_cpu.isas() and order.index(isa) <= order.index(_C_cpu.isa())]


@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512"))
def test_the_environment_caps_the_instruction_set(isa: str) -> None:
    if isa not in available():
        pytest.skip(f"this processor, or this build, has no {isa}")
    done = run(isa, "-c", "from sdan_fast import _C_cpu; print(_C_cpu.isa())")
    assert done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512"))
def test_values(isa: str) -> None:
    from sdan_fast import _C_cpu

    # A set that is named leaves out the products of bfloat16 pairs.
    pairs = isa == "avx512" and _C_cpu.bf16_pairs()
    if isa not in available() or (isa == available()[-1] and not pairs):
        pytest.skip(f"{isa} is not there, or is what all other tests use")
    done = run(
        isa,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/ops",
        "-k",
        "matches_float64 and (cpu or test_sdan)" + (" and bfloat16" if pairs else ""),
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= (8 if pairs else 24), (
        done.stdout[-4000:] + done.stderr[-1000:]
    )
