"""Executes the PTX of the CUDA C++ kernels' launches in SDAN's own calls, and tabulates what they do.

Run as a module it is the child process that records (recorder.py says why); `compute` and `launched` are what others
call.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import arguments, counts_table, recorder, workload
from .counts import Counts, count, interpreter, interpreter_hash
from .counts_table import COLUMNS, IDENTITY, Counted
from .modelled_time import EagerStep, EagerSteps, on_meta
from .table import Row, Table, read
from .tools import demangle, extract, version_of

COUNTED = 90  # a developer's build without a GPU makes PTX for it
HEAD = (
    "What the CUDA C++ kernels do in SDAN's own calls: the PTX of the build, executed block by block; docs/inspect.md",
    "explains the columns. Times are modelled, not measured. Written by: sdan-fast inspect cuda --update",
)


def ptx_files(module: Path) -> tuple[str, list[bytes]]:
    """(architecture, PTX files) of a build: those for sm_90 where it has them, else of its newest architecture."""
    found: dict[int, list[bytes]] = {}
    for name, raw in extract("ptx", "all", module).items():
        found.setdefault(int(re.findall(r"sm_(\d+)", name)[0]), []).append(raw)
    if not found:
        return "none", []
    arch = COUNTED if COUNTED in found else max(found)
    return str(arch), found[arch]


def toolchain(module: Path) -> dict[str, str]:
    """The versions that the counts depend on: nvcc, and for which architecture it made PTX."""
    return {"nvcc": version_of("nvcc"), "ptx": ptx_files(module)[0]}


def ptx_of_kernels(module: Path) -> dict[str, str]:
    """The PTX of each kernel, by mangled name: its file without the other kernels and without line tables."""
    found: dict[str, str] = {}
    for raw in ptx_files(module)[1]:
        text = re.sub(r"^\s*\.(?:loc|file)\s[^\n]*\n", "", raw.decode().replace("\0", ""), flags=re.M)
        text = text[: text.find(".section")] if ".section" in text else text
        entries = list(
            re.finditer(r"^(?:\.visible |\.weak )*\.entry (\w+)\(.*?^\}\n", text, flags=re.M | re.S)
        )
        for entry in entries:
            others = text
            for other in reversed(entries):
                if other is not entry:
                    others = others[: other.start()] + others[other.end() :]
            found[entry[1]] = others
    return found


def calls() -> Iterator[tuple[workload.Case, bool]]:
    """(call, backward too): as for the Triton kernels, but of patches forward, and of float32 NCHW forward, and of what
    has weight gradients of its own both ways.
    """
    import torch

    from .triton_counts import calls

    for case in calls():
        if case.dtype != torch.float32:
            yield case, case.shape[0] == workload.PICTURE[0]
        elif case.layout == "nchw":
            yield case, case.op == "depthwise_conv2d"


def passes() -> Iterator[tuple[workload.Case, str, list[bool] | None, Callable[[], Any]]]:
    """(case, name of the pass, output mask or None, call) of everything that is counted and has a kernel."""
    for case, backward in calls():
        yield from passes_of(case, backward)


def passes_of(
    case: workload.Case, backward: bool
) -> Iterator[tuple[workload.Case, str, Any, Callable[[], Any]]]:
    """The passes of one call that have CUDA C++ kernels."""
    import torch

    from sdan_fast.ops import OPS

    op = OPS[case.op]

    def has(name: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"sdan_fast::{name}.cuda_host", "CPU")

    if not has(case.op):
        return
    args, kwargs = case.make()
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # straight to the kernel, past autograd
    yield case, "forward", None, lambda: op.overloads["cuda_host"].redispatch(here, *args, **kwargs)
    if backward and has(f"{case.op}_backward"):
        y = op.reference(*[on_meta(a) for a in args], **kwargs)
        gradient = arguments.image(*y.shape, dtype=case.dtype, fmt=workload.FORMATS[case.layout], seed=99)
        for name, mask in zip(("backward", "backward of x"), workload.masks(case.op, args)):
            yield case, name, mask, functools.partial(
                op.backward_overloads["cuda_host"].redispatch, here, gradient, *args, **kwargs, output_mask=mask
            )  # fmt: skip


_DECLARED = re.compile(r"\.param\s[^\n]*")
_LOADED = re.compile(r"ld\.param\.(?:v(\d)\.)?[a-z]+(\d+)\s[^\n]*\[(\w+)(?:\+(\d+))?\]")


def read_bytes(ptx: str, name: str, size: int) -> bytes:
    """A mask of a parameter's bytes, 255 where the kernel may read one: what a structure has between its members, and
    members that only the host reads, change nothing."""
    body = _DECLARED.sub("", ptx)
    loads = [load for load in _LOADED.finditer(body) if load[3] == name]
    if len(loads) < len(re.findall(rf"\b{name}\b", body)):  # its address is taken: anything may be read
        return b"\xff" * size
    mask = bytearray(size)
    for load in loads:
        width, at = int(load[1] or 1) * int(load[2]) // 8, int(load[4] or 0)
        mask[at : at + width] = b"\xff" * width
    return bytes(mask)


class Executor:
    """Turns recorded launches into what the PTX interpreter takes."""

    def __init__(self, recording: recorder.Recorder, ptx: dict[str, str]) -> None:
        self.recording, self.ptx = recording, ptx
        self._parameters: dict[str, list[tuple[str, int, int, str]]] = {}
        self._read: dict[str, list[bytes]] = {}

    def parameters(self, kernel: str) -> list[tuple[str, int, int, str]]:
        """(name, offset, size, type) of a kernel's parameters."""
        if kernel not in self._parameters:
            self._parameters[kernel] = interpreter().Parser(self.ptx[kernel]).kernel(kernel).params
        return self._parameters[kernel]

    def read(self, kernel: str) -> list[bytes]:
        """Of each parameter of a kernel, the bytes that it may read."""
        if kernel not in self._read:
            ptx = self.ptx[kernel]
            self._read[kernel] = [read_bytes(ptx, name, size) for name, _, size, _ in self.parameters(kernel)]
        return self._read[kernel]

    def memory(self, pointer: int) -> Any:
        """The memory from a pointer to the end of its tensor as NumPy bytes; None if it points to none."""
        import ctypes

        import numpy as np

        found = self.recording.allocation(pointer)
        if found is None:
            return None
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * found[1]).from_address(found[0]))
        return whole[pointer - found[0] :]

    def values(self, launch: recorder.CudaLaunch) -> tuple[list[Any], list[str], dict[str, float]]:
        """(arguments, their names, bytes of the tensors among them)."""
        values: list[Any] = []
        names: list[str] = []
        sizes: dict[str, float] = {}
        parts: list[tuple[int, str]] = []  # (address, name)
        for i, (_, _, size, kind) in enumerate(self.parameters(launch.kernel)):
            raw, name = launch.value(i, size), f"p{i}"
            names.append(name)
            if size == 8 and (array := self.memory(int.from_bytes(raw, "little"))) is not None:
                values.append(array)
                parts.append((array.ctypes.data, name))
                sizes[name] = float(array.size)
                continue
            pointers = {}
            for at in range(0, size - 7, 8) if kind == "b8" else ():
                array = self.memory(int.from_bytes(raw[at : at + 8], "little"))
                if array is not None:
                    pointers[at] = array
                    parts.append((array.ctypes.data, f"{name}+{at}"))
                    sizes[f"{name}+{at}"] = float(array.size)
            values.append(interpreter().Struct(raw, pointers) if pointers else raw)
        # Two that lie in the same tensor both end with it: what is behind the second is the second's alone.
        parts.sort()
        for (at, name), (following, _) in itertools.pairwise(parts):
            sizes[name] = min(sizes[name], float(following - at))
        return values, names, sizes

    def key(self, launch: recorder.CudaLaunch) -> str:
        """A hash of all that a launch's counts depend on: its PTX, its grid, its arguments but for tensors' values."""
        parts: list[Any] = [
            self.ptx[launch.kernel],
            launch.grid,
            launch.block,
            launch.shared,
            interpreter_hash(),
        ]
        for value, mask in zip(self.values(launch)[0], self.read(launch.kernel), strict=True):
            if hasattr(value, "size"):
                parts.append((value.size, value.ctypes.data % 64))
                continue
            masked = bytearray(a & b for a, b in zip(getattr(value, "raw", value), mask, strict=True))
            for at, array in getattr(value, "pointers", {}).items():
                if any(mask[at : at + 8]):
                    masked[at : at + 8] = bytes(8)
                    parts.append((array.size, array.ctypes.data % 64))
            parts.append(bytes(masked))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def execute(self, launch: recorder.CudaLaunch, *, whole: bool = False) -> Counts:
        """Run a launch's PTX on the tensors that it was given."""
        values, names, sizes = self.values(launch)
        return count(
            self.ptx[launch.kernel], launch.kernel, launch.grid, launch.block, values, launch.shared, names,
            sizes, whole=whole,
        )  # fmt: skip


