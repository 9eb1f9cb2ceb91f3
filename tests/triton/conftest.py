"""Runs `*_interpreted.py` in a process of its own with TRITON_INTERPRET=1, whatever process `pytest tests` is.

Triton decides when a kernel is decorated whether it is interpreted, so one process cannot both interpret and compile.
In an ordinary process each such file is one test, and two slow ones if it has slow tests, which run the file in a child
pytest and fail if anything in it fails, is skipped, or is not there.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def patch_the_language_once() -> None:
    """Where a kernel calls a function, the interpreter patches all of triton.language again: half of its time."""
    from triton.runtime import interpreter

    tl, patch, patched = interpreter.tl, interpreter._patch_lang, set()

    @functools.cache
    def languages(fn):
        return frozenset(
            v.__name__ for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)
        )

    def patch_lang(fn):
        if languages(fn) in patched:
            return interpreter._LangPatchScope()  # which has nothing to restore
        patched.add(languages(fn))
        scope = patch(fn)
        restore = scope.restore

        def restore_all():  # called where a launch ends
            restore()
            patched.clear()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang


def leave_out_idle_work() -> None:
    """Without debug, the interpreter does integer arithmetic twice, for an assertion about overflow that it then leaves
    out; and it builds again, for each tensor, what depends on nothing but its shape or dtype. Over half of its time.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    assert_no_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
    pointer, np_dtype = interpreter.np.dtype("uint64"), functools.cache(interpreter._get_np_dtype)

    def no_overflow(self, lhs, rhs, binary_op):
        if self.builder.options.debug:
            assert_no_overflow(self, lhs, rhs, binary_op)

    @functools.cache
    def described(shape):
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])

    def tensor(self, handle, type):
        core.base_value.__init__(self)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = described(type.shape if type.is_block() else ())

    TritonSemantic.binary_op_sanitize_overflow_impl = no_overflow
    interpreter._get_np_dtype = lambda dtype: (
        pointer if dtype.scalar.is_ptr() else np_dtype(dtype.scalar if dtype.is_block() else dtype)
    )
    core.tensor.__init__ = tensor


if INTERPRETED:
    patch_the_language_once()
    leave_out_idle_work()


class InterpretedFile(pytest.File):
    """A test file that needs a process with the interpreter: one test for its fast tests, one for each half of its slow
    ones, which all are about both memory formats.
    """

    def collect(self):
        yield ChildRun.of(self, "", "not slow")
        if "pytest.mark.slow" in self.path.read_text(encoding="utf-8"):
            for half, names in (("nchw", "not channels_last"), ("channels_last", "channels_last")):
                run = ChildRun.of(self, f" slow {half}", "slow", names)
                run.add_marker(pytest.mark.slow)
                yield run


class ChildRun(pytest.Item):
    """The child pytest over one file, with one expression for marks and one for names."""

    expression: str
    names: str

    @classmethod
    def of(cls, parent: pytest.File, name: str, expression: str, names: str = "") -> ChildRun:
        run = cls.from_parent(parent, name=f"TRITON_INTERPRET=1{name}")
        run.expression, run.names = expression, names
        return run

    def runtest(self):
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir",
                   str(self.config.rootpath), str(self.path), "-m", self.expression, "-k", self.names]  # fmt: skip
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
