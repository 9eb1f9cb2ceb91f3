"""The build: what the modules may need and export, what is found where, and installs that lack a tool."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "build_tools").is_dir():
    pytest.skip("the build is tested in a source checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from build_tools import compile as compiling  # noqa: E402
from build_tools import extensions, toolkit  # noqa: E402

KINDS = ("cpu", "cuda")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux only so far")


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + textwrap.dedent(body), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def module_file(kind: str) -> Path:
    """The built module beside the package's sources; skips with the build's own reason if there is none."""
    path = ROOT / "sdan_fast" / f"_C_{kind}{extensions.SUFFIX}"
    info = ROOT / "sdan_fast" / extensions.BUILD_INFO
    if not info.is_file():
        pytest.skip("the package was not built in this checkout (make build)")
    told = json.loads(info.read_text(encoding="utf-8"))[kind]
    if not told["built"]:
        assert not path.exists(), f"{path.name} is there although the build info says it was not built"
        pytest.skip(f"_C_{kind} was not built: {told['reason']}")
    return path


def compile_cxx(source: str, folder: Path, *flags: str, link: bool = False) -> Path:
    """Compile a piece of C++ (to a shared library if `link`), with the compiler that the build would use."""
    compiler = toolkit.find_compiler()
    if isinstance(compiler, toolkit.Missing):
        pytest.skip(compiler.reason)
    file = folder / "planted.cpp"
    file.write_text(source, encoding="utf-8")
    output = folder / ("planted.so" if link else "planted.o")
    mode = "-shared" if link else "-c"
    subprocess.run([*compiler.command, "-fPIC", *flags, mode, file, "-o", output], check=True)
    return output


# --- what the modules need and export -----------------------------------------------------------------------

# Symbols that carry a version of the C or C++ runtime, CPython's limited API, the stable ABI of torch, and
# the hooks that every ELF library has. Anything else would tie a module to one release of something.
ALLOWED_UNDEFINED = re.compile(
    r"""(?: .+@@?(?:GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+
          | _?Py[A-Z_]\w*
          | (?:aoti_torch|torch)_\w+
          | _ITM_\w+ | __gmon_start__ | __cxa_finalize )\Z""",
    re.VERBOSE,
)
ALLOWED_LIBRARIES = re.compile(
    r"(?:libtorch_cpu\.so|libstdc\+\+\.so\.6|libgcc_s\.so\.1|lib(?:c|m|dl|rt|pthread)\.so\.\d+|ld-linux.*\.so\.\d+)\Z"
)


def unstable_symbols(library: Path) -> list[str]:
    listed = output_of(tool("nm"), "-D", "--undefined-only", library).split("\n")
    names = [line.split()[-1] for line in listed if line.strip()]
    return [name for name in names if not ALLOWED_UNDEFINED.match(name)]


def needed_libraries(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", output_of(tool("readelf"), "-d", library))


@linux_only
@pytest.mark.parametrize("kind", KINDS)
def test_only_stable_symbols(kind: str) -> None:
    library = module_file(kind)
    assert unstable_symbols(library) == []
    text = output_of(tool("nm"), "-D", "--undefined-only", library)
    assert "aoti_torch_" in text, "nm saw no symbol of torch at all: is this the right file?"


@linux_only
def test_unstable_symbols_are_seen(tmp_path: Path) -> None:
    """The check above would notice C++ symbols of torch, CUDA's runtime and Python's private ones."""
    bad = compile_cxx(
        """
        namespace c10 { struct Error { Error(int); int x; }; }
        namespace at { int get_num_threads(); }
        namespace torch { int not_stable(); }
        extern "C" int cudaMalloc(void**, unsigned long);
        extern "C" int aoti_torch_fine();
        extern "C" int torch_fine();
        int planted() {
          return c10::Error(at::get_num_threads()).x + torch::not_stable() + cudaMalloc(nullptr, 1)
                 + aoti_torch_fine() + torch_fine();
        }
        """,
        tmp_path,
        link=True,
    )
    assert sorted(unstable_symbols(bad)) == [
        "_ZN2at15get_num_threadsEv",
        "_ZN3c105ErrorC1Ei",
        "_ZN5torch10not_stableEv",
        "cudaMalloc",
    ]


@linux_only
@pytest.mark.parametrize("kind", KINDS)
def test_no_library_of_cuda_is_needed(kind: str) -> None:
    libraries = needed_libraries(module_file(kind))
    assert "libtorch_cpu.so" in libraries
    assert [name for name in libraries if not ALLOWED_LIBRARIES.match(name)] == []


@pytest.mark.parametrize("name", ["libcudart.so.13", "libtorch_cuda.so", "libc10.so", "libtorch_python.so"])
def test_libraries_of_cuda_are_refused(name: str) -> None:
    assert not ALLOWED_LIBRARIES.match(name)


@linux_only
def test_messages_do_not_tell_where_the_module_was_built() -> None:
    """A failed check names csrc/cpu/star.cpp; the CUDA module has the lines of its kernels besides."""
    strings = re.findall(rb"[\x20-\x7e]+", module_file("cpu").read_bytes())
    named = {text for text in strings if text.endswith((b".cpp", b".h")) and b"/" in text}
    assert b"csrc/cpu/star.cpp" in named
    assert not [text for text in named if text.startswith(b"/")]


def test_the_flags_shorten_paths(tmp_path: Path) -> None:
    file = compile_cxx(
        'extern "C" const char* planted() { return __FILE__; }',
        tmp_path,
        *extensions._short_paths(tmp_path, toolkit.TorchTree(tmp_path / "torch", "2.14")),
    )
    assert b"planted.cpp" in file.read_bytes()
    assert str(tmp_path / "planted.cpp").encode() not in file.read_bytes()


@linux_only
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_init_function_is_exported(kind: str) -> None:
    listed = output_of(tool("nm"), "-D", "--defined-only", module_file(kind)).split("\n")
    assert [line.split()[-1] for line in listed if line.strip()] == [f"PyInit__C_{kind}"]


# --- instruction sets stay apart ----------------------------------------------------------------------------


def mergeable_symbols(obj: Path, isa: str) -> list[str]:
    """Symbols of an instruction set's object that the linker could give to a baseline caller.

    Weak, common or unique ones outside sdan_fast::<isa>: of several copies of an inline function the linker
    keeps any one, and the one kept could hold instructions that the machine at hand does not have.
    """
    found = []
    for line in output_of(tool("nm"), "--defined-only", "-C", obj).split("\n"):
        match = re.match(r"[0-9a-f]*\s+([WVuC])\s+(.+)$", line)
        # DW.ref.* only points at the personality routine of exceptions; it holds no code.
        if match and f"sdan_fast::{isa}::" not in match.group(2) and not match.group(2).startswith("DW.ref."):
            found.append(match.group(2))
    return found


def isa_objects() -> list[tuple[str, Path]]:
    """(instruction set, object) of the latest CPU build in this checkout; skips where there is none."""
    module = module_file("cpu")
    top = Path(os.environ.get("SDAN_FAST_BUILD_DIR") or ROOT / "build")
    builds = [folder for folder in top.glob("cpu-*") if (folder / module.name).is_file()]
    if not builds:
        pytest.skip("the objects of the CPU build are not here (installed from a wheel?)")
    build = max(builds, key=lambda folder: (folder / module.name).stat().st_mtime_ns)
    stems = [path.stem for path in extensions.sources(ROOT, "cpu")["isa"]]
    isas = toolkit.isas_for(platform.machine())
    return [(isa, build / "obj" / f"{stem}.{isa}.o") for stem in stems for isa in isas]


@linux_only
def test_isa_objects_share_nothing_with_the_baseline() -> None:
    objects = isa_objects()
    assert objects
    missing = [path.name for _, path in objects if not path.is_file()]
    assert not missing, f"not compiled since they were added: {missing} (make build)"
    leaks = {path.name: found for isa, path in objects if (found := mergeable_symbols(path, isa))}
    assert leaks == {}


@linux_only
def test_mergeable_symbols_are_seen(tmp_path: Path) -> None:
    obj = compile_cxx(
        """
        #include <vector>
        namespace sdan_fast { namespace avx2 {
        template <class T> T twice(T x) { return x + x; }
        template int twice<int>(int);
        float sum(const std::vector<float>& v) { std::vector<float> w = v; w.push_back(1); return w.back(); }
        } }
        inline int shared(int x) { return x * 3; }
        int (*use)(int) = shared;
        """,
        tmp_path,
        "-O1",
        "-fno-inline",
        "-std=c++20",
    )
    found = mergeable_symbols(obj, "avx2")
    assert "shared(int)" in found
    assert any(name.startswith("std::vector<float") for name in found)
    assert not any("twice" in name for name in found), "the set's own templates are its own business"


def functions_using(library: Path, registers: str) -> set[str]:
    """Names of the functions in a library whose instructions name these registers (a regular expression)."""
    users, current = set(), ""
    with subprocess.Popen(
        [tool("objdump"), "-d", "-C", "--no-show-raw-insn", str(library)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if header := re.match(r"[0-9a-f]+ <(.+)>:$", line):
                current = header.group(1)
            elif re.search(registers, line):
                users.add(current)
    return users


@linux_only
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 registers")
@pytest.mark.parametrize(
    ("registers", "sets"), [("%zmm", ("avx512",)), ("%ymm", ("avx2", "avx512"))], ids=["zmm", "ymm"]
)
def test_wide_registers_stay_in_their_sets(registers: str, sets: tuple[str, ...]) -> None:
    """In the linked module, only a function of an instruction set's namespace uses its registers."""
    module = module_file("cpu")
    users = functions_using(module, registers)
    assert users, f"no function uses {registers}: were the instruction sets compiled at all?"
    strangers = {name for name in users if not any(f"sdan_fast::{isa}::" in name for isa in sets)}
    assert strangers == set()


# --- finding a toolkit --------------------------------------------------------------------------------------

NVCC = """
for word in "$@"; do
  case "$word" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0 ;;
    --dryrun) echo "#\\$ _SPACE_= " >&2; echo "#\\$ TOP={root}/bin/.." >&2; exit 0 ;;
  esac
done
exit 3
"""


def fake_toolkit(root: Path, *, headers: bool = True, runtime: bool = True, layout: str = "lib64") -> Path:
    """A folder that looks like a CUDA toolkit; its nvcc answers --version and --dryrun."""
    script(root / "bin/nvcc", NVCC.format(root=root))
    if headers:
        (root / "include").mkdir(exist_ok=True)
        (root / "include/cuda_runtime.h").touch()
    if runtime:
        (root / layout).mkdir(parents=True, exist_ok=True)
        (root / layout / "libcudart_static.a").touch()
    return root


def find(env: dict[str, str], roots: list[Path] | None = None, pip: list[Path] | None = None):
    return toolkit.find_cuda(
        {"PATH": "", **env},
        system_roots=[str(root) for root in roots or []],
        site_packages=[str(folder) for folder in pip or []],
    )


@linux_only
def test_cuda_behind_a_wrapper_script(tmp_path: Path) -> None:
    root = fake_toolkit(tmp_path / "somewhere/else")
    script(tmp_path / "bin/nvcc", f'exec "{root}/bin/nvcc" "$@"\n')
    found = find({"PATH": str(tmp_path / "bin")})
    assert isinstance(found, toolkit.CudaToolkit)
    assert found.root == root
    assert found.nvcc == root / "bin/nvcc"
    assert found.version == "13.0.88"
    assert found.found_by == "PATH"


@linux_only
def test_cuda_behind_a_symlink(tmp_path: Path) -> None:
    root = fake_toolkit(tmp_path / "toolkit", layout="targets/x86_64-linux/lib")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").symlink_to(root / "bin/nvcc")
    found = find({"PATH": str(tmp_path / "bin")})
    assert isinstance(found, toolkit.CudaToolkit)
    assert found.root == root
    assert found.lib == root / "targets/x86_64-linux/lib"


@linux_only
def test_cuda_order(tmp_path: Path) -> None:
    """CUDA_HOME, CUDA_PATH, PATH, the system's folders, pip's: each when those before it are gone."""
    names = ("home", "path", "onpath", "system")
    home, path, on_path, system = (fake_toolkit(tmp_path / name) for name in names)
    pip = fake_toolkit(tmp_path / "site/nvidia/cu13", layout="lib")
    env = {"CUDA_HOME": str(home), "CUDA_PATH": str(path), "PATH": str(on_path / "bin")}
    for expected, gone in ((home, "CUDA_HOME"), (path, "CUDA_PATH"), (on_path, "PATH"), (system, "")):
        found = find(env, [system], [tmp_path / "site"])
        assert isinstance(found, toolkit.CudaToolkit)
        assert found.root == expected
        env.pop(gone, None)
    found = find(env, [], [tmp_path / "site"])
    assert isinstance(found, toolkit.CudaToolkit)
    assert (found.root, found.found_by) == (pip, "pip packages")


@linux_only
def test_cuda_roots_variable_replaces_the_search(tmp_path: Path) -> None:
    system, named = fake_toolkit(tmp_path / "system"), fake_toolkit(tmp_path / "named")
    found = find({"SDAN_FAST_CUDA_ROOTS": str(named)}, [system])
    assert isinstance(found, toolkit.CudaToolkit)
    assert found.root == named
    assert isinstance(find({"SDAN_FAST_CUDA_ROOTS": ""}, [system]), toolkit.Missing)


@linux_only
def test_incomplete_cuda_is_passed_over_and_named(tmp_path: Path) -> None:
    """A toolkit of which only a part is installed (a common state of pip's packages) is not a toolkit."""
    no_headers = fake_toolkit(tmp_path / "no_headers", headers=False)
    no_runtime = fake_toolkit(tmp_path / "no_runtime", runtime=False)
    broken = fake_toolkit(tmp_path / "broken")
    script(broken / "bin/nvcc", "exit 1\n")
    env = {"CUDA_HOME": str(tmp_path / "nothing")}
    missing = find(env, [no_headers, no_runtime, broken])
    assert isinstance(missing, toolkit.Missing)
    for part in (f"CUDA_HOME={tmp_path / 'nothing'} has no bin/nvcc", "no nvcc on PATH",
                 f"{no_headers} (the system) has no cuda_runtime.h",
                 f"{no_runtime} (the system) has no libcudart_static.a", f"{broken}/bin/nvcc"):  # fmt: skip
        assert part in missing.reason
    whole = fake_toolkit(tmp_path / "whole")
    found = find(env, [no_headers, no_runtime, broken, whole])
    assert isinstance(found, toolkit.CudaToolkit)
    assert found.root == whole


@linux_only
def test_cuda_of_this_machine_without_cuda_home() -> None:
    """Whatever nvcc PATH has here, wrapper or not, leads to a whole toolkit without CUDA_HOME."""
    path = tool("nvcc")
    env = {"PATH": os.path.dirname(path) + os.pathsep + os.environ["PATH"]}
    found = toolkit.find_cuda(env, system_roots=[], site_packages=[])
    assert isinstance(found, toolkit.CudaToolkit), found
    assert (found.include / "cuda_runtime.h").is_file()
    assert (found.lib / "libcudart_static.a").is_file()
    with open(found.nvcc, "rb") as handle:
        assert handle.read(4) == b"\x7fELF", "the real compiler, not a wrapper"


LISTED = "sm_75\nsm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_120\ncompute_75\ncompute_90\ncompute_120\n"


def test_default_archs_are_what_nvcc_knows() -> None:
    assert toolkit.cuda_archs(LISTED, None) == [
        "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120",
    ]  # fmt: skip
    assert toolkit.cuda_archs("sm_80 sm_90 sm_103 compute_90", "") == ["sm_80", "sm_90", "compute_90"]
    with pytest.raises(ValueError, match=r"compiles for none of 7\.5"):
        toolkit.cuda_archs("sm_52", None)


@pytest.mark.parametrize(
    ("asked", "codes"),
    [
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0 8.6, 8.0", ["sm_80", "sm_86"]),
        ("9.0a", ["sm_90a"]),
        ("Ampere", ["sm_80", "sm_86", "compute_86"]),
        ("12.0+PTX", ["sm_120", "compute_120"]),
    ],
)
def test_arch_list(asked: str, codes: list[str]) -> None:
    assert toolkit.cuda_archs(LISTED, asked) == codes


@pytest.mark.parametrize("asked", ["7.0", "8", "native", "sm_80", "9.0+SASS"])
def test_arch_list_refuses(asked: str) -> None:
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
        toolkit.cuda_archs(LISTED, asked)


def test_gencode() -> None:
    assert toolkit.gencode_flags(["sm_80", "compute_90"]) == [
        "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=compute_90",
    ]  # fmt: skip
    # Machine code of one architecture is made from another's PTX only where that one is asked for too; PTX never is.
    assert toolkit.gencode_flags(["sm_75", "sm_86"])[3] == "arch=compute_86,code=sm_86"
    assert toolkit.gencode_flags(["sm_80", "sm_86", "compute_86"]) == [
        "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_80,code=sm_86",
        "-gencode", "arch=compute_86,code=compute_86",
    ]  # fmt: skip


def test_isas_of_other_machines() -> None:
    assert toolkit.isas_for("aarch64") == ["portable"]
    assert toolkit.isas_for("x86_64") == ["portable", "avx2", "avx512"]
    flags = [
        *extensions.CXX_FLAGS,
        *extensions.NVCC_FLAGS,
        *(f for fs in toolkit.ISA_FLAGS.values() for f in fs),
    ]
    assert not any("native" in flag or "fast-math" in flag or "fast_math" in flag for flag in flags)


# --- finding torch and the compiler -------------------------------------------------------------------------


def fake_torch(site: Path, version: str, *, stable: bool = True) -> Path:
    root = site / "torch"
    root.mkdir(parents=True)
    (root / "version.py").write_text(f"__version__ = '{version}'\n", encoding="utf-8")
    if stable:
        (root / "include/torch/csrc/stable").mkdir(parents=True)
        (root / "include/torch/csrc/stable/library.h").touch()
    return root


def test_torch_is_found_without_importing_it(tmp_path: Path) -> None:
    root = fake_torch(tmp_path, "2.11.0+cpu")
    (root / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    assert toolkit.find_torch({}, [tmp_path]) == toolkit.TorchTree(root, "2.11.0+cpu")
    assert toolkit.find_torch({"SDAN_FAST_TORCH_DIR": str(root)}) == toolkit.TorchTree(root, "2.11.0+cpu")


def test_torch_of_this_environment() -> None:
    import torch

    found = toolkit.find_torch({})
    assert isinstance(found, toolkit.TorchTree)
    assert found.version == torch.__version__


@pytest.mark.parametrize(
    ("version", "stable", "reason"),
    [("2.9.1", True, "older than 2.10"), ("2.4.0", False, "no stable ABI headers")],
)
def test_old_torch_is_refused(tmp_path: Path, version: str, stable: bool, reason: str) -> None:
    fake_torch(tmp_path, version, stable=stable)
    found = toolkit.find_torch({}, [tmp_path])
    assert isinstance(found, toolkit.Missing)
    assert reason in found.reason


def test_no_torch_is_said(tmp_path: Path) -> None:
    found = toolkit.find_torch({}, [tmp_path])
    assert isinstance(found, toolkit.Missing)
    assert "torch is not installed" in found.reason
    found = toolkit.find_torch({"SDAN_FAST_TORCH_DIR": str(tmp_path)})
    assert isinstance(found, toolkit.Missing)
    assert "SDAN_FAST_TORCH_DIR" in found.reason


@linux_only
def test_compiler_of_cxx_variable(tmp_path: Path) -> None:
    script(tmp_path / "mycxx", 'echo "my compiler $1"\n')
    found = toolkit.find_compiler({"CXX": "mycxx -m64", "PATH": str(tmp_path)})
    assert found == toolkit.Compiler((str(tmp_path / "mycxx"), "-m64"), "my compiler -m64")
    missing = toolkit.find_compiler({"CXX": "nothere", "PATH": str(tmp_path)})
    assert isinstance(missing, toolkit.Missing)
    assert "CXX ('nothere')" in missing.reason
    missing = toolkit.find_compiler({"PATH": str(tmp_path)})
    assert isinstance(missing, toolkit.Missing)
    assert "no C++ compiler" in missing.reason


# --- compiling ----------------------------------------------------------------------------------------------


def test_max_jobs() -> None:
    assert compiling.job_count({"MAX_JOBS": "3"}) == 3
    assert compiling.job_count({}) >= 1
    for wrong in ("0", "-1", "many"):
        with pytest.raises(ValueError, match="MAX_JOBS"):
            compiling.job_count({"MAX_JOBS": wrong})


@linux_only
@pytest.mark.parametrize("with_ninja", [True, False], ids=["ninja", "in turn"])
def test_only_what_changed_is_rebuilt(tmp_path: Path, with_ninja: bool) -> None:
    """A header's change rebuilds who includes it, a flag's its own step, and no change nothing."""
    ninja = compiling.find_ninja() if with_ninja else None
    if with_ninja and ninja is None:
        pytest.skip("ninja is not installed")
    compiler = toolkit.find_compiler()
    if isinstance(compiler, toolkit.Missing):
        pytest.skip(compiler.reason)
    folder = tmp_path / "a folder with $igns"
    folder.mkdir()
    (folder / "one.h").write_text("inline int one() { return 1; }\n", encoding="utf-8")
    (folder / "a.cpp").write_text('#include "one.h"\nint a() { return one() + PLUS; }\n', encoding="utf-8")
    (folder / "b.cpp").write_text("int b() { return 2 + PLUS; }\n", encoding="utf-8")
    build = folder / "build"

    def run(plus_b: int = 0) -> set[str]:
        steps = []
        for name, plus in (("a", 0), ("b", plus_b)):
            output = build / f"{name}.o"
            depfile = output.with_suffix(".d")
            command = (*compiler.command, "-MD", "-MF", str(depfile), f"-DPLUS={plus}", "-c",
                       str(folder / f"{name}.cpp"), "-o", str(output))  # fmt: skip
            steps.append(compiling.Step(output, (folder / f"{name}.cpp",), command, name, depfile))
        outputs = tuple(step.output for step in steps)
        link = (*compiler.command, "-shared", "-o", str(build / "ab.so"), *map(str, outputs))
        steps.append(compiling.Step(build / "ab.so", outputs, link, "link"))
        before = {step.output: step.output.stat().st_mtime_ns for step in steps if step.output.exists()}
        compiling.run_steps(steps, build, jobs=1, ninja=ninja)
        return {s.output.name for s in steps if s.output.stat().st_mtime_ns != before.get(s.output)}

    assert run() == {"a.o", "b.o", "ab.so"}
    assert run() == set()
    (folder / "one.h").write_text("inline int one() { return 3; }\n", encoding="utf-8")
    assert run() == {"a.o", "ab.so"}
    assert run(plus_b=5) == {"b.o", "ab.so"}
    (folder / "b.cpp").write_text("int b() { return oops; }\n", encoding="utf-8")
    with pytest.raises(compiling.CompileError) as error:
        run(plus_b=5)
    assert "oops" in error.value.output


def test_depfile_with_blanks() -> None:
    assert compiling.read_depfile("x.o: a\\ b.cpp \\\n  /usr/$$c.h \\\n") == ["a b.cpp", "/usr/$c.h"]


TINY_MODULE = """
#include <Python.h>
static PyModuleDef tiny = {PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C_cpu() { return PyModule_Create(&tiny); }
"""


def tiny_tree(root: Path) -> Path:
    """The sources of a CPU module that does nothing, and of a CUDA one."""
    for kind in KINDS:
        (root / f"csrc/{kind}").mkdir(parents=True)
        (root / f"csrc/{kind}/module.cpp").write_text(TINY_MODULE.replace("cpu", kind), encoding="utf-8")
    return root


@linux_only
def test_a_compiler_that_cannot_compile_is_a_reason_and_not_an_error(tmp_path: Path) -> None:
    root = tiny_tree(tmp_path)
    cxx = script(tmp_path / "cxx", """
        case "$*" in *--version*) echo "g++ (Broken) 1.0"; exit 0 ;; esac
        echo "fatal error: nothing works here"; exit 1
    """)  # fmt: skip
    env = {
        **os.environ,
        "CXX": str(cxx),
        "SDAN_FAST_SKIP_CUDA": "1",
        "SDAN_FAST_BUILD_DIR": str(tmp_path / "b"),
    }
    built = extensions.build_all(root, env)
    assert built["cpu"].file is None
    assert "cannot build even an empty module" in built["cpu"].info["reason"]
    assert "nothing works here" in built["cpu"].info["reason"]
    assert built["cuda"].info["reason"].startswith("SDAN_FAST_SKIP_CUDA was set")


@linux_only
def test_an_error_in_our_code_is_loud(tmp_path: Path) -> None:
    if isinstance(reason := toolkit.find_compiler(), toolkit.Missing):
        pytest.skip(reason.reason)
    root = tiny_tree(tmp_path)
    (root / "csrc/cpu/broken.cpp").write_text("int f() { return undeclared; }\n", encoding="utf-8")
    env = {**os.environ, "SDAN_FAST_SKIP_CUDA": "1", "SDAN_FAST_BUILD_DIR": str(tmp_path / "b")}
    with pytest.raises(compiling.CompileError, match="_C_cpu does not compile") as error:
        extensions.build_all(root, env)
    assert "undeclared" in error.value.output


def test_skips_are_honoured(tmp_path: Path) -> None:
    root = tiny_tree(tmp_path)
    built = extensions.build_all(root, {"SDAN_FAST_SKIP_CPU": "1", "SDAN_FAST_SKIP_CUDA": "true"})
    for kind in KINDS:
        assert built[kind].file is None
    if sys.platform == "linux":
        nothing = extensions.build_all(
            root, {"SDAN_FAST_SKIP_CPU": "0", "SDAN_FAST_SKIP_CUDA": "no", "PATH": ""}
        )
        for kind in KINDS:
            assert "no C++ compiler" in nothing[kind].info["reason"]


# --- installs -----------------------------------------------------------------------------------------------


def copy_of_the_tree(target: Path) -> Path:
    """What a source distribution holds, without anything built."""
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "*.egg-info")
    for name in ("sdan_fast", "kernels", "csrc", "build_tools"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target / name)
    return target


@linux_only
def test_metadata_touches_no_compiler(tmp_path: Path) -> None:
    """pip asks for metadata on many occasions (a resolver's dry run, for one); nvcc takes seconds."""
    tree = copy_of_the_tree(tmp_path / "tree")
    called = tmp_path / "called"
    for name in ("nvcc", "g++", "c++", "clang++"):
        script(tmp_path / "bin" / name, f'echo {name} "$@" >> "{called}"\nexit 1\n')
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    for hook in (
        "prepare_metadata_for_build_wheel",
        "prepare_metadata_for_build_editable",
        "get_requires_for_build_wheel",
    ):
        argument = "" if "requires" in hook else repr(str(tmp_path))
        code = f"import setuptools.build_meta as b; print(b.{hook}({argument}))"
        subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, check=True, capture_output=True)
    metadata = next(tmp_path.glob("*.dist-info")) / "METADATA"
    assert "Name: sdan-fast" in metadata.read_text(encoding="utf-8")
    assert not called.exists(), called.read_text(encoding="utf-8")
    # The recorders do record: looking for a toolkit calls the first nvcc of that PATH.
    toolkit.find_cuda({"PATH": env["PATH"]}, system_roots=[], site_packages=[])
    assert "nvcc" in called.read_text(encoding="utf-8")