class Sequence:
    """Everything that a pass launches, in order: our kernels, and what is left to PyTorch's."""

    def __init__(
        self, executor: Executor, call: Callable[[], Any], make: Callable[[recorder.CudaLaunch], Any]
    ) -> None:
        self.entries: list[Any] = []
        steps = EagerSteps(skip=True)

        def note(launch: recorder.CudaLaunch) -> None:
            self._take_over(steps)
            self.entries.append(make(launch))

        with steps:
            executor.recording.record(call, note)
        self._take_over(steps)

    def _take_over(self, steps: EagerSteps) -> None:
        # Conversions are the host build's alone: it has no product of 16-bit matrices into a float32 one.
        self.entries += [step for step in steps.steps if step.name != "_to_copy"]
        steps.steps = []


def _count_all(committed: dict[str, str], only: str, rank: int, of: int) -> dict[str, Any]:
    """Rows of counts by pass, and which passes are stale; `committed`: keys by identity, whose rows need no execution.

    Every `of`-th pass is executed if it needs to be, from the one of number `rank`; the others' are left out. All
    passes have a number, needed or not: the processes need not agree on which are.
    """
    library, _ = recorder.libraries()
    executor = Executor(
        recorder.Recorder(library), ptx_of_kernels(recorder.build_folder() / "_C_cuda.abi3.so")
    )
    short = demangle(list(executor.ptx))
    rows: dict[str, list[Any]] = {}
    stale: list[str] = []
    executed = 0
    with arguments.blank():
        for number, (case, name, mask, call) in enumerate(passes()):
            title = f"{case.name} {name}"
            if only not in title:
                continue
            seen = [
                (e.name, f"{e.bytes} {e.multiply_adds}") if isinstance(e, EagerStep) else e
                for e in Sequence(executor, call, lambda la: (short[la.kernel], executor.key(la))).entries
            ]
            at = ["|".join((kernel, title, str(i))) for i, (kernel, _) in enumerate(seen)]
            if all(committed.get(a) == key for a, (_, key) in zip(at, seen)):
                rows[title] = at
                continue
            stale.append(title)
            if number % of != rank:
                continue
            print(title, file=sys.stderr, flush=True)
            counts = Sequence(executor, call, executor.execute).entries
            executed += sum(isinstance(c, Counts) for c in counts)
            counted = [Counted(kernel, c, key) for (kernel, key), c in zip(seen, counts, strict=True)]
            rows[title] = counts_table.rows_of(title, counted, counts_table.needed_work(case, mask))
    return {"rows": rows, "stale": stale, "executed": executed}


