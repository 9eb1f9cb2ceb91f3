"""Run every checker that CI runs: ruff, clang-format and mypy, over the files that git knows.

With --fix, rewrite what can be rewritten instead of complaining about it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CXX_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def tracked(*suffixes: str) -> list[str]:
    """The project's files with these suffixes, new ones that git does not ignore included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.split("\0") if name.endswith(suffixes) and (ROOT / name).is_file())


def main() -> int:
    """Exit status 1 if any checker complains; every checker runs all the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fix", action="store_true", help="rewrite files instead of complaining")
    fix = parser.parse_args().fix
    python = [sys.executable, "-m"]
    cxx = tracked(*CXX_SUFFIXES)
    clang_format = str(Path(sys.executable).with_name("clang-format"))
    commands: list[tuple[str, list[str]]] = [
        ("ruff check", [*python, "ruff", "check", *(["--fix"] if fix else []), "."]),
        ("ruff format", [*python, "ruff", "format", *([] if fix else ["--check", "--diff"]), "."]),
    ]
    if cxx:
        commands.append(
            ("clang-format", [clang_format, *(["-i"] if fix else ["--dry-run", "-Werror"]), *cxx])
        )
    commands.append(("mypy", [*python, "mypy"]))
    failed = []
    for name, command in commands:
        print(f"--- {name}", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
    print(f"lint: {', '.join(failed)} complained" if failed else "lint: clean")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
