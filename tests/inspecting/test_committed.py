"""The committed tables are those of these sources: a regression fails, an improvement asks to be committed.

The default tests compile and execute only what changed, and a few rows besides, so that a table that somebody edited by
hand is found out. The slow ones compute a larger share anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip(
        "this process interprets kernels; compilation needs one without TRITON_INTERPRET",
        allow_module_level=True,
    )

from sdan_fast.inspecting import (
    committed,
    cuda_counts,
    cuda_table,
    recorder,
    report,
    triton_counts,
    triton_table,
)
from sdan_fast.inspecting.table import Table, compare, differing_tools, read, verdict
from sdan_fast.inspecting.tools import Unavailable, extract

TRITON_UPDATE, CUDA_UPDATE = "sdan-fast inspect triton --update", "sdan-fast inspect cuda --update"


def chosen(name: str, of: int) -> bool:
    """One in `of`, always the same ones."""
    return lot(name) % of == 0


def lot(name: str) -> int:
    """What decides between rows: an arbitrary number, always the same."""
    return zlib.crc32(name.encode())


def assert_same(committed_table: Table, fresh: Table, command: str, *, complete: bool = False) -> None:
    """Equal, with equal tools; with others, say so and leave the numbers alone."""
    other = differing_tools(committed_table, fresh.toolchain)
    if other:
        print("\n".join(other))  # shown with -s, and if a hard limit breaks
        return
    difference = verdict(compare(committed_table, fresh, complete=complete), command)
    assert difference is None, difference


# -- Triton ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton_rows():
    return read(committed.TRITON, triton_table.IDENTITY)


@pytest.fixture(scope="module")
def wanted():
    return triton_table.wanted_rows()


def test_every_row_of_the_triton_table_is_clean(triton_rows):
    assert len(triton_rows.rows) > 2000
    assert not [reason for r in triton_rows.rows.values() if (reason := triton_table.within_limits(r))]


def test_the_triton_table_is_of_these_kernels(triton_rows, wanted):
    """Every configuration that the heuristics emit has its row, made from the source that stands here now."""
    stale = [
        w.identity for w in wanted if triton_rows.rows.get(w.identity, {}).get("key") != w.specialized.key
    ]
    gone = set(triton_rows.rows) - {w.identity for w in wanted}
    assert not stale and not gone, (
        f"{len(stale)} rows of {committed.TRITON.name} are of other kernels, {len(gone)} of none: {TRITON_UPDATE}\n"
        + "\n".join(map(str, [*stale[:10], *sorted(gone)[:10]]))
    )


def test_some_triton_rows_compiled_again(triton_rows, wanted):
    """One in 240 of each kernel's. `sdan-fast inspect triton --check --recompute` compiles all, which takes hours.

    Of the branches those with a launch to themselves: Triton's compiler takes the cube of a kernel's length. The counts
    have others.
    """
    kernels: dict[str, list[triton_table.Wanted]] = {}
    for w in sorted(wanted, key=lambda w: lot("|".join(w.identity))):
        if len(w.specialized.constants.get("JOBS", ())) <= 1:
            kernels.setdefault(w.identity[0], []).append(w)
    assert kernels.keys() == {kernel for kernel, *_ in triton_rows.rows}
    rows = [w for of_kernel in kernels.values() for w in of_kernel[: -(-len(of_kernel) // 240)]]
    fresh = triton_table.compute(rows)  # one after the other: the cores are those of pytest's workers
    broken = [reason for r in fresh.rows.values() if (reason := triton_table.within_limits(r))]
    assert not broken, broken
    assert_same(triton_rows, fresh, TRITON_UPDATE)


def test_the_triton_counts_are_of_these_kernels():
    """And of this interpreter: the tests below execute what is of another, which is half an hour for all of them."""
    rows = read(committed.TRITON_COUNTS, triton_counts.IDENTITY).rows
    passes = triton_counts.kept_passes(rows)
    stale = [title for title, kept in passes.items() if kept is None]
    gone = {call for _, call, _ in rows} - passes.keys()
    assert not stale and not gone, (
        f"{len(stale)} passes of {committed.TRITON_COUNTS.name} are of other kernels or of another interpreter, "
        f"{len(gone)} of none: {TRITON_UPDATE}, of another interpreter {CUDA_UPDATE} too\n"
        + "\n".join([*stale[:10], *sorted(gone)[:10]])
    )


def counted_again(again, only=lambda call: True):
    """The committed counts with every pass whose kernels changed executed anew, and of the others those of `again`."""
    table = read(committed.TRITON_COUNTS, triton_counts.IDENTITY)
    kept = {at: row for at, row in table.rows.items() if not again(at[1])}
    fresh, executed = triton_counts.compute(
        Table(table.identity, table.columns, table.toolchain, kept), only=only
    )
    assert executed
    return table, fresh


def covering(rows):
    """Passes that have every op, and every kernel in both layouts, between them.

    Of few launches, and of branches those in float32, whose kernels are shorter: the compiler takes most of the time.
    """
    launched: dict[str, set[object]] = {}
    for kernel, call, _ in rows:
        launched.setdefault(call, {call.split()[0]}).add((kernel, " nhwc " in call))
    launches = Counter(call for _, call, _ in rows)
    long = {call for kernel, call, _ in rows if kernel.startswith("branches") and " bf16 " in call}
    shortest: dict[object, str] = {}
    for call in sorted(launched, key=lambda call: (launches[call], call in long, lot(call))):
        for what in launched[call]:
            shortest.setdefault(what, call)
    passes: set[str] = set()
    for what, call in sorted(shortest.items(), key=lambda found: (-launches[found[1]], lot(found[1]))):
        if not any(what in launched[known] for known in passes):
            passes.add(call)
    return passes


def test_some_triton_counts_executed_again():
    """The strips of one picture in bfloat16; a pass whose kernels changed counts as one to execute."""
    table, fresh = counted_again(
        lambda call: chosen(call, 4),
        lambda call: re.search(r"conv2d 11?x11? .*bf16 nchw 1x.* forward", call) is not None,
    )
    assert_same(table, fresh, TRITON_UPDATE)


def test_the_triton_counts_meet_their_targets():
    """30 % FMA in convolutions, full sectors but where it is said, strips that read once, no bank conflicts."""
    for row in read(committed.TRITON_COUNTS, triton_counts.IDENTITY).rows.values():
        kernel, call = row["kernel"], row["call"]
        # The attention's slices of 28 channels of 16 bits in channels_last: docs/triton.md.
        slices = " bf16 nhwc " in call and call.startswith("mm_lka")
        assert float(row["bank_conflicts"]) < 0.1, row
        assert slices or float(row["store_sectors"]) >= 0.85, row
        if kernel == "reduce_rows":  # loads partial sums, no activations
            continue
        convolution = kernel.startswith(("conv_", "branches_", "wgrad_"))
        if convolution:
            assert float(row["executed_fma"]) >= 0.3, row
        assert slices or float(row["best_load"]) >= 0.85, row
        if convolution and re.search(r"conv2d (1x\d+|\d+x1) |^strip_conv_chain", call):
            assert float(row["traffic"]) <= 1.15, row


@pytest.mark.slow
def test_triton_counts_are_of_these_kernels():
    again = covering(read(committed.TRITON_COUNTS, triton_counts.IDENTITY).rows)
    table, fresh = counted_again(again.__contains__)
    assert_same(table, fresh, TRITON_UPDATE, complete=True)


# -- CUDA C++ --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module():
    try:
        return recorder.build_folder() / "_C_cuda.abi3.so"
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def cuda_rows():
    return read(committed.CUDA, cuda_table.IDENTITY)


def test_every_row_of_the_cuda_table_is_clean(cuda_rows):
    assert not [reason for r in cuda_rows.rows.values() if (reason := cuda_table.within_limits(r))]
    assert any(r["of"] == "PyTorch" for r in cuda_rows.rows.values())


def check_archs(cuda_rows, archs):
    """Code that is the committed rows' keeps their figures, but for one kernel in 80, whose file is read anew."""
    same_tools = cuda_table.toolchain() == cuda_rows.toolchain
    known = {at: r for at, r in cuda_rows.rows.items() if same_tools and not chosen(f"{at[1]} {at[2]}", 80)}
    fresh = cuda_table.compute(archs, torch_too=False, known=known)
    broken = [reason for r in fresh.rows.values() if (reason := cuda_table.within_limits(r))]
    assert not broken, broken
    ours = {at: r for at, r in cuda_rows.rows.items() if r["of"] == "sdan_fast" and r["arch"] in archs}
    assert_same(
        Table(cuda_rows.identity, cuda_rows.columns, cuda_rows.toolchain, ours),
        fresh,
        CUDA_UPDATE,
        complete=True,
    )