# `make` names one build folder for all; copies of the tree, built at the same time, would overwrite each other's there.
BUILT_IN_THE_TREE = {"SDAN_FAST_BUILD_DIR": ""}


def install(tree: Path, target: Path, env: dict[str, str]) -> dict[str, dict]:
    """pip install into a folder, as a user would, and the build info of the result."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
               "--target", str(target), str(tree)]  # fmt: skip
    env = {**env, **BUILT_IN_THE_TREE}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return json.loads((target / "sdan_fast" / extensions.BUILD_INFO).read_text(encoding="utf-8"))


def without(*names: str) -> dict[str, str]:
    """The environment with only those folders on PATH, as links, that hold no tool of these names."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CUDA_HOME", "CUDA_PATH", "CXX", "CC")
    }
    folders = [folder for folder in env["PATH"].split(os.pathsep) if folder]
    keep = [
        folder for folder in folders if not any(os.access(Path(folder) / name, os.X_OK) for name in names)
    ]
    return {**env, "PATH": os.pathsep.join(keep), "SDAN_FAST_CUDA_ROOTS": ""}


# An editable install of the checkout would lend its modules to the package under test, so its finder goes
# first.
USE_WITHOUT_KERNELS = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch, sdan_fast
from sdan_fast import functional as F
a, b = torch.randn(2, 1, 4, 5, 6).unbind(0)
assert torch.equal(F.star(a, b), torch.nn.functional.gelu(a) * b)
import sdan_fast.kernels
told = {line.name: line for line in sdan_fast.status()}
assert not told["cpu"].available and "no C++ compiler was found on PATH" in told["cpu"].reason, told["cpu"]
print("used")
"""


@pytest.mark.slow
@linux_only
def test_install_without_any_compiler(tmp_path: Path) -> None:
    tree, target = copy_of_the_tree(tmp_path / "tree"), tmp_path / "site"
    info = install(tree, target, without("g++", "c++", "clang++", "nvcc"))
    for kind in KINDS:
        assert info[kind]["built"] is False
        assert "no C++ compiler was found on PATH" in info[kind]["reason"]
    assert not list(target.glob("sdan_fast/*.so"))
    env = {**os.environ, "PYTHONPATH": str(target)}
    code = (
        USE_WITHOUT_KERNELS + f"assert sdan_fast.__file__.startswith({str(target)!r}), sdan_fast.__file__\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "used", done.stderr


@pytest.mark.slow
@linux_only
def test_install_without_nvcc(tmp_path: Path) -> None:
    compiler = toolkit.find_compiler()
    if isinstance(compiler, toolkit.Missing):
        pytest.skip(compiler.reason)
    tree, target = copy_of_the_tree(tmp_path / "tree"), tmp_path / "site"
    # A module that compiles in a second shows the same as the whole one.
    shutil.rmtree(tree / "csrc/cpu")
    (tree / "csrc/cpu").mkdir()
    (tree / "csrc/cpu/module.cpp").write_text(TINY_MODULE, encoding="utf-8")
    info = install(tree, target, {**without("nvcc"), "CXX": compiler.command[0]})
    assert info["cpu"]["built"] is True
    assert (target / "sdan_fast" / f"_C_cpu{extensions.SUFFIX}").is_file()
    assert info["cuda"]["built"] is False
    assert info["cuda"]["reason"] == "no usable CUDA toolkit was found: no nvcc on PATH"


@pytest.mark.slow
@linux_only
def test_install_fails_on_an_error_in_our_code(tmp_path: Path) -> None:
    if isinstance(reason := toolkit.find_compiler(), toolkit.Missing):
        pytest.skip(reason.reason)
    tree = copy_of_the_tree(tmp_path / "tree")
    for path in [*tree.glob("csrc/cpu/*.cpp"), *tree.glob("csrc/cpu/isa/*.cpp")]:
        path.unlink()
    (tree / "csrc/cpu/module.cpp").write_text("#error planted\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
               "--target", str(tmp_path / "site"), str(tree)]  # fmt: skip
    env = {**os.environ, **BUILT_IN_THE_TREE, "SDAN_FAST_SKIP_CUDA": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode != 0
    assert "#error planted" in done.stdout
    assert "_C_cpu does not compile" in done.stdout
