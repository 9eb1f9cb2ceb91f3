"""`sdan-fast demo`: SDAN on a real photograph, through eager PyTorch and the fused backends, checked and timed."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor

import sdan_fast
from sdan_fast import backends, use_backend
from sdan_fast.bench.roofline import Timing, interleaved, measure, multiply_adds, tensor_bytes
from sdan_fast.models import SDAN
from sdan_fast.models.files import replacing
from sdan_fast.models.fitted import fit_upsampler, seeded_sdan
from sdan_fast.modules import RSDAM

from . import machine, pictures, terminal
from .check import Agreement, agreement

_WHO = "Who runs what: the model is one sdan; its parts run where that is not fused, and in training"
_ROUNDS = 30  # at most; --seconds usually ends the timing before
_LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Runner:
    """One way to run the model: a backend and a memory layout."""

    backend: str
    layout: str
    model: SDAN
    x: Tensor
    agreement: Agreement | None = None
    timing: Timing | None = None
    output: Tensor | None = None

    @property
    def name(self) -> str:
        return (
            f"eager PyTorch, {self.layout}"
            if self.backend == "reference"
            else f"{self.backend}, {self.layout}"
        )

    @property
    def slug(self) -> str:
        return f"{self.backend}_{self.layout.lower()}"

    def __call__(self) -> Tensor:
        with use_backend(self.backend):
            return self.model(self.x)


def _weights(weights: Path | None, blocks: int) -> tuple[SDAN, str]:
    """The model, and one sentence that says what its weights are."""
    if weights is not None:
        try:
            model = SDAN.from_checkpoint(weights, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            terminal.fail(str(error))
        return model, f"The weights are those of {weights}."
    model = seeded_sdan(4, 56, blocks, 2)
    other = pictures.photograph("coffee")
    height, width = (side // 4 for side in other.shape[2:])
    with use_backend("reference"):
        fit_upsampler(model, pictures.resize(other, height, width), other)
    return model, (
        "No trained weights are public: these are random (seed 0), and only the last layer was fitted, in closed form, "
        "to another photograph. The picture proves the pipeline, not the network."
    )


def _explanations(model: SDAN, x: Tensor) -> dict[str, sdan_fast.backends.Explanation]:
    """For each op of the model, the choice of the backend in force for a call like those of the first block."""
    head = model.head.dw
    parameters = cast("RSDAM", model.blocks[0]).parameters_in_order()
    distillation, branches, gate, _, norm = parameters
    f = x.new_zeros(1, model.channels, *x.shape[2:])
    calls: dict[str, tuple[Any, ...]] = {
        "depthwise_conv2d": (f, head.weight, head.bias),
        "rsdam": (f, *parameters),
        "sdm": (f, *distillation),
        "star_conv": (f, *distillation[1][0]),
        "mm_lka": (f, branches, *gate),
        "layer_norm2d": (f, *norm),
    }
    with torch.no_grad():
        whole = {"sdan": sdan_fast.explain(model, x)}
    return whole | {op: sdan_fast.explain(op, *arguments) for op, arguments in calls.items()}


def _runners(model: SDAN, x: Tensor) -> tuple[list[Runner], dict[str, str]]:
    """Every way to run the model here, eager ones first, and for the backends that are not available, why."""
    refused = {line.name: line.reason for line in backends.status() if not line.available}
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    models = {"NCHW": (model, x), "channels_last": (last, x.contiguous(memory_format=torch.channels_last))}
    fused = [line.name for line in backends.status() if line.available and line.name != "reference"]
    return [
        Runner(backend, layout, *models[layout])
        for backend in ("reference", *fused, "auto")
        for layout in _LAYOUTS
    ], refused


def _check(runners: list[Runner], y64: Tensor, refused: dict[str, str], bar: Any) -> list[Runner]:
    """Run each once and hold it against float64; those that could run. The reasons of the others go into `refused`."""
    task = bar.add_task("checking against float64", total=len(runners))
    eager: dict[str, Tensor] = {}  # by layout; the eager runners come first
    ran = []
    for runner in runners:
        bar.advance(task)
        try:
            runner.output = runner()
        except RuntimeError as error:
            if "cannot run on the backend" not in str(error):
                raise
            refused[runner.backend] = str(error)
            continue
        yardstick = eager.setdefault(runner.layout, runner.output)
        runner.agreement = agreement(runner.output, yardstick, y64)
        ran.append(runner)
    bar.remove_task(task)
    return ran


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the pictures and demo.json.")
    ] = Path("demo_output"),
    size: Annotated[
        str, typer.Option("--size", metavar="HEIGHTxWIDTH", help="Input size, HEIGHTxWIDTH.")
    ] = "180x320",
    blocks: Annotated[
        int, typer.Option("--blocks", metavar="N", min=1, help="Blocks of the model; SDAN has 8.")
    ] = 8,
    photograph: Annotated[
        str,
        typer.Option(
            "--photograph",
            metavar="NAME",
            help=f"One that scikit-image ships: {', '.join(pictures.PHOTOGRAPHS)}.",
        ),
    ] = "chelsea",
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", "-w", metavar="FILE", help="A safetensors checkpoint; random weights without one."
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            "--seconds",
            metavar="SECONDS",
            min=0,
            help="About how long the timing may take; at least 3 rounds.",
        ),
    ] = 45.0,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, or auto: cuda where there is one.")
    ] = "auto",
) -> None:
    """Run SDAN on a real photograph through eager PyTorch and every fused backend, check and time them.

    Each result is held against float64 by the bound of `sdan-fast verify`, and the times are taken side by side,
    next to the floor that this machine's own speed sets. Exit code 1 if a backend is wrong.
    """
    height, width = terminal.parse_size(size)
    if photograph not in pictures.PHOTOGRAPHS:
        raise typer.BadParameter(
            f"must be one of {', '.join(pictures.PHOTOGRAPHS)}, and it is {photograph!r}"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be auto, cpu or cuda, and it is {device!r}", param_hint="--device")
    elif device == "cuda" and not torch.cuda.is_available():
        terminal.fail("--device cuda needs a GPU, and torch sees none")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        terminal.fail(f"cannot make the folder {out}: {error.strerror}")

    screen = terminal.console()
    with torch.no_grad(), terminal.progress() as bar:
        preparing = bar.add_task("preparing the model", total=None)
        model, about = _weights(weights, blocks)
        model = model.to(device)
        x = pictures.cover(pictures.photograph(photograph), height, width).to(device)
        runners, refused = _runners(model, x)
        bar.update(preparing, description="measuring this machine")
        roofline = measure(device)
        macs = _multiply_adds(model, x)
        bar.update(preparing, description="computing the float64 reference")
        exact = copy.deepcopy(model).double()
        with use_backend("reference"):
            y64 = exact(x.double())
        bar.remove_task(preparing)

        runners = _check(runners, y64, refused, bar)
        wrong = [r for r in runners if r.backend != "reference" and not (r.agreement and r.agreement.ok)]
        timed = [r for r in runners if r not in wrong]  # no time is printed for a wrong result
        _time(timed, budget, device, bar)

    floor = roofline.floor(macs, tensor_bytes(x, y64.float(), *model.parameters()))
    screen.print(
        f"SDAN x{model.scale}, {model.channels} channels, {len(model.blocks)} blocks, groups={model.groups}: "
        f"{photograph} {width} x {height} -> {width * model.scale} x {height * model.scale}, float32"
    )
    screen.print(about + "\n")
    _print_choices(screen, model, x, refused)
    _print_times(screen, runners, floor, macs, roofline)
    with use_backend("auto"):
        choices = _explanations(model, x)
    try:
        _write(out, x, runners, model.scale)
        record = {
            "when": machine.now(),
            "versions": machine.versions(),
            "machine": machine.describe(),
            "device": device,
            "model": {
                "scale": model.scale,
                "channels": model.channels,
                "blocks": len(model.blocks),
                "groups": model.groups,
                "weights": str(weights) if weights else "seed 0, last layer fitted",
            },
            "input": [height, width],
            "photograph": photograph,
            "multiply_adds": macs,
            "clone_bandwidth_bytes_per_second": roofline.clone_bandwidth,
            "gemm_operations_per_second": roofline.gemm_rate,
            "fma_operations_per_second": roofline.fma_rate,
            "floor_seconds": floor,
            "auto_chooses": {op: e.backend for op, e in choices.items()},
            "not_run": refused,
            "runs": [_record(runner) for runner in runners],
        }
        with replacing(out / "demo.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        terminal.fail(f"cannot write to {out}: {error.strerror}", terminal.FAILED)
    screen.print(f"\nPictures and demo.json are in {out}")
    if wrong:
        names = ", ".join(r.name for r in wrong)
        terminal.fail(f"not within the bound of float64: {names}", terminal.FAILED)


def _multiply_adds(model: SDAN, x: Tensor) -> int:
    """Of one forward, counted on fake tensors: nothing is computed."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, use_backend("reference"):
        fake = copy.deepcopy(model)
        fake_x = mode.from_tensor(x)
        return multiply_adds(lambda: fake(fake_x))