def test_known_machine_code_is_not_disassembled(module, monkeypatch):
    arch = cuda_table.built_archs(module)[0]
    cubins = extract("elf", arch, module).values()
    cubin = min((c for c in cubins if cuda_table.machine_code(c)), key=len)
    fresh = cuda_table.figures_of(cubin, arch, {})
    known = {("sdan_fast", name, arch): row for _, name, row in fresh}
    disassembled = []
    monkeypatch.setattr(cuda_table, "kernels_of", lambda cubin: disassembled.append(cubin) or ())
    assert cuda_table.figures_of(cubin, arch, known) == fresh and fresh and not disassembled
    known[next(iter(known))] = {"key": "of other code"}
    cuda_table.figures_of(cubin, arch, known)
    assert disassembled == [cubin]


def test_the_cuda_table_is_of_this_build(cuda_rows, module):
    """sm_90, or the first architecture where another was built."""
    archs = cuda_table.built_archs(module)
    check_archs(cuda_rows, ["sm_90"] if "sm_90" in archs else archs[:1])


@pytest.mark.slow
def test_the_cuda_table_for_the_other_architectures(cuda_rows, module):
    """Of those that both the build and the committed table have; `make build` makes sm_90 alone."""
    committed_archs = {r["arch"] for r in cuda_rows.rows.values() if r["of"] == "sdan_fast"}
    archs = [a for a in cuda_table.built_archs(module) if a != "sm_90" and a in committed_archs]
    if archs:
        check_archs(cuda_rows, archs)


