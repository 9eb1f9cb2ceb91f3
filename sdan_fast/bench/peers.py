"""Who competes in a benchmark case: the package on each of its backends, and what else a user could pick."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sdan_fast import backends, explain, use_backend
from sdan_fast.ops._op import OPS

from .cases import LAYOUTS, Arguments, Case, tensors

WRONG_16_BIT_GRADIENTS = "PyTorch's 16-bit weight gradients in channels_last are wrong on some CPUs, or crash"


@dataclass
class Contender:
    """One way to compute a case.

    Attributes:
        name: who, such as "cpu" or "eager".
        layout: of its input.
        ours: whether it is this package.
        call: one forward, or one forward with its backward; returns the output, then the gradients.
        context: what is in force while it is called; entering it is not timed.
        refused: one sentence if it cannot take part.
    """

    name: str
    layout: str
    ours: bool
    call: Callable[[], Sequence[Tensor]]
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    refused: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name}, {self.layout}"


def backends_of(device: str) -> list[str]:
    """The package's own backends that serve a device, whether they can run here or not."""
    return [name for name in backends.ORDER[:-1] if device in backends.BACKENDS[name].devices]


def names(device: str, layouts: Sequence[str], *, inductor: str = "first") -> list[tuple[str, str]]:
    """(name, layout) of every contender of an op on a device; ours first.

    Args:
        device: "cpu" or "cuda".
        layouts: names of `LAYOUTS`; eager PyTorch competes in both, whichever are asked for.
        inductor: "first" compiles for the first of `layouts`, "all" for each, "none" for none.
    """
    found = [(backend, layout) for backend in backends_of(device) for layout in layouts]
    found += [("eager", layout) for layout in LAYOUTS]
    if device == "cuda":
        found.append(("cuDNN", "channels_last"))
    compiled = {"first": layouts[:1], "all": layouts, "none": ()}[inductor]
    return found + [("Inductor", layout) for layout in compiled]


def build(case: Case, passes: str, device: str, who: Sequence[tuple[str, str]]) -> list[Contender]:
    """The contenders of a case, by (name, layout).

    Args:
        case: what to compute.
        passes: one of `cases.PASSES`.
        device: "cpu" or "cuda".
        who: as `names` gives them.
    """
    made = {layout: case.arguments(layout, device) for layout in {layout for _, layout in who}}
    return [_contender(case, made[layout], passes, device, name, layout) for name, layout in who]


def _contender(
    case: Case, arguments: Arguments, passes: str, device: str, name: str, layout: str
) -> Contender:
    training = passes != "forward"
    if name in backends.NAMES:
        call = calling(case.subject.ours, arguments, training)
        args, kwargs = arguments
        with use_backend(name):
            choice = explain(case.subject.op, *args, **kwargs)
        # A composed op without a kernel there is its parts, which have theirs.
        parts = OPS[choice.op].composed and backends.BACKENDS[name].missing is None
        refused = None if choice.backend == name or parts else choice.reasons.get(name)
        return Contender(name, layout, True, call, functools.partial(use_backend, name), refused)
    if name == "Inductor":
        return Contender(name, layout, False, calling(compiled(case.subject.plain), arguments, training))
    context = functools.partial(_cudnn) if name == "cuDNN" else contextlib.nullcontext
    refused = None
    if training and device == "cpu" and case.dtype != "float32" and layout == "channels_last":
        refused = WRONG_16_BIT_GRADIENTS
    return Contender(name, layout, False, calling(case.subject.plain, arguments, training), context, refused)


@contextlib.contextmanager
def _cudnn() -> Iterator[None]:
    """cuDNN wherever PyTorch lets it, with its own search for the fastest algorithm."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


def compiled(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Inductor's version of a function, for exactly the shapes that it is called with; compiled at the first call."""
    result: Callable[..., Tensor] = torch.compile(function, dynamic=False, **options)
    return result


def calling(
    function: Callable[..., Tensor], arguments: Arguments, training: bool
) -> Callable[[], Sequence[Tensor]]:
    """One forward, or one forward and the gradients of all its tensors, as a function without arguments."""
    args, kwargs = arguments
    if not training:

        def forward() -> Sequence[Tensor]:
            return (function(*args, **kwargs),)

        return torch.no_grad()(forward)

    leaf_args, leaf_kwargs = pytree.tree_map(
        lambda leaf: leaf.detach().requires_grad_() if isinstance(leaf, Tensor) else leaf, (args, kwargs)
    )
    leaves = tensors((leaf_args, leaf_kwargs))
    seed: list[Tensor] = []

    def both() -> Sequence[Tensor]:
        y = function(*leaf_args, **leaf_kwargs)
        if not seed:
            seed.append(gradient_seed(y))
        return (y.detach(), *torch.autograd.grad(y, leaves, seed[0]))

    return both


def gradient_seed(y: Tensor) -> Tensor:
    """The gradient that flows into an output: the same numbers for every contender, in the output's own layout."""
    generator = torch.Generator().manual_seed(1)
    return torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator).to(y.dtype))
