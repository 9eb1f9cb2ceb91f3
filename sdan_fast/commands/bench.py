"""`sdan-fast bench`: the ops and the whole network against every peer, next to the floor that this machine sets."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sdan_fast.bench import cases, measuring, model, peers, report, roofline, training

from . import terminal

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Time the ops or the whole network against every peer, verified first, next to this machine's floor.",
)

# What --quick makes of a run: a look whether everything works, no measurement to quote.
_QUICK_SECONDS = 3.0


class _Steps:
    """A bar where stderr is a terminal; elsewhere one line on stderr for each thing begun, and for long waits."""

    def __init__(self, bar: Any, total: int) -> None:
        self.bar, self.total, self.number = bar, total, 0
        self.task = bar.add_task("", total=total)
        self.plain = not terminal.console(stderr=True).is_terminal
        self.name = ""

    def begin(self, name: str) -> None:
        """The next of `total` things."""
        self.number += 1
        self.name = f"[{self.number}/{self.total}] {name}"
        self.bar.update(self.task, description=self.name, completed=self.number - 1)
        if self.plain:
            print(self.name, file=sys.stderr, flush=True)

    def step(self, what: str) -> None:
        """A part of it."""
        self.bar.update(self.task, description=f"{self.name}: {what}")

    def slow_step(self, what: str) -> None:
        """A part that takes long enough to be worth a line."""
        self.step(what)
        if self.plain and (not what.startswith("timing ") or "in turn" in what):
            print(f"  {what}", file=sys.stderr, flush=True)


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"must be auto, cpu or cuda, and it is {name!r}", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        terminal.fail("--device cuda needs a GPU, and torch sees none")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _dtypes(chosen: Sequence[str], option: str = "--dtype") -> list[str]:
    for name in chosen:
        if name not in cases.DTYPES:
            raise typer.BadParameter(
                f"must be one of {', '.join(cases.DTYPES)}, and it is {name!r}", param_hint=option
            )
    return list(dict.fromkeys(chosen))


def _configurations(chosen: Sequence[str]) -> list[model.Configuration]:
    for name in chosen:
        if name not in model.CONFIGURATIONS:
            raise typer.BadParameter(
                f"must be one of {', '.join(model.CONFIGURATIONS)}, and it is {name!r}", param_hint="--config"
            )
    return [model.CONFIGURATIONS[name] for name in chosen]


def _prepare(json_file: Path | None, device: str) -> None:
    """What all commands do first: full float32 everywhere, and a result file that can be written."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if json_file is not None:
        try:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            if json_file.is_dir() or not os.access(json_file.parent, os.W_OK):
                raise PermissionError(13, "it cannot be written")
        except OSError as error:
            terminal.fail(f"--json {json_file}: {error.strerror}")


def _save(json_file: Path | None, record: dict[str, Any]) -> None:
    if json_file is None:
        return
    try:
        report.write(json_file, record)
    except OSError as error:
        terminal.fail(f"cannot write {json_file}: {error.strerror}", terminal.FAILED)
    terminal.console().print(f"written: {json_file}", soft_wrap=True)


def _command() -> str:
    return shlex.join(["sdan-fast", *sys.argv[1:]])


DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, or auto: cuda where there is one.")
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write machine, versions, commit and all numbers to this file."
    ),
]