def _note(found: dict[tuple[str, int, int], str], title: str, launch: recorder.CudaLaunch) -> None:
    found.setdefault((launch.kernel, math.prod(launch.block), launch.shared), title)


def _record_all() -> list[Any]:
    """(mangled kernel, threads, dynamic shared memory, call) of every launch of the workload."""
    import torch

    library, _ = recorder.libraries()
    recording = recorder.Recorder(library)
    found: dict[tuple[str, int, int], str] = {}
    with arguments.blank():
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for layout in workload.FORMATS:
                cases = [
                    *workload.own_cases(dtype, layout, workload.PICTURE),
                    *workload.other_cases(dtype, layout),
                ]
                for case in cases:
                    for _, name, _, call in passes_of(case, True):
                        title = f"{case.name} {name}"
                        with EagerSteps(skip=True):
                            recording.record(call, functools.partial(_note, found, title))
    return [[*key, title] for key, title in found.items()]


def _verify_all(only: str) -> list[dict[str, Any]]:
    """Small calls of every op, their launches' PTX executed whole: the largest error over the allowed one, each."""
    from sdan_fast.ops import OPS

    library, _ = recorder.libraries()
    executor = Executor(
        recorder.Recorder(library), ptx_of_kernels(recorder.build_folder() / "_C_cuda.abi3.so")
    )
    verified = []
    for case in workload.small_cases():
        for _, name, mask, call in passes_of(case, True):
            title = f"{case.name} {name}"
            if not re.search(only, title):
                continue
            launches: list[str] = []

            def execute(launch: recorder.CudaLaunch, seen: list[str] = launches) -> None:
                executor.execute(launch, whole=True)
                seen.append(launch.kernel)

            got = executor.recording.record(call, execute)
            args, kwargs = case.make()
            op = OPS[case.op]
            shares = [
                error_over_bound(*t)
                for t in zip(
                    *(_results(op, a, kwargs, case, mask, got) for a in (None, args, _doubled(args)))
                )
            ]
            verified.append({"call": title, "kernels": launches, "share": max(shares)})
    return verified


