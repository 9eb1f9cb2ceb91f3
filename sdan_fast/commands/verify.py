"""`sdan-fast verify`: every op and the model, forward and gradients, on each backend here against float64."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils import _pytree as pytree

from sdan_fast import backends, explain, functional, reference, use_backend
from sdan_fast.models.fitted import seeded_sdan
from sdan_fast.modules import MMLKA, RSDAM, SDM
from sdan_fast.ops import OPS

from . import terminal
from .check import Agreement, agreement, gradient_agreement, worst

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Make = Callable[..., Tensor]  # (*shape) -> a random float64 tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GROUPS = {"float32": (1, 2, 3, 4), "bfloat16": (2,), "float16": (2,)}  # of the models; they share all ops
_SHAPES = [(2, 9, 13), (1, 33, 40), (1, 1, 1)]
_CHANNELS = 12


@dataclass(frozen=True)
class Row:
    """One line of the table: one function in one dtype on one backend, the worst over all its cases."""

    function: str
    dtype: str
    device: str
    backend: str
    forward: Agreement | None
    gradients: Agreement | None
    note: str = ""

    @property
    def ok(self) -> bool:
        return all(a is None or a.ok for a in (self.forward, self.gradients))


# --- the cases of each op ----------------------------------------------------------------------------------------


def _depthwise(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for kh, kw, dilation in ((3, 3, 1), (7, 7, 4), (1, 11, 6), (11, 1, (6, 1))):
        weight = r(_CHANNELS, 1, kh, kw) / math.sqrt(kh * kw)
        yield (r(n, _CHANNELS, h, w), weight, r(_CHANNELS)), {"dilation": dilation}
        yield (r(n, _CHANNELS, h, w), weight, None), {"dilation": dilation}


def _strips(r: Make, k: int, biases: tuple[bool, bool], dilation: int) -> tuple[Any, ...]:
    b_h, b_v = (r(_CHANNELS) if present else None for present in biases)
    return (
        r(_CHANNELS, 1, 1, k) / math.sqrt(k),
        b_h,
        r(_CHANNELS, 1, k, 1) / math.sqrt(k),
        b_v,
        dilation,
    )


def _chain(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for k, biases in ((11, (True, True)), (7, (False, True)), (3, (False, False))):
        stages = [_strips(r, k, biases, 1), _strips(r, k, biases, (k + 1) // 2)]
        yield (r(n, _CHANNELS, h, w), stages), {}


def _separable(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    *tensors, dilation = _strips(r, 7, (True, True), 2)
    yield (r(n, _CHANNELS, h, w), *tensors), {"dilation": dilation}


def _star(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for activation in ("none", "gelu", "relu6", "relu", "silu"):
        for outer in ("none", "gelu"):
            a, b = r(n, _CHANNELS, h, w), r(n, _CHANNELS, h, w)
            yield (a, b), {"activation": activation, "outer": outer}


def _norm(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    yield (r(n, _CHANNELS, h, w), r(_CHANNELS), r(_CHANNELS)), {}
    yield (r(n, _CHANNELS, h, w), r(_CHANNELS), None), {"eps": 1e-3}


def _pointwise(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for co, bias, activation in ((_CHANNELS, True, "gelu"), (7, False, "none")):
        weight = r(co, _CHANNELS, 1, 1) / math.sqrt(_CHANNELS)
        yield (r(n, _CHANNELS, h, w), weight, r(co) if bias else None), {"activation": activation}


def _gate(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for ci in (_CHANNELS, 7):
        weight = r(_CHANNELS, ci, 1, 1) / math.sqrt(ci)
        yield (r(n, _CHANNELS, h, w), r(n, ci, h, w), weight, r(_CHANNELS)), {}


def _star_conv(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for co, outer in ((_CHANNELS, "gelu"), (_CHANNELS // 2, "none")):
        pw1, pw2 = (r(co, _CHANNELS, 1, 1) / math.sqrt(_CHANNELS) for _ in range(2))
        x = r(n, _CHANNELS, h, w)
        yield (x, r(_CHANNELS), r(_CHANNELS), pw1, r(co, 1, 3, 3) / 3, r(co), pw2), {"outer": outer}


def _filled(module: torch.nn.Module, r: Make) -> Any:
    """The module with random parameters of a size that keeps activations near 1."""
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() == 4 else 1
        parameter.data = r(*parameter.shape) / math.sqrt(fan_in)
    return module.requires_grad_(False)


def _mm_lka(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for groups in (1, 2, 3, 4):
        attn = _filled(MMLKA(_CHANNELS, groups), r)
        yield (r(n, _CHANNELS, h, w), attn.branches_in_order(), attn.proj.weight, attn.proj.bias), {}


def _sdm(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    yield (r(n, _CHANNELS, h, w), *_filled(SDM(_CHANNELS), r).parameters_in_order()), {}


def _rsdam(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for groups in (2, 4):  # the default, and the one with every kind of branch
        yield (r(n, _CHANNELS, h, w), *_filled(RSDAM(_CHANNELS, groups), r).parameters_in_order()), {}


def _gated_chain(r: Make, n: int, h: int, w: int) -> Iterator[Arguments]:
    for (x, stages), kwargs in _chain(r, n, h, w):
        yield (r(n, _CHANNELS, h, w), x, stages), kwargs


CASES: dict[str, Callable[[Make, int, int, int], Iterator[Arguments]]] = {
    "depthwise_conv2d": _depthwise,
    "gated_strip_conv_chain": _gated_chain,
    "layer_norm2d": _norm,
    "mm_lka": _mm_lka,
    "pointwise_conv2d": _pointwise,
    "pointwise_gate": _gate,
    "rsdam": _rsdam,
    "sdm": _sdm,
    "separable_conv2d": _separable,
    "star": _star,
    "star_conv": _star_conv,
    "strip_conv_chain": _chain,
}


# --- running one -------------------------------------------------------------------------------------------------


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _as(arguments: Arguments, device: str, dtype: torch.dtype, layout: torch.memory_format) -> Arguments:
    """Leaves of a graph with the same values on a device, in a dtype; activations in a memory format."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        moved = leaf.detach().to(device, dtype)
        if moved.dim() == 4 and moved.shape[-1] * moved.shape[-2] > 1:
            moved = moved.contiguous(memory_format=layout)
        return moved.requires_grad_()

    return pytree.tree_map(move, arguments)