def _time(runners: list[Runner], budget: float, device: str, bar: Any) -> None:
    """Interleaved rounds within the budget; checking was the warm-up."""
    task = bar.add_task("timing (calls)", total=_ROUNDS * len(runners))
    timings = interleaved(
        {r.name: r for r in runners},
        rounds=_ROUNDS,
        warmup=0,
        budget=budget,
        device=device,
        on_call=lambda _: bar.advance(task),
    )
    for runner in runners:
        runner.timing = timings[runner.name]


def _print_choices(screen: Any, model: SDAN, x: Tensor, refused: dict[str, str]) -> None:
    grid = terminal.table(
        "op",
        "'auto' runs",
        "and not the others, because",
        title="Who runs what: the model is one sdan; its parts run where that is not fused, and in training",
    )
    with use_backend("auto"):
        for op, explanation in _explanations(model, x).items():
            reasons = {name: reason for name, reason in explanation.reasons.items() if name not in refused}
            why = "\n".join(f"{name}: {reason}" for name, reason in reasons.items())
            grid.add_row(op, explanation.backend or "nothing", why)
    screen.print(grid)
    for name, reason in refused.items():
        screen.print(f"{name} runs nothing here: {reason}")
    screen.print()


def _print_times(screen: Any, runners: list[Runner], floor: float, macs: int, roofline: Any) -> None:
    times = [r.timing.median for r in runners if r.timing]
    best_eager = min(r.timing.median for r in runners if r.timing and r.backend == "reference")
    grid = terminal.table(
        "run",
        "median ms",
        "x the best",
        "x the best eager",
        "x the floor",
        "error / bound",
        "verdict",
        right=("median ms", "x the best", "x the best eager", "x the floor", "error / bound"),
        title=f"Medians of {max(len(r.timing.seconds) for r in runners if r.timing)} interleaved rounds",
    )

    def columns(seconds: float) -> list[str]:
        milliseconds = f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.2f}"
        return [milliseconds, *(f"{seconds / peer:.2f}" for peer in (min(times), best_eager, floor))]

    for r in runners:
        assert r.agreement is not None
        verdict = (
            "ok" if r.agreement.ok else "PyTorch's own" if r.backend == "reference" else "WRONG, not timed"
        )
        share = f"{r.agreement.share:.2f}"
        if r.timing is None:
            grid.add_row(r.name, "-", "-", "-", "-", share, verdict)
            continue
        grid.add_row(r.name, *columns(r.timing.median), share, verdict)
    grid.add_row("floor of this machine", *columns(floor), "", "")
    screen.print(grid)
    screen.print(
        f"Floor: {macs / 1e9:.1f} G multiply-adds at {roofline.arithmetic_rate / 1e9:.0f} GFLOP/s, the rate of "
        f"{'multiply-adds on registers' if roofline.fma_rate > roofline.gemm_rate else 'torch.mm'} measured just now "
        f"(torch.mm {roofline.gemm_rate / 1e9:.0f} GFLOP/s, torch.clone {roofline.clone_bandwidth / 1e9:.1f} GB/s)."
    )
    screen.print(
        "Error / bound: max|error| over 2 max|eager's error in that layout| + 2 eps max|reference|, against float64."
    )


def _write(out: Path, x: Tensor, runners: list[Runner], scale: int) -> None:
    """The input, a bicubic enlargement, and what each backend made of it."""
    pictures.write_png(x, out / "input.png")
    pictures.write_png(pictures.resize(x, x.shape[2] * scale, x.shape[3] * scale), out / "bicubic.png")
    for runner in runners:
        assert runner.output is not None
        pictures.write_png(runner.output, out / f"sdan_{runner.slug}.png")


def _record(runner: Runner) -> dict[str, Any]:
    assert runner.agreement is not None
    return {
        "name": runner.name,
        "backend": runner.backend,
        "layout": runner.layout,
        "ok": runner.agreement.ok,
        "error": runner.agreement.error,
        "bound": runner.agreement.bound,
        "seconds": runner.timing.seconds if runner.timing else None,
        "median_seconds": runner.timing.median if runner.timing else None,
        "picture": f"sdan_{runner.slug}.png",
    }