def test_the_cuda_counts_are_of_this_build(module):
    """And of this interpreter. Launches are recorded and not executed; that a figure is right the slow test sees."""
    table = read(committed.CUDA_COUNTS, cuda_counts.IDENTITY)
    if other := differing_tools(table, cuda_counts.toolchain(module)):
        pytest.skip("; ".join(other))
    stale, gone = cuda_counts.stale_passes(table)
    assert not stale and not gone, (
        f"{len(stale)} passes of {committed.CUDA_COUNTS.name} are of other kernels or of another interpreter, "
        f"{len(gone)} rows of none: {CUDA_UPDATE}\n" + "\n".join([*stale[:10], *gone[:10]])
    )


@pytest.mark.slow
def test_some_cuda_counts_executed_again(module):
    table = read(committed.CUDA_COUNTS, cuda_counts.IDENTITY)
    kept = Table(
        table.identity,
        table.columns,
        table.toolchain,
        {k: r for k, r in table.rows.items() if not chosen(k[1], 6)},
    )
    fresh, executed = cuda_counts.compute(kept)
    assert executed
    assert_same(table, fresh, CUDA_UPDATE, complete=True)


# -- the model -------------------------------------------------------------------------------------------------------


def test_the_page_of_modelled_times_is_generated():
    path = committed.FOLDER.parents[1] / "docs" / "gpu-model.md"
    assert path.read_text(encoding="utf-8") == report.page(), (
        "docs/gpu-model.md is not of the committed counts: sdan-fast inspect model --out docs/gpu-model.md"
    )


def test_the_page_of_measured_times_is_of_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "scripts" / "gpu_measured.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