def _run(function: Callable[..., Tensor], arguments: Arguments, seed: Tensor) -> tuple[Tensor, list[Tensor]]:
    args, kwargs = arguments
    y = function(*args, **kwargs)
    grads = torch.autograd.grad(y, _tensors(arguments), seed.to(y))
    return y.detach(), list(grads)


def _compare(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    arguments: Arguments,
    device: str,
    dtype: torch.dtype,
    backend: str,
    *,
    composed: bool,
) -> Iterator[tuple[Agreement, Agreement]]:
    """Forward and gradients of `ours` on a backend against `plain` in float64, once for each memory format.

    The yardstick, `plain` in `dtype`, sees the same format, but for bfloat16: there eager's weight gradient of a
    dilated depth-wise convolution is garbage in channels_last on some CPUs (oneDNN 3.12), a yardstick of any length.
    The gradients of one op are held against the bound each by itself, those of a composed one as one vector.
    """
    rounded = _as(arguments, device, dtype, torch.contiguous_format)
    exact = _as(rounded, device, torch.float64, torch.contiguous_format)
    args, kwargs = exact
    with torch.no_grad():
        shape = plain(*args, **kwargs).shape
    generator = torch.Generator().manual_seed(2)
    seed = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    y64, grads64 = _run(plain, exact, seed)
    for layout in (torch.contiguous_format, torch.channels_last):
        formatted = _as(rounded, device, dtype, layout)
        if layout == torch.contiguous_format or dtype != torch.bfloat16:
            y, grads = _run(plain, formatted, seed)
        with use_backend(backend):
            ours_y, ours_grads = _run(ours, formatted, seed)
            args, kwargs = formatted
            with torch.no_grad():  # inference may fuse more than training
                inferred = ours(*args, **kwargs)
        forward = worst([agreement(ours_y, y, y64), agreement(inferred, y, y64)])
        if composed:
            yield forward, gradient_agreement(ours_grads, grads, grads64)
        else:
            yield (
                forward,
                worst([agreement(a, b, c) for a, b, c in zip(ours_grads, grads, grads64, strict=True)]),
            )


def _verify_op(function: str, device: str, dtype_name: str, backend: str) -> Row:
    dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ours, plain = getattr(functional, function), getattr(reference, function)
    forward: list[Agreement] = []
    gradients: list[Agreement] = []
    refused = ""
    for n, h, w in _SHAPES:
        for arguments in CASES[function](make, n, h, w):
            args, kwargs = _as(arguments, device, dtype, torch.contiguous_format)
            with use_backend(backend), torch.no_grad():
                explanation = explain(function, *args, **kwargs)
            composed = OPS[explanation.op].composed
            if explanation.backend is None and not composed:
                refused = explanation.reasons[backend]
                continue
            for f, g in _compare(ours, plain, arguments, device, dtype, backend, composed=composed):
                forward.append(f)
                gradients.append(g)
    if not forward:
        return Row(function, dtype_name, device, backend, None, None, f"not run: {refused}")
    note = f"some cases not run: {refused}" if refused else ""
    return Row(function, dtype_name, device, backend, worst(forward), worst(gradients), note)


