"""The extension modules of sdan_fast; everything else that packaging needs is in pyproject.toml."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 front end does not put the project on sys.path

from build_tools import extensions  # noqa: E402


class BuildExtensions(build_ext):
    """Builds what this machine can, and leaves a file that says what was built, how, and what is missing."""

    def _folder(self) -> Path:
        """The package folder that the modules go into: in the source tree for an editable install."""
        if self.inplace or self.editable_mode:
            return ROOT / self.get_finalized_command("build_py").get_package_dir("sdan_fast")
        return Path(self.build_lib) / "sdan_fast"

    def run(self) -> None:
        folder = self._folder()
        results = extensions.build_all(ROOT)
        for kind, result in results.items():
            target = folder / f"_C_{kind}{extensions.SUFFIX}"
            if result.file is not None:
                extensions.install_file(result.file, target)
            else:
                target.unlink(
                    missing_ok=True
                )  # one left from an earlier build would contradict the build info
        info = {
            "format": 1,
            "sdan_fast": self.distribution.get_version(),
            "python": ".".join(str(part) for part in sys.version_info[:3]),
            "platform": sysconfig.get_platform(),
            **{kind: result.info for kind, result in results.items()},
        }
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(info, indent=1) + "\n"
        (folder / extensions.BUILD_INFO).write_text(text, encoding="utf-8")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "sdan_fast"
        names = [f"_C_{kind}{extensions.SUFFIX}" for kind in ("cpu", "cuda")] + [extensions.BUILD_INFO]
        return [str(folder / name) for name in names if (folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # the modules of an editable install are written into the source tree by run() itself

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy, for the same reason."""


def _sources(kind: str) -> list[str]:
    return [
        str(path.relative_to(ROOT)) for paths in extensions.sources(ROOT, kind).values() for path in paths
    ]


packages = [
    "sdan_fast",
    *find_packages(str(ROOT), include=["sdan_fast.*"]),
    "sdan_fast.kernels",
    *(f"sdan_fast.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))),
]
limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
setup(
    packages=packages,
    package_dir={"sdan_fast.kernels": "kernels"},
    ext_modules=[
        Extension(f"sdan_fast._C_{kind}", _sources(kind), py_limited_api=limited) for kind in ("cpu", "cuda")
    ],
    cmdclass={"build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
)
