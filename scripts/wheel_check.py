"""Show that one wheel serves two torch releases: build it once, then load and test it under both.

    python scripts/wheel_check.py [--other 2.13.0] [--require-cpu-only]

The wheel is built with the torch of this environment, for the architectures of TORCH_CUDA_ARCH_LIST (make sets a
short list; without it, every architecture that is shipped), and tested
(tests/test_wheel.py, away from the checkout) in two virtual environments: one that borrows this environment's
torch, and one with another torch release, by preference one built without CUDA, beside which both extension
modules have to load just the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheel-check"


def say(text: str) -> None:
    print(f"--- {text}", flush=True)


def run(command: Sequence[str | Path], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    """Run a command and stop the check if it fails."""
    words = [str(word) for word in command]
    if status := subprocess.run(words, cwd=cwd, env=env).returncode:
        sys.exit(f"wheel-check: exit status {status} from: {' '.join(words)}")


def output_of(command: Sequence[str | Path]) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def build_wheel() -> Path:
    """The one wheel. It has to be an abi3 wheel; objects that make build left are used again."""
    dist = WORK / "dist"
    # setuptools copies whatever an earlier build left in build/lib.* into the wheel, files since removed included.
    for stale in [dist, *(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist*")]:
        shutil.rmtree(stale, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", dist, ROOT])
    wheels = list(dist.glob("*.whl"))
    if len(wheels) != 1 or "-cp310-abi3-" not in wheels[0].name:
        sys.exit(f"wheel-check: expected one cp310-abi3 wheel, got {[wheel.name for wheel in wheels]}")
    return wheels[0]


def borrowing_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not its editable install of the checkout.

    A path in a .pth file adds the folder and leaves the .pth files inside it alone, which is how an editable
    install announces itself. torch takes gigabytes and a minute to install a second time. Returns the
    interpreter.
    """
    if folder.exists():
        shutil.rmtree(folder)
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    site = Path(output_of([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]))
    lines = sorted({sysconfig.get_paths()[key] for key in ("purelib", "platlib")})
    (site / "borrowed.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return python


def other_environment(release: str) -> Path:
    """The virtual environment with the other torch; kept and reused. Returns its interpreter."""
    folder = ROOT / f".venv-torch-{release}"
    python = folder / "bin" / "python"
    marker = folder / ".installed"
    if not marker.is_file():
        run([sys.executable, "-m", "venv", "--clear", folder])
        run(
            [
                python,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "install",
                f"torch=={release}",
                "numpy",
                "pytest",
            ]
        )
        marker.touch()
    return python


def install(python: Path, wheel: Path, extras: str = "") -> None:
    """Put the wheel into an environment; with `extras`, what they ask for too (the torch there stays)."""
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    pip.append("install")
    # Never touching what is installed already: a borrowing environment sees this one's packages as its own.
    run([*pip, "--ignore-installed", "--no-deps", wheel])
    if extras:
        run([*pip, f"{wheel}[{extras}]"])


def check(python: Path, expected: str) -> None:
    """Run the wheel's tests under an interpreter, with nothing of the checkout in reach."""
    away = WORK / "tests"
    shutil.rmtree(away, ignore_errors=True)
    away.mkdir(parents=True)
    shutil.copy2(ROOT / "tests" / "test_wheel.py", away)
    env = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SDAN_FAST_BACKEND")
    }
    env |= {"SDAN_FAST_WHEEL_CHECK": expected, "PYTHONDONTWRITEBYTECODE": "1"}
    options: list[str | Path] = ["-q", "-ra", "-p", "no:cacheprovider", "--rootdir", away, "-c", os.devnull]
    run([python, "-m", "pytest", *options, away / "test_wheel.py"], cwd=away, env=env)


def main() -> None:
    """Exit status 0 if the wheel passes under both releases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--other", default="2.13.0", help="the second torch release (default: %(default)s)")
    parser.add_argument(
        "--require-cpu-only", action="store_true", help="fail unless the second torch was built without CUDA"
    )
    options = parser.parse_args()
    began = time.monotonic()

    say("building the wheel")
    wheel = build_wheel()
    say(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - began:.0f} s")

    own = output_of([sys.executable, "-c", "import torch; print(torch.__version__)"])
    say(f"under torch {own}, the one that it was built with")
    python = borrowing_environment(WORK / "venv")
    install(python, wheel)
    check(python, own)

    say(f"under torch {options.other}")
    python = other_environment(options.other)
    version, cuda = output_of(
        [python, "-c", "import torch; print(torch.__version__, torch.version.cuda)"]
    ).split()
    if cuda != "None":
        complaint = f"torch {version} was built with CUDA {cuda}; whether _C_cuda loads without CUDA is open"
        if options.require_cpu_only:
            sys.exit(f"wheel-check: {complaint}")
        say(f"note: {complaint}")
    install(python, wheel, "cli")
    check(python, version)
    kind = "built without CUDA" if cuda == "None" else f"built with CUDA {cuda}"
    say(f"passed: built with torch {own}, and tested under it and under torch {version} ({kind}); "
        f"{time.monotonic() - began:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
