"""One training step of the network, a forward and the gradients of every parameter, against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sdan_fast import backends, use_backend
from sdan_fast.commands.check import gradient_agreement
from sdan_fast.models import SDAN
from sdan_fast.models.fitted import seeded_sdan

from . import roofline
from .cases import DTYPES, LAYOUTS
from .measuring import PEER_SLACK, Clock, race
from .model import Configuration, OnStep, Report, Run, cost, picture
from .peers import WRONG_16_BIT_GRADIENTS, Contender, backends_of, compiled
from .plain import PlainSDAN

PEERS = ("eager", "Inductor")

Step = Callable[[], Sequence[Tensor]]


def measure(
    c: Configuration,
    *,
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    peers: Sequence[str] = PEERS,
    rounds: int = 30,
    budget: float = 60.0,
    on_step: OnStep = lambda step: None,
) -> Report:
    """One configuration: every contender's gradients verified, then its steps timed in turn, dtype by dtype.

    The gradients are judged as one vector, by the bound of `sdan-fast verify`. The floor is three times the
    multiply-adds of a forward: each product has two gradients.

    Args:
        c: network and input.
        dtypes: names of `cases.DTYPES`, of parameters and images alike.
        device: "cpu" or "cuda".
        peers: which of `PEERS` compete; eager PyTorch must, as the yardstick of errors.
        rounds: at most, for each dtype.
        budget: seconds of timing for each dtype.
        on_step: told what is being done.
    """
    source, image = seeded_sdan(**c.model_settings), picture(c)
    report = Report(c, 3 * cost(source, image), {}, {}, [], False)
    on_step("float64")
    exact = _gradients(training_step(source, image, "float64", "NCHW", None, device)())
    for dtype in dtypes:
        torch._dynamo.reset()
        on_step(f"this machine's limits in {dtype}")
        limits = report.limits[dtype] = roofline.measure(device, dtype=DTYPES[dtype])
        report.floors[dtype] = limits.floor(report.multiply_adds, 0)
        runs = list(_contenders(source, image, dtype, device, peers))
        _verify(runs, exact, on_step)
        right = [run for run in runs if run.call is not None and not run.refused and not run.wrong]
        on_step(f"timing {dtype}, {len(right)} in turn")
        times = race(
            [run.call for run in right if run.call],
            Clock(device),
            rounds=rounds,
            budget=budget,
            least=3,
            on_call=lambda name: on_step(f"timing {name}"),
        )
        for run, seconds in zip(right, times, strict=True):
            run.seconds = seconds
        report.runs += runs
    for run in report.runs:
        run.call = None
    return report


def training_step(
    source: SDAN, image: Tensor, dtype: str, layout: str, backend: str | None, device: str, *, inductor: bool = False
) -> Step:  # fmt: skip
    """One forward and the gradients of every parameter; plain PyTorch if no backend is named."""
    kind = torch.float64 if dtype == "float64" else DTYPES[dtype]
    net = copy.deepcopy(source).to(device, kind).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    x = image.to(device, kind).contiguous(memory_format=LAYOUTS[layout])
    parameters = [p.requires_grad_() for p in net.parameters()]
    run: Callable[[Tensor], Tensor] = PlainSDAN(net.train()) if backend is None else net.train()
    if inductor:
        run = compiled(run)

    def step() -> Sequence[Tensor]:
        with use_backend(backend) if backend else contextlib.nullcontext():
            y = run(x)
        return (
            y.detach(),
            *torch.autograd.grad(y.to(torch.promote_types(kind, torch.float32)).square().mean(), parameters),
        )

    return step


def _contenders(source: SDAN, image: Tensor, dtype: str, device: str, peers: Sequence[str]) -> Iterator[Run]:
    """Everyone who takes steps in this dtype; who cannot comes with the reason."""
    step = functools.partial(training_step, source, image, dtype)
    missing = {line.name: line.reason for line in backends.status()}
    for name in backends_of(device):
        for layout in LAYOUTS:
            run = Run(name, layout, dtype, True, refused=missing[name])
            if not run.refused:
                run.call = Contender(name, layout, True, step(layout, name, device))
            yield run
    for name in peers:
        for layout in LAYOUTS if name == "eager" else ("NCHW",):
            run = Run(name, layout, dtype, False)
            if device == "cpu" and dtype != "float32" and layout == "channels_last":
                run.refused = WRONG_16_BIT_GRADIENTS
            else:
                run.call = Contender(
                    name, layout, False, step(layout, None, device, inductor=name == "Inductor")
                )
            yield run


def _verify(runs: Sequence[Run], exact: Sequence[Tensor], on_step: OnStep) -> None:
    """Have everyone take one step; what is not within its bound is wrong, and what cannot run says why."""
    yardstick: Sequence[Tensor] = ()
    for run in sorted(runs, key=lambda r: r.contender != "eager"):
        if run.refused or run.call is None:
            continue
        on_step(f"checking {run.title}" + (" (compiling)" if "Inductor" in run.contender else ""))
        try:
            found = _gradients(run.call.call())
        except Exception as error:
            run.refused = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            continue
        yardstick = yardstick or found
        run.share = gradient_agreement(found, yardstick, exact).share
        run.wrong = not run.share <= (1 if run.ours else PEER_SLACK)


def _gradients(results: Sequence[Tensor]) -> Sequence[Tensor]:
    """In float64 on the CPU, where they are compared."""
    return [t.double().cpu() for t in results[1:]]