@app.command("ops", short_help="Every op: kernels, dilations, sizes, both layouts.")
def ops(
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="OP", help="Only this op; may be given several times.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size", metavar="HEIGHTxWIDTH", help="Picture size, HEIGHTxWIDTH; may be given several times."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help=f"{', '.join(cases.DTYPES)}; may be given several times."
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option("--layout", metavar="LAYOUT", help="Of our input: NCHW, channels_last, or both.")
    ] = "both",
    direction: Annotated[
        str,
        typer.Option(
            "--pass",
            metavar="PASS",
            help="forward, forward+backward, or both (backward at the smallest size).",
        ),
    ] = "both",
    full: Annotated[
        bool,
        typer.Option("--full", help="Kernels 3 to 35, dilations 1 to 6, sizes 16x16 to 1080p: hours."),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smallest size, forward, no Inductor: does it all work?")
    ] = False,
    inductor: Annotated[
        bool, typer.Option("--inductor/--no-inductor", help="Let Inductor compete; it compiles each case.")
    ] = True,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", metavar="SECONDS", min=0, help="About how long the timing may take, compiling apart."
        ),
    ] = 60.0,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Time every op against eager PyTorch in both layouts and Inductor.

    Each result is held against float64 first, and a wrong kernel gets no time. The contenders of a case are timed in
    turn, in rounds; the table has medians, the best peer, and shares of what this machine can do, measured in the
    same run: the bandwidth of torch.clone on the same tensor, and the rate of multiply-adds. Exit code 1 if a kernel
    is wrong.
    """
    place = _device(device)
    if layout not in (*cases.LAYOUTS, "both"):
        raise typer.BadParameter(
            f"must be NCHW, channels_last or both, and it is {layout!r}", param_hint="--layout"
        )
    if direction not in (*cases.PASSES, "both"):
        raise typer.BadParameter(
            f"must be forward, forward+backward or both, and it is {direction!r}", param_hint="--pass"
        )
    dtypes = _dtypes(dtype or (list(cases.DTYPES) if full else ["float32"]))
    sizes = [terminal.parse_size(text) for text in size or ()]
    if not sizes and place == "cuda" and not full:
        sizes = list(cases.GPU_SIZES)
    if quick:
        sizes, direction, inductor, seconds = sizes or [cases.SIZES[0]], "forward", False, _QUICK_SECONDS
    try:
        chosen = cases.cases(ops=op or None, sizes=sizes or None, dtypes=dtypes, full=full)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--op") from error
    jobs = cases.jobs(chosen, direction)
    layouts = list(cases.LAYOUTS) if layout == "both" else [layout]
    who = peers.names(place, layouts, inductor=("all" if full else "first") if inductor else "none")
    _prepare(json_file, place)

    rows: list[measuring.Row] = []
    limits: dict[str, roofline.Roofline] = {}
    clock = measuring.Clock(place)
    out = terminal.console()
    with terminal.progress() as bar:
        steps = _Steps(bar, len(jobs))
        steps.step("measuring this machine")
        for kind in dtypes:
            limits[kind] = roofline.measure(place, dtype=cases.DTYPES[kind])
        for case, passes in jobs:
            steps.begin(f"{case.name}, {passes}")
            rows += measuring.measure(
                case, passes, who,
                device=place, clock=clock, limits=limits[case.dtype], budget=seconds / len(jobs), on_step=steps.step,
            )  # fmt: skip
    _print_ops(out, rows, limits)
    _save(
        json_file,
        report.header(place, _command())
        | {
            "limits": {kind: report.limits_record(found) for kind, found in limits.items()},
            "rows": [row.record() for row in rows],
        },
    )
    wrong = [row for row in rows if row.ours and row.wrong]
    if wrong:
        terminal.fail(f"{len(wrong)} results are not within the bound of float64", terminal.FAILED)


def _print_ops(out: Any, rows: Sequence[measuring.Row], limits: dict[str, roofline.Roofline]) -> None:
    for kind in limits:
        grid = terminal.table(
            *report.OPS_COLUMNS,
            compact=True,
            title=f"Ops in {kind}: medians of rounds taken in turn",
            right=report.OPS_NUMBERS,
        )
        for group in report.by_case([row for row in rows if row.case.dtype == kind]):
            for line in report.ops_lines(group):
                grid.add_row(*line)
        out.print(grid)
        out.print(_sentence(kind, limits[kind]))
    out.print(
        "of clone: bytes that the case must move, each tensor once, over its time, as a share of torch.clone's rate on "
        "the same tensor. x floor: times the larger of those bytes at that rate and the multiply-adds at the FMA rate."
    )
    slower = report.losses(rows)
    timed = [row for row in rows if row.ours and row.figures]
    out.print(
        f"{len(timed) - len(slower)} of {len(timed)} of our runs are at least as fast as their best peer."
    )


def _sentence(dtype: str, found: roofline.Roofline) -> str:
    fma = f"FMA on registers {found.fma_rate / 1e9:.0f} GFLOP/s, " if found.fma_rate else ""
    return (
        f"This machine now: {fma}torch.mm in {dtype} {found.gemm_rate / 1e9:.0f} GFLOP/s, "
        f"torch.clone of a large tensor {found.clone_bandwidth / 1e9:.1f} GB/s."
    )


@app.command("model", short_help="The whole network, against every engine.")
def network(
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            metavar="NAME",
            help=f"Which network and input: {', '.join(model.CONFIGURATIONS)}; may be given several times.",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them, one after the other: an hour.")] = False,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="float32 and bfloat16 by default; may be given several times."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME",
            help=f"Only these peers besides eager PyTorch: {'; '.join(model.PEERS[1:])}; or none.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="64x64 against eager PyTorch alone: does it all work?")
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            metavar="SECONDS",
            min=0,
            help="About how long the timing of a network in a dtype may take.",
        ),
    ] = 40.0,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Time SDAN against eager PyTorch in both layouts, Inductor, ONNX Runtime and OpenVINO.

    Seeded weights, photographs as input. Each result is held against float64 first. Medians of rounds taken in turn;
    the floor is the multiply-adds at the FMA rate, measured in the same run. Also the peak memory of a forward, and
    how far bfloat16 is from float32. Peers that are not installed (pip install 'sdan-fast[peers]') are said to be
    absent. Exit code 1 if a backend is wrong.
    """
    place = _device(device)
    for name in peer or ():
        if name not in (*model.PEERS, "none"):
            raise typer.BadParameter(
                f"must be one of {'; '.join(model.PEERS)}; or none, and it is {name!r}", param_hint="--peer"
            )
    dtypes = _dtypes(dtype or ["float32", "bfloat16"])
    competing = ["eager", *(name for name in model.PEERS[1:] if not peer or name in peer)]
    chosen = _configurations(config or ["180x320"])
    if every:
        chosen = list(model.CONFIGURATIONS.values())
    if quick:
        chosen, competing, seconds = [model.CONFIGURATIONS["64x64"]], ["eager"], _QUICK_SECONDS
    _prepare(json_file, place)

    reports = []
    out = terminal.console()
    with terminal.progress() as bar:
        steps = _Steps(bar, len(chosen))
        for configuration in chosen:
            steps.begin(configuration.name)
            found = model.measure(
                configuration, dtypes=dtypes, device=place, peers=competing, everywhere=bool(peer or every),
                budget=seconds, with_memory=not quick, on_step=steps.slow_step,
            )  # fmt: skip
            reports.append(found)
            _print_model(out, found)
    _finish(json_file, place, reports)


