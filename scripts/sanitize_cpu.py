"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: build them so, then run the ops' tests.

    python scripts/sanitize_cpu.py [pytest's arguments]

The module is compiled into build/sanitized, with GCC, where each task gets exactly the scratch that it asks for: a
kernel that leaves a tensor or its scratch is told with its line. Without arguments the tests are those of tests/ops
but the other backends'; SDAN_FAST_CPU_ISA chooses the instruction set as ever.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_tools import extensions, toolkit  # noqa: E402
from build_tools.compile import CompileError, find_ninja, job_count, run_steps  # noqa: E402

# Vectors are loaded from wherever pixels lie, so that alignment is not checked. The stack is not either: its arrays
# of vectors are registers, and would take minutes of each compilation.
FLAGS = (
    "-fsanitize=address,undefined", "-fno-sanitize=alignment,null,object-size,vptr", "-fno-sanitize-recover=undefined",
    "-O1", "-g1", "--param=asan-stack=0", "-DSDAN_EXACT_SCRATCH",
)  # fmt: skip

# The module takes its name before sdan_fast can load the usual one; torch brings the library that it links. A report
# ends the process: pytest must not have caught the stream that it is written to.
RUN = """
import importlib.util, sys
import torch
name, file = "sdan_fast._C_cpu", sys.argv[1]
spec = importlib.util.spec_from_file_location(name, file)
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
sys.exit(pytest.main(["--capture=sys", *sys.argv[2:]]))
"""


def build(compiler: toolkit.Compiler, torch: toolkit.TorchTree) -> Path:
    """What changed of the sanitized module."""
    folder = ROOT / "build" / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    isas = toolkit.isas_for(platform.machine())
    steps, module = extensions.cpu_steps(ROOT, folder, compiler, torch, isas, flags=FLAGS)
    run_steps(steps, folder, jobs=job_count(), ninja=find_ninja())
    return module


def runtimes(compiler: toolkit.Compiler) -> str:
    """The sanitizers' libraries, which a Python that was built without them has to load first."""
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*compiler.command, f"-print-file-name={name}"]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            sys.exit(f"sanitize: {compiler.version} has no {name}; this needs GCC with its sanitizers")
        paths.append(path)
    return " ".join(paths)


def main() -> int:
    compiler, torch = toolkit.find_compiler(), toolkit.find_torch()
    if isinstance(compiler, toolkit.Missing):
        sys.exit(f"sanitize: {compiler.reason}")
    if isinstance(torch, toolkit.Missing):
        sys.exit(f"sanitize: {torch.reason}")
    preload = runtimes(compiler)
    try:
        module = build(compiler, torch)
    except CompileError as error:
        sys.exit(f"sanitize: {error}\n{error.output}")
    tests = sys.argv[1:] or ["-q", "-p", "no:cacheprovider", "tests/ops", "-k", "not triton and not cuda"]
    # torch and Python keep memory to their end.
    env = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, "-c", RUN, str(module), *tests], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    raise SystemExit(main())
