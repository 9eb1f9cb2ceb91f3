"""Runs `*_interpreted.py` in a process of its own with TRITON_INTERPRET=1, whatever process `pytest tests` is.

Triton decides when a kernel is decorated whether it is interpreted, so one process cannot both interpret and compile.
In an ordinary process each such file is one test, and a slow one if it has slow tests, which runs the file in a child
pytest and fails if anything in it fails, is skipped, or is not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class InterpretedFile(pytest.File):
    """A test file that needs a process with the interpreter: one test for its fast tests, one for its slow ones."""

    def collect(self):
        fast = ChildRun.from_parent(self, name="TRITON_INTERPRET=1")
        fast.expression = "not slow"
        yield fast
        if "pytest.mark.slow" in self.path.read_text(encoding="utf-8"):
            slow = ChildRun.from_parent(self, name="TRITON_INTERPRET=1 slow")
            slow.expression = "slow"
            slow.add_marker(pytest.mark.slow)
            yield slow


class ChildRun(pytest.Item):
    """The child pytest over one file, with one marker expression."""

    expression: str

    def runtest(self):
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir",
                   str(self.config.rootpath), str(self.path), "-m", self.expression]  # fmt: skip
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(
            command, env=environment, cwd=self.config.rootpath, capture_output=True, text=True
        )
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
        if done.returncode != 0 or not counts.get("passed") or counts.get("skipped"):
            raise AssertionError(
                f"{self.path.name} under TRITON_INTERPRET=1:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
            )

    def repr_failure(self, excinfo, style=None):
        return (
            str(excinfo.value) if isinstance(excinfo.value, AssertionError) else super().repr_failure(excinfo)
        )

    def reportinfo(self):
        return self.path, None, f"{self.path.name} [{self.name}]"


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name.endswith("_interpreted.py") and not INTERPRETED:
        return InterpretedFile.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process is left with one of them while the others are done."""
    items.sort(key=lambda item: not isinstance(item, ChildRun))
