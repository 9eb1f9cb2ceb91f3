"""Every op's host-run CUDA kernels once under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import host_build
import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow  # a minute of compiling
def test_kernels_are_clean():
    cxx = host_build.compiler()
    # libstdc++ as well: AddressSanitizer looks for its __cxa_throw when the process starts.
    preload = []
    for name in ("libasan.so", "libstdc++.so.6"):
        asked = [cxx, f"-print-file-name={name}"]
        preload.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        if not os.path.isabs(preload[-1]):
            pytest.skip(f"the compiler has no {name}")
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "PYTHONPATH": path,
    }
    host_build.build_kernels(sanitize=True)
    command = [sys.executable, str(HERE / "sanitized.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    import sanitized

    assert done.stdout.split("\n")[:-1] == [f"{name}: clean" for name in sanitized.CALLS]
