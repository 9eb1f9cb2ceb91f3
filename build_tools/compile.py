"""Run compile and link steps, through ninja where it is installed and one after the other where it is not.

Either way a step is repeated only if its command line, its inputs or a header that it included has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One command that makes one file.

    depfile: the Makefile-style list of headers that the command writes beside its output; None for a link.
    """

    output: Path
    inputs: tuple[Path, ...]
    command: tuple[str, ...]
    label: str
    depfile: Path | None = None


class CompileError(RuntimeError):
    """A step failed; `output` is what the compiler printed."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


def find_ninja() -> str | None:
    """The ninja to run: the one beside this interpreter, the `ninja` package's, or the one on PATH."""
    beside = Path(sys.executable).with_name("ninja")
    if os.access(beside, os.X_OK):
        return str(beside)
    with contextlib.suppress(ImportError, AttributeError):
        packaged = Path(importlib.import_module("ninja").BIN_DIR) / "ninja"
        if os.access(packaged, os.X_OK):
            return str(packaged)
    return shutil.which("ninja")


def job_count(env: Mapping[str, str] | None = None) -> int:
    """How many compilers may run at once: MAX_JOBS, else one for each CPU that this process may use."""
    env = os.environ if env is None else env
    wanted = env.get("MAX_JOBS", "").strip()
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise ValueError(f"MAX_JOBS: expected a positive whole number, got {wanted!r}")
        return int(wanted)
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second build out of `folder` while one is at work in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run_steps(steps: Sequence[Step], folder: Path, *, jobs: int, ninja: str | None) -> None:
    """Bring every step's output up to date. CompileError, with the compiler's words, if a command fails."""
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    if ninja is not None:
        _run_ninja(steps, folder, jobs=jobs, ninja=ninja)
    else:
        _run_in_turn(steps)


# --- ninja --------------------------------------------------------------------------------------------------


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(steps: Sequence[Step]) -> str:
    """The build.ninja for the steps."""
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        "  command = $cmd",
        "  description = $label",
        "  depfile = $dep",
        "  deps = gcc",
        "rule link",
        "  command = $cmd",
        "  description = $label",
        "",
    ]
    for step in steps:
        rule = "link" if step.depfile is None else "compile"
        lines.append(f"build {_path(step.output)}: {rule} {' '.join(_path(path) for path in step.inputs)}")
        lines.append(f"  cmd = {_shell(step.command).replace('$', '$$')}")
        lines.append(f"  label = {step.label.replace('$', '$$')}")
        if step.depfile is not None:
            lines.append(f"  dep = {_path(step.depfile)}")
    return "\n".join(lines) + "\n"


def _shell(command: Sequence[str]) -> str:
    quoted = (
        word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\\''") + "'"
        for word in command
    )
    return " ".join(quoted)


def _run_ninja(steps: Sequence[Step], folder: Path, *, jobs: int, ninja: str) -> None:
    text = ninja_file(steps)
    path = folder / "build.ninja"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    command = [ninja, "-C", str(folder), "-j", str(jobs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if not line.startswith("ninja: Entering"):
                print(line, end="", flush=True)
    if process.returncode:
        raise CompileError(f"{' '.join(command)} failed", "".join(printed))


# --- without ninja ------------------------------------------------------------------------------------------


def read_depfile(text: str) -> list[str]:
    """The prerequisites that a compiler wrote as `output: a b \\` lines; escaped blanks and dollars are undone."""
    joined = text.replace("\\\n", " ")
    _, _, inputs = joined.partition(": ")
    return [word.replace("\\ ", " ").replace("$$", "$") for word in re.findall(r"(?:\\ |\S)+", inputs)]


def _up_to_date(step: Step, record: Path) -> bool:
    try:
        made = step.output.stat().st_mtime_ns
        if json.loads(record.read_text(encoding="utf-8")) != list(step.command):
            return False
        inputs = [str(path) for path in step.inputs]
        if step.depfile is not None:
            inputs += read_depfile(step.depfile.read_text(encoding="utf-8"))
        return all(os.stat(path).st_mtime_ns <= made for path in inputs)
    except (OSError, ValueError):
        return False


def _run_in_turn(steps: Sequence[Step]) -> None:
    for number, step in enumerate(steps, 1):
        record = step.output.with_name(step.output.name + ".cmd.json")
        if _up_to_date(step, record):
            continue
        print(f"[{number}/{len(steps)}] {step.label}", flush=True)
        # The output goes first, so that a compiler stopped half-way leaves nothing that looks finished.
        step.output.unlink(missing_ok=True)
        record.unlink(missing_ok=True)
        done = subprocess.run(list(step.command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise CompileError(f"{step.label} failed", done.stdout)
        record.write_text(json.dumps(list(step.command)), encoding="utf-8")
