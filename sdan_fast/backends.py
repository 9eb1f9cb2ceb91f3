"""Who can run a call, and why not: the backends, the choice between them, and its explanation.

A backend is `reference` (plain PyTorch), `cpu` (C++ SIMD), `triton` or `cuda` (CUDA C++). "auto" takes the first of
`ORDER` that can run the call. The choice is read from a context variable, which torch.compile guards: a compiled
function recompiles when the backend changes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import preferences

if TYPE_CHECKING:
    from .ops._op import Op

# "auto" asks them in this order; which of Triton and CUDA C++ comes first where both can is up to `preferences`.
ORDER = ("cpu", "triton", "cuda", "reference")
NAMES = ("auto", *ORDER)


@dataclass
class Backend:
    """What one backend needs of a call, whatever the op: the device, the dtype, and to be there at all."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    missing: str | None = None  # why it cannot run at all on this machine

    def refuses(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """None if it can run the call, else the reason in one sentence."""
        if self.missing is not None:
            return self.missing
        if self.name not in op.kernels:
            return f"the {self.name} backend has no kernel for {op.name}"
        x = args[0]
        if x.device.type not in self.devices:
            return f"the {self.name} backend runs on {_words(self.devices)} tensors, and this one is on {x.device.type}"
        if x.dtype not in self.dtypes:
            return f"the {self.name} backend computes in {_words(self.dtypes)}, and this tensor is {_words((x.dtype,))}"
        supports = op.supports.get(self.name)
        return supports(*args, **kwargs) if supports is not None else None


def _words(items: tuple[object, ...]) -> str:
    return " or ".join(str(item).removeprefix("torch.") for item in items)


def _load_extension(name: str) -> str | None:
    """Import an extension module; the reason in one sentence when that is impossible."""
    try:
        importlib.import_module(f"sdan_fast.{name}")
    except ImportError as error:
        why = _build_reason(name) or str(error)
        return f"sdan_fast.{name} is not available: {why}"
    return None


def kernel_instruction_set() -> str | None:
    """What the compiled CPU kernels of this process use; None where they are not available.

    "portable", "avx2" or "avx512"; "avx512+amx" where bfloat16 is multiplied in matrix tiles.
    """
    try:
        extension = importlib.import_module("sdan_fast._C_cpu")
    except ImportError:
        return None
    return str(extension.isa()) + ("+amx" if extension.bf16_tiles() else "")


def _build_reason(name: str) -> str | None:
    """What setup.py recorded about an extension that it did not build."""
    try:
        recorded = json.loads(Path(__file__).with_name("_build_info.json").read_text())
        return recorded[name.removeprefix("_C_")]["reason"]
    except (OSError, ValueError, KeyError):
        return None  # not built by setup.py; the import error says what there is to say


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if not interpreting_triton() and not torch.cuda.is_available():
        return (
            "Triton needs a GPU, and torch sees none (TRITON_INTERPRET=1 runs its interpreter on CPU tensors)"
        )
    return None


def _cuda_missing() -> str | None:
    missing = _load_extension("_C_cuda")
    if missing is None and not torch.cuda.is_available():
        return "CUDA kernels need a GPU, and torch sees none"
    return missing


def interpreting_triton() -> bool:
    """Whether Triton's interpreter, chosen when a kernel is decorated, is what runs its kernels in this process."""
    return _INTERPRETING


_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BACKENDS: dict[str, Backend] = {
    "cpu": Backend("cpu", ("cpu",), KERNEL_DTYPES, _load_extension("_C_cpu")),
    "triton": Backend("triton", ("cpu",) if _INTERPRETING else ("cuda",), KERNEL_DTYPES, _triton_missing()),
    "cuda": Backend("cuda", ("cuda",), KERNEL_DTYPES, _cuda_missing()),
}


def _initial() -> str:
    name = os.environ.get("SDAN_FAST_BACKEND", "auto")
    if name not in NAMES:
        raise ValueError(f"SDAN_FAST_BACKEND must be one of {', '.join(NAMES)}, and it is {name!r}")
    return name


_INITIAL = _initial()
_current: ContextVar[str] = ContextVar("sdan_fast_backend", default=_INITIAL)
# Dynamo reads context variables from PyTorch 2.14 on, and guards them. For an older one the name stands here as well:
# as a global, which every Dynamo guards, and which all threads share.
_DYNAMO_READS_CONTEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
_for_dynamo = _INITIAL


def named() -> str:
    """The backend in force, in a form that the Dynamo at hand can trace."""
    if _DYNAMO_READS_CONTEXT or not torch.compiler.is_compiling():
        return _current.get()
    return _for_dynamo


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the `with` on one backend; "auto" takes the first that can run each call.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "auto". The environment variable SDAN_FAST_BACKEND sets the
            backend outside of any `with`.

    Raises:
        ValueError: for any other name. An op that the named backend cannot run raises RuntimeError with its reason.

    The backward of an op runs on the backend that ran its forward, also outside of the `with`. Enter it outside of a
    compiled function, which recompiles when the backend changes: inside, Dynamo breaks the graph.
    """
    if not isinstance(name, str) or (name not in NAMES and name not in BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, and it is {name!r}")
    global _for_dynamo
    before = _current.get()
    token = _current.set(name)
    _for_dynamo = name
    try:
        yield
    finally:
        _current.reset(token)
        _for_dynamo = before


def current_backend() -> str:
    """The backend in force: what `use_backend` or SDAN_FAST_BACKEND named, else "auto"."""
    return _current.get()


def choose(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The backend that runs this call under the one in force.

    Raises:
        RuntimeError: if a named backend cannot run it, with the reason.
    """
    name = named()
    if name == "auto":
        for candidate in ORDER[:-1]:
            if (
                BACKENDS[candidate].refuses(op, args, kwargs) is None
                and _slower(op, candidate, args, kwargs) is None
            ):
                return _first_of_two(op, args, kwargs) if candidate == "triton" else candidate
        return "reference"
    if name == "reference":
        return name
    if name == _EXPLAIN:
        raise _Explained(op, args, kwargs)
    reason = BACKENDS[name].refuses(op, args, kwargs)
    if reason is not None and (op.composed or op.plain_elsewhere and name not in op.kernels):
        return (
            "reference"  # its parts, each of which runs on the named backend or raises; or PyTorch's own op
        )
    if reason is not None:
        raise RuntimeError(f"{op.name} cannot run on the backend {name!r}: {reason}")
    return name


def _slower(op: Op, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why plain PyTorch is preferred to a backend that can run this call, if it is.

    That was measured for the forward alone. A backend with kernels for the backward is the faster one where gradients
    are needed, whatever the forward takes.
    """
    slower = op.slower.get(name)
    reason = slower(*args, **kwargs) if slower is not None else None
    return None if reason is None or name in op.backward_kernels and op.requires_grad(args) else reason


def _first_of_two(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Triton, which can run the call, or CUDA C++, if that can as well and is preferred."""
    if BACKENDS["cuda"].refuses(op, args, kwargs) is not None:
        return "triton"
    return preferences.preferred(op.name, args).backend


class Status(NamedTuple):
    """One line of `status`: a backend, whether it can run anything here, and the reason if not."""

    name: str
    available: bool
    reason: str


def status() -> list[Status]:
    """Every backend in the order in which "auto" asks them, with the reason where one is not available."""
    lines = [
        Status(name, b.missing is None, b.missing or "") for name in ORDER[:-1] for b in [BACKENDS[name]]
    ]
    return [*lines, Status("reference", True, "")]


# --- explain -----------------------------------------------------------------------------------------------------

_EXPLAIN = "<explain>"


class _Explained(Exception):
    """Carries a checked call from `choose` to `explain` instead of running it."""

    def __init__(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(op.name)
        self.op, self.args_, self.kwargs_ = op, args, kwargs


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and for each other one why it cannot or is not asked."""

    op: str
    backend: str | None
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.op}: runs on {self.backend}" if self.backend else f"{self.op}: cannot run"
        return "\n".join([head, *(f"  not {name}: {reason}" for name, reason in self.reasons.items())])


def explain(fn_name: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `sdan_fast.functional.<fn_name>(*args, **kwargs)`, and why not the others.

    Nothing is computed. The arguments are checked as in the call itself. In place of a name, `fn_name` may be a
    callable, such as a model: then the first op that it comes to is explained, and what precedes that op is run.

    Raises:
        ValueError: if there is no such function, if a callable comes to no op, or as the function itself.
    """
    from . import functional

    if not callable(fn_name) and fn_name not in functional.__all__:
        raise ValueError(f"fn_name must be one of {', '.join(functional.__all__)}, and it is {fn_name!r}")
    named = _current.get()
    token = _current.set(_EXPLAIN)
    try:
        (getattr(functional, fn_name) if isinstance(fn_name, str) else fn_name)(*args, **kwargs)
    except _Explained as call:
        op, op_args, op_kwargs = call.op, call.args_, call.kwargs_
    else:
        raise ValueError(f"fn_name must come to an op of sdan_fast, and {fn_name!r} called none")
    finally:
        _current.reset(token)

    reasons: dict[str, str] = {}
    chosen: str | None = None
    order, why = list(ORDER), ""
    if named == "auto" and all(
        BACKENDS[name].refuses(op, op_args, op_kwargs) is None for name in ("triton", "cuda")
    ):
        first, why = preferences.preferred(op.name, op_args)
        order.remove(first)
        order.insert(order.index("cpu") + 1, first)
    for name in order:
        reason = None if name == "reference" else BACKENDS[name].refuses(op, op_args, op_kwargs)
        if reason is None and named not in ("auto", name):
            reason = f"use_backend names {named!r}"
        elif reason is None and named == "auto":
            reason = _slower(op, name, op_args, op_kwargs)
        if reason is None and chosen is not None:
            reason = f"{chosen!r} comes first"
            if why and {chosen, name} == {"triton", "cuda"}:
                reason += f": {why}"
        if reason is None:
            chosen = name
        else:
            reasons[name] = reason
    return Explanation(op.name, chosen, reasons)
