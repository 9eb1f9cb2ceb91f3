"""`sdan-fast train`: train SDAN on a folder of pictures, alone or under torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from PIL import Image
from torch import Tensor

from sdan_fast import use_backend
from sdan_fast.models import SDAN
from sdan_fast.train import DivergedError, Progress, Settings, TrainingError
from sdan_fast.train import train as run

from . import terminal
from .upscale import PictureError, read_picture

_LOG = "log.jsonl"


def train(
    pictures: Annotated[
        Path,
        typer.Argument(
            metavar="PICTURES", help="A folder of pictures in high resolution, or one.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run: weights, state, log.", metavar="FOLDER")
    ] = Path("train_output"),
    validate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Pictures, or folders of them, to measure PSNR by; may be repeated.", metavar="PATH"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    weights: Annotated[
        Path | None,
        typer.Option(help="First weights, a safetensors file, instead of random ones.", metavar="FILE"),
    ] = None,
    scale: Annotated[int, typer.Option(help="How much larger the result is.", min=1)] = 4,
    channels: Annotated[int, typer.Option(help="Of the network.", min=2)] = 56,
    blocks: Annotated[int, typer.Option(help="Of the network.", min=1)] = 8,
    groups: Annotated[int, typer.Option("--groups", help="Branches of MM-LKA.", min=1, max=4)] = 2,
    patch: Annotated[int, typer.Option(help="Side of a low resolution patch, in pixels.", min=1)] = 64,
    batch: Annotated[int, typer.Option(help="Patches a step, of each process.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="In all.", min=1)] = 100_000,
    every: Annotated[int, typer.Option(help="Steps between two validations and savings.", min=1)] = 1000,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Of the first step; it falls along half a cosine.")
    ] = 5e-4,
    ema: Annotated[float, typer.Option(help="How much of the averaged weights a step keeps.")] = 0.999,
    seed: Annotated[int, typer.Option("--seed", help="Of first weights and patches.", min=0)] = 0,
    autocast: Annotated[bool, typer.Option("--autocast", help="Multiply in bfloat16.")] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run the network through torch.compile.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Who runs the ops.", metavar="BACKEND")] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.", metavar="DEVICE")
    ] = "auto",
) -> None:
    """Train SDAN on pictures; the low resolution is made of them, bicubic.

    The folder of the run gets the averaged weights (model.safetensors, for `sdan-fast upscale`), the state to go on
    from (state.pt) and log.jsonl. Ctrl-C loses what came after the last saving. Under torchrun every process takes
    its own patches, and gradients are averaged. All pictures stay in memory, about 3 bytes a pixel.
    """
    terminal.require_backend(backend)
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"must be auto, cpu or cuda, and it is {device!r}", param_hint="--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        terminal.fail("torch sees no GPU")
    settings = Settings(
        scale, channels, blocks, groups, patch, batch, steps, learning_rate, ema, seed, autocast, compile
    )
    try:
        start = None if weights is None else SDAN.from_checkpoint(weights, dtype=torch.float32)
        tensors = _read([pictures])
        held_out = _read(validate or [])
        with _processes(device) as (place, first), use_backend(backend):
            if first:
                typer.echo(f"{len(tensors)} pictures, {len(held_out)} to measure by, on {place}: {out}")
            with terminal.progress() as bar:
                task = bar.add_task("training", total=steps, visible=first)

                def on_step(progress: Progress) -> None:
                    bar.update(task, completed=progress.step, description=f"loss {progress.loss:.4f}")
                    if progress.saved:
                        _log(out, progress, steps)

                run(
                    settings, tensors, out, validation=held_out, every=every, resume=resume, start=start, device=place,
                    on_step=on_step,
                )  # fmt: skip
    except DivergedError as error:
        terminal.fail(str(error), terminal.FAILED)
    except (TrainingError, PictureError, OSError, ValueError) as error:
        terminal.fail(str(error))


def _read(paths: list[Path]) -> list[Tensor]:
    """Every picture of these files and folders, as `train` takes them."""
    found = []
    known = Image.registered_extensions()
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
            if not files:
                raise PictureError(f"the folder {path} holds no pictures")
        for file in files:
            found.append((read_picture(file).rgb * 255).round().to(torch.uint8))
    return found


@contextmanager
def _processes(device: str) -> Iterator[tuple[torch.device, bool]]:
    """(this process's device, whether it is the first one), joined with the others if torchrun started it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield torch.device(device), True
        return
    place = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device == "cuda"
        else torch.device(device)
    )
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield place, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _log(out: Path, progress: Progress, steps: int) -> None:
    """One line for a person, one for a program."""
    psnr = "" if progress.psnr is None else f", PSNR {progress.psnr:.2f} dB"
    typer.echo(
        f"step {progress.step} of {steps}: loss {progress.loss:.4f}{psnr}, {progress.patches_per_second:.1f} patches/s"
    )
    with (out / _LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(progress)) + "\n")