def _verify_model(groups: int, device: str, dtype_name: str, backend: str) -> Row:
    """SDAN with two blocks: whole models differ from their blocks only in how many there are."""
    name = f"SDAN, groups={groups}"
    model = seeded_sdan(2, 12, 2, groups)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    def plain(x: Tensor, *values: Tensor) -> Tensor:
        with use_backend("reference"):
            return run(x, *values)

    x = torch.rand(1, 3, 12, 15, generator=torch.Generator().manual_seed(1))
    try:
        pairs = list(
            _compare(run, plain, ((x, *parameters), {}), device, DTYPES[dtype_name], backend, composed=True)
        )
    except RuntimeError as error:
        if "cannot run on the backend" not in str(error):
            raise
        return Row(name, dtype_name, device, backend, None, None, f"not run: {error}")
    forward, gradients = zip(*pairs, strict=True)
    return Row(name, dtype_name, device, backend, worst(forward), worst(gradients))


def _devices(backend: str) -> tuple[str, ...]:
    if backend == "reference":
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return backends.BACKENDS[backend].devices


def _share(a: Agreement | None) -> str:
    return "-" if a is None else f"{a.share:.2f}"


def verify(
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="Check this backend only; auto checks all that can run here.",
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16, float16, or all of them.")
    ] = "all",
    op: Annotated[str, typer.Option("--op", metavar="OP", help="Check this op only, or `model`.")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Check every op and the model, forward and gradients, on each backend here against float64.

    A result may be off by twice what eager PyTorch is off in the same dtype, plus two units in the last place of the
    largest value (the gradient of several ops in a row: in the root mean square). The numbers are shares of that
    bound: above 1 is a failure, and the exit code is then 1.
    """
    terminal.require_backend(backend)
    if dtype not in (*DTYPES, "all"):
        raise typer.BadParameter(
            f"must be all or one of {', '.join(DTYPES)}, and it is {dtype!r}", param_hint="--dtype"
        )
    if op not in (*CASES, "model", "all"):
        raise typer.BadParameter(
            f"must be all, model or one of {', '.join(CASES)}, and it is {op!r}", param_hint="--op"
        )
    available = {line.name: line.reason for line in backends.status()}
    chosen = list(available) if backend == "auto" else [backend]
    dtypes = list(DTYPES) if dtype == "all" else [dtype]

    jobs: list[Callable[[], Row]] = []
    for name in chosen:
        if available[name]:
            continue
        for device in _devices(name):
            for kind in dtypes:
                if name == "reference" and kind != "float32":
                    continue  # it is the yardstick itself; one dtype shows that calls reach it
                for function in CASES if op == "all" else [op] if op != "model" else []:
                    jobs.append(functools.partial(_verify_op, function, device, kind, name))
                for groups in _GROUPS[kind] if op in ("all", "model") else ():
                    jobs.append(functools.partial(_verify_model, groups, device, kind, name))
    rows = []
    with terminal.progress() as bar:
        for job in bar.track(jobs, description="verifying"):
            rows.append(job())
    rows.sort(key=lambda row: (row.function, row.dtype, row.backend))
    missing = {name: reason for name, reason in available.items() if reason and name in chosen}
    failed = [row for row in rows if not row.ok]
    if as_json:
        _print_json(rows, missing)
    else:
        _print_table(rows, missing)
    if failed:
        terminal.fail(f"{len(failed)} of {len(rows)} checks failed", terminal.FAILED)


def _print_table(rows: list[Row], missing: dict[str, str]) -> None:
    out = terminal.console()
    grid = terminal.table(
        "function",
        "dtype",
        "device",
        "backend",
        "forward",
        "gradients",
        "verdict",
        title="Errors against float64, as shares of the bound",
        right=("forward", "gradients"),
    )
    for row in rows:
        verdict = (
            row.note
            if row.forward is None
            else ("ok" if row.ok else "FAILED") + (row.note and f"; {row.note}")
        )
        grid.add_row(
            row.function,
            row.dtype,
            row.device,
            row.backend,
            _share(row.forward),
            _share(row.gradients),
            verdict,
        )
    out.print(grid)
    for name, reason in missing.items():
        out.print(f"{name}: not checked: {reason}")
    ran = [row for row in rows if row.forward is not None]
    out.print(f"{sum(row.ok for row in ran)} of {len(ran)} checks passed")


def _print_json(rows: list[Row], missing: dict[str, str]) -> None:
    def entry(a: Agreement | None) -> dict[str, float] | None:
        return None if a is None else {"error": a.error, "bound": a.bound}

    print(
        json.dumps(
            {
                "checks": [
                    {
                        "function": row.function,
                        "dtype": row.dtype,
                        "device": row.device,
                        "backend": row.backend,
                        "forward": entry(row.forward),
                        "gradients": entry(row.gradients),
                        "ok": row.ok,
                        "note": row.note,
                    }
                    for row in rows
                ],
                "not_checked": missing,
            },
            indent=1,
        )
    )
