"""One training step of the network: ours on every backend beside eager PyTorch, in both layouts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdan_fast import use_backend
from sdan_fast.bench import cases, measuring, model, peers
from sdan_fast.bench.plain import PlainSDAN
from sdan_fast.commands.check import gradient_agreement
from sdan_fast.models import SDAN
from sdan_fast.models.fitted import seeded_sdan

DTYPES = ("float32", "bfloat16")


def measure(c: model.Configuration, device: str, clock: measuring.Clock, rounds: int) -> list[dict[str, Any]]:
    """One forward and backward of the network: ours on every backend, and eager PyTorch, in both layouts.

    The gradients are verified first, as one vector (the bound of `sdan-fast verify`).
    """
    source, image = seeded_sdan(**c.model_settings), model.picture(c)
    steps: list[dict[str, Any]] = []
    for dtype in DTYPES:
        exact = gradients(training_step(source, image, "float64", "NCHW", None, device)())
        runs: list[tuple[dict[str, Any], peers.Contender]] = []
        yardstick: Sequence[Tensor] = ()
        for name in ("eager", *peers.backends_of(device)):
            for layout in cases.LAYOUTS:
                step = training_step(source, image, dtype, layout, None if name == "eager" else name, device)
                entry: dict[str, Any] = {"contender": name, "layout": layout, "dtype": dtype}
                steps.append(entry)
                try:
                    found = gradients(step())
                except Exception as error:
                    entry |= {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
                    continue
                yardstick = yardstick or found
                share = gradient_agreement(found, yardstick, exact).share
                entry["share_of_error_bound"] = share
                if name != "eager" and not share <= 1:
                    entry["wrong"] = True
                    continue
                runs.append((entry, peers.Contender(name, layout, name != "eager", step)))
        times = measuring.race([contender for _, contender in runs], clock, rounds=rounds, budget=60)
        for (entry, _), seconds in zip(runs, times, strict=True):
            entry["seconds"] = measuring.percentiles(seconds)
            print(f"training {entry['contender']:8} {entry['layout']:14} {dtype:9} "
                  f"{1e3 * entry['seconds']['p50']:8.3f} ms", flush=True)  # fmt: skip
    return steps


def training_step(
    source: SDAN, image: Tensor, dtype: str, layout: str, backend: str | None, device: str
) -> Callable[[], Sequence[Tensor]]:
    """One forward and the gradients of every parameter; plain PyTorch if no backend is named."""
    kind = torch.float64 if dtype == "float64" else cases.DTYPES[dtype]
    net = copy.deepcopy(source).to(device, kind).to(memory_format=cases.LAYOUTS[layout])  # type: ignore[call-overload]
    x = image.to(device, kind).contiguous(memory_format=cases.LAYOUTS[layout])
    parameters = [p.requires_grad_() for p in net.parameters()]
    run = PlainSDAN(net.train()) if backend is None else net.train()

    def step() -> Sequence[Tensor]:
        with use_backend(backend) if backend else contextlib.nullcontext():
            y = run(x)
        return (
            y.detach(),
            *torch.autograd.grad(y.to(torch.promote_types(kind, torch.float32)).square().mean(), parameters),
        )

    return step


def gradients(results: Sequence[Tensor]) -> Sequence[Tensor]:
    """In float64 on the CPU, where they are compared."""
    return [t.double().cpu() for t in results[1:]]