def _doubled(value: Any) -> Any:
    if isinstance(value, list):
        return [_doubled(v) for v in value]
    return value.double() if hasattr(value, "double") else value


def _results(
    op: Any, args: Any, kwargs: Any, case: workload.Case, mask: list[bool] | None, got: Any
) -> list[Any]:
    """The results of the reference for these arguments; those of the kernels where there are none."""
    if args is None:
        return [got] if mask is None else list(got)
    if mask is None:
        return [op.reference(*args, **kwargs)]
    y = op.reference(*args, **kwargs)
    gradient = arguments.image(*y.shape, dtype=case.dtype, fmt=workload.FORMATS[case.layout], seed=99).to(
        y.dtype
    )
    results = op.reference_backward(gradient, *args, **kwargs, output_mask=mask)
    return [t for t, wanted in zip(results, mask, strict=True) if wanted and t is not None]


def error_over_bound(got: Any, eager: Any, exact: Any) -> float:
    """max|err| over the project's bound, 2 max|eager's err| + 2 eps max|exact|; infinite for what is not finite."""
    import torch

    if got.shape != exact.shape or not torch.isfinite(got).all():
        return math.inf
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item()
    allowed += 2 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    return error / allowed if allowed else math.inf if error else 0.0


def verify(only: str = "") -> list[dict[str, Any]]:
    """Whole ops, their launches' PTX executed on small inputs: {call, kernels, share of the error bound} of each."""
    return json.loads(recorder.run_child("", "verify", only))


def launched(major: int = 9) -> list[tuple[str, int, int, str]]:
    """(mangled kernel, threads, dynamic shared memory, call) of every launch of the workload on such a GPU."""
    return [tuple(entry) for entry in json.loads(recorder.run_child("", "launches", major=major))]


def _keys(rows: Mapping[tuple[str, ...], Row]) -> str:
    return json.dumps({"|".join(at): row["key"] for at, row in rows.items()})


def stale_passes(committed: Table) -> tuple[list[str], list[str]]:
    """(passes whose launches are not those of the committed rows, committed rows of no launch); executes nothing."""
    answer = json.loads(recorder.run_child(_keys(committed.rows), "counts", "", "-1", "1"))
    kept = {row for rows in answer["rows"].values() for row in rows}
    gone = [at for at in committed.rows if "|".join(at) not in kept and at[1] not in answer["stale"]]
    return answer["stale"], ["|".join(at) for at in gone]


def compute(
    committed: Table | None, *, everything: bool = False, only: str = "", jobs: int = 1
) -> tuple[Table, int]:
    """(the table of this build, how many launches were executed, by `jobs` processes)."""
    here = toolchain(recorder.build_folder() / "_C_cuda.abi3.so")
    known = {} if committed is None or everything or committed.toolchain != here else committed.rows
    keys = _keys(known)
    recorder.libraries()  # once, before several processes want them

    def child(rank: int) -> dict[str, Any]:
        return json.loads(recorder.run_child(keys, "counts", only, str(rank), str(jobs)))

    with ThreadPoolExecutor(jobs) as pool:
        answers = list(pool.map(child, range(jobs)))
    table = Table(IDENTITY, COLUMNS, here)
    passes: dict[str, list[Any]] = {}
    for answer in answers:
        passes |= answer["rows"]
    for title in sorted(passes, key=_order_of_calls()):
        for row in passes[title]:
            table.add(known[tuple(row.split("|"))] if isinstance(row, str) else row)
    return table, sum(answer["executed"] for answer in answers)


def _order_of_calls() -> Callable[[str], int]:
    """The place of a pass in the workload, so that a table's order does not depend on who executed what."""
    names = []
    with arguments.blank():
        for case, _ in calls():
            names += [f"{case.name} {name}" for name in ("forward", "backward", "backward of x")]
    return {name: at for at, name in enumerate(names)}.__getitem__


def read_committed(path: Path) -> Table:
    """The committed counts."""
    return read(path, IDENTITY)


if __name__ == "__main__":
    if sys.argv[1] == "launches":
        print(json.dumps(_record_all()))
    elif sys.argv[1] == "verify":
        print(json.dumps(_verify_all(sys.argv[2])))
    else:
        which, rank, of = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        print(json.dumps(_count_all(json.loads(sys.stdin.read()), which, rank, of)))
