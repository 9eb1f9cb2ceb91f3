"""The training loop: L1 loss, Adam, cosine schedule, averaged weights, a state on disk to go on from.

The backend of every op is chosen as always; with `torchrun` the gradients of several processes are averaged.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sdan_fast.models import SDAN
from sdan_fast.models.files import replacing

from .metrics import psnr_y
from .patches import Patches, downscale

MODEL, STATE = "model.safetensors", "state.pt"


class TrainingError(RuntimeError):
    """A run that cannot begin or go on; the message is one sentence."""


class DivergedError(TrainingError):
    """The loss is no longer a number; what was saved before is still there."""


@dataclass(frozen=True)
class Settings:
    """What a run is. It goes on after a break only with the same settings.

    Attributes:
        scale, channels, blocks, groups: the network, as `SDAN` takes them.
        patch: side of a low resolution patch, in pixels.
        batch: patches a step, of each process.
        steps: in all.
        learning_rate: of the first step; it falls to nearly nothing along half a cosine.
        ema: how much of the averaged weights a step keeps; the first steps keep less, (1 + n) / (10 + n) of step n.
        seed: of the first weights and of everything that is drawn.
        autocast: multiply in bfloat16 where PyTorch's autocast would.
        compile: run the network through `torch.compile`.
    """

    scale: int = 4
    channels: int = 56
    blocks: int = 8
    groups: int = 2
    patch: int = 64
    batch: int = 16
    steps: int = 100_000
    learning_rate: float = 5e-4
    ema: float = 0.999
    seed: int = 0
    autocast: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        loss: mean absolute error of the last step's patches, in [0, 1].
        patches_per_second: of all processes, since the last report.
        psnr: mean of `psnr_y` over the validation pictures, in dB, by the averaged weights; None between validations
            and without such pictures.
        saved: whether the files were written just now.
    """

    step: int
    loss: float
    patches_per_second: float
    psnr: float | None = None
    saved: bool = False


def train(
    settings: Settings,
    pictures: Sequence[Tensor],
    folder: Path,
    *,
    validation: Sequence[Tensor] = (),
    every: int = 1000,
    resume: bool = False,
    start: SDAN | None = None,
    device: str | torch.device = "cpu",
    on_step: Callable[[Progress], object] = lambda _: None,
) -> SDAN:
    """Train an SDAN; the averaged weights.

    `folder` gets `model.safetensors`, the averaged weights for `SDAN.from_checkpoint`, and `state.pt`, all that a run
    needs to go on, every `every` steps and at the end, each whole or not at all. On one device the result of a run
    that went on is that of one without a break.

    Args:
        settings: what to do.
        pictures: (1, 3, H, W) uint8 each, RGB in high resolution; the low resolution is made of them (`downscale`).
        folder: must hold no run yet, unless `resume`.
        validation: more such pictures, to measure by.
        every: steps between two validations and savings.
        resume: go on with the run in `folder`.
        start: the first weights, instead of random ones.
        device: of this process.
        on_step: is called after every step, on the first process.

    Raises:
        ValueError: for settings or pictures that make no sense.
        TrainingError: if there is no such run, or it is another one.
        DivergedError: if the loss is no longer a number.
        OSError: if the files cannot be written.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    counts = {"batch": settings.batch, "steps": settings.steps, "patch": settings.patch, "every": every}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, and it is {count}")
    if not settings.learning_rate > 0 or not 0 <= settings.ema < 1:
        raise ValueError(
            f"learning_rate must be above 0 and ema in [0, 1), and they are {settings.learning_rate} and {settings.ema}"
        )
    torch.manual_seed(settings.seed)
    shape = (settings.scale, settings.channels, settings.blocks, settings.groups)
    model = SDAN(*shape)
    patches = Patches(pictures, scale=settings.scale, patch=settings.patch, seed=settings.seed * world + rank)
    pairs = [downscale(picture, settings.scale) for picture in validation]
    if start is not None:
        found = (start.scale, start.channels, len(start.blocks), start.groups)
        if found != shape:
            raise ValueError(
                f"start must be an SDAN of (scale, channels, blocks, groups) {shape}, and it is of {found}"
            )
        model.load_state_dict(start.state_dict())
    model.to(device)
    run = _Run(settings, model)
    if resume:
        run.load(folder / STATE, device)
    elif (folder / STATE).exists():
        raise TrainingError(f"{folder} already holds a run: choose another folder, or resume it")
    folder.mkdir(parents=True, exist_ok=True)

    network: Callable[[Tensor], Tensor] = model
    if world > 1:
        ids = [device] if torch.device(device).type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=ids)
    if settings.compile:
        network = torch.compile(network)
    since, done = time.perf_counter(), run.step
    while run.step < settings.steps:
        low, high = (t.to(device) for t in patches.batch(run.step, settings.batch))
        with torch.autocast(low.device.type, torch.bfloat16, enabled=settings.autocast):
            result = network(low)
        loss = nn.functional.l1_loss(result.float(), high)
        run.optimizer.zero_grad()
        loss.backward()
        value = float(loss.detach())
        if not value < float("inf"):
            raise DivergedError(f"the loss of step {run.step + 1} is {value}: try a lower learning rate")
        run.advance()
        save = run.step % every == 0 or run.step == settings.steps
        psnr = None
        if save and rank == 0:
            psnr = _validate(run.averaged, pairs, settings.scale) if pairs else None
            run.save(folder)
        if rank == 0:
            now = time.perf_counter()
            speed = (run.step - done) * settings.batch * world / max(now - since, 1e-9)
            if save:
                since, done = now, run.step
            on_step(Progress(run.step, value, speed, psnr, save))
        if save and world > 1:
            dist.barrier()
    return run.averaged


class _Run:
    """All that changes from step to step."""

    def __init__(self, settings: Settings, model: SDAN) -> None:
        self.settings = settings
        self.model = model
        self.ema = AveragedModel(model)
        self.optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, settings.steps, settings.learning_rate * 1e-3
        )
        self.step = 0

    @property
    def averaged(self) -> SDAN:
        return cast("SDAN", self.ema.module)

    def advance(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        keep = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(keep)
        self.ema.update_parameters(self.model)
        self.step += 1

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "schedule": self.schedule}

    def save(self, folder: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"step": self.step, "settings": dataclasses.asdict(self.settings)}
        self.averaged.save_checkpoint(folder / MODEL)
        with replacing(folder / STATE) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path, device: str | torch.device) -> None:
        if not path.exists():
            raise TrainingError(f"there is no run to resume: no file {path}")
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            settings = Settings(**state["settings"])
        except Exception as error:  # what a damaged file makes the unpickler raise is anybody's guess
            raise TrainingError(
                f"{path} is not the state of a run, or damaged ({type(error).__name__})"
            ) from error
        wanted, found = dataclasses.asdict(self.settings), dataclasses.asdict(settings)
        other = [
            f"{name} {found[name]} and not {wanted[name]}" for name in wanted if wanted[name] != found[name]
        ]
        if other:
            raise TrainingError(f"{path} is of a run with {', '.join(other)}")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = int(state["step"])


def _validate(model: SDAN, pairs: Sequence[tuple[Tensor, Tensor]], scale: int) -> float:
    """The mean PSNR over the pictures."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        values = [
            psnr_y(model(low.to(device).float() / 255), high.to(device).float() / 255, scale)
            for low, high in pairs
        ]
    return sum(values) / len(values)