@app.command("training", short_help="One training step of the network, against PyTorch.")
def step(
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            metavar="NAME",
            help=f"Which network and input: {', '.join(model.CONFIGURATIONS)}; batch-8, 8 x 64 x 64, if none is given.",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Of parameters and images: float32 by default; may be given several times.",
        ),
    ] = None,
    inductor: Annotated[
        bool, typer.Option("--inductor/--no-inductor", help="Let Inductor compete; it compiles for minutes.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="One block on 1 x 32 x 32: does it all work?")
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            metavar="SECONDS",
            min=0,
            help="About how long the timing of a network in a dtype may take.",
        ),
    ] = 60.0,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Time a forward and the gradients of all parameters against eager PyTorch in both layouts.

    The gradients of each are held against float64 first, as one vector. Medians of rounds taken in turn; the floor is
    three times the forward's multiply-adds, since each product has two gradients, at the FMA rate of the same run.
    Exit code 1 if a backend is wrong.
    """
    place = _device(device)
    dtypes = _dtypes(dtype or ["float32"])
    chosen = _configurations(config or ["batch-8"])
    if quick:
        chosen, seconds = [model.Configuration("quick", 32, 32, blocks=1)], _QUICK_SECONDS
    _prepare(json_file, place)

    reports = []
    out = terminal.console()
    with terminal.progress() as bar:
        steps = _Steps(bar, len(chosen))
        for configuration in chosen:
            steps.begin(configuration.name)
            found = training.measure(
                configuration, dtypes=dtypes, device=place, peers=training.PEERS if inductor else ["eager"],
                budget=seconds, on_step=steps.slow_step,
            )  # fmt: skip
            reports.append(found)
            _print_model(out, found, training=True)
    _finish(json_file, place, reports)


def _finish(json_file: Path | None, place: str, reports: Sequence[model.Report]) -> None:
    _save(json_file, report.header(place, _command()) | {"reports": [found.record() for found in reports]})
    wrong = [run for found in reports for run in found.runs if run.ours and run.wrong]
    if wrong:
        terminal.fail(
            f"not within the bound of float64: {', '.join(f'{run.title} {run.dtype}' for run in wrong)}",
            terminal.FAILED,
        )


def _print_model(out: Any, found: model.Report, *, training: bool = False) -> None:
    c = found.configuration
    rounds = [len(run.seconds) for run in found.runs if run.seconds]
    grid = terminal.table(
        *report.MODEL_COLUMNS,
        compact=True,
        title=(
            f"{'A training step of ' if training else ''}"
            f"SDAN x{c.scale}, {c.channels} channels, {c.blocks} blocks, groups={c.groups}, "
            f"on {c.batch} x {c.height} x {c.width}: medians of {min(rounds, default=0)} rounds or more, in turn"
        ),
        right=report.MODEL_NUMBERS,
    )
    for line in report.model_lines(found):
        grid.add_row(*line)
    out.print(grid)
    for dtype, limits in found.limits.items():
        out.print(_sentence(dtype, limits))
    work = f"{found.multiply_adds / 1e9:.1f} G multiply-adds"
    if training:
        out.print(f"{work} a step.\n")
    else:
        out.print(f"{work} a forward. PSNR: bfloat16 against float32, peak 1.\n")
