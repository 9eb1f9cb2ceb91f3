"""`accelerate`: this package's ops in somebody else's network, in place.

A module that is swapped keeps its place, parameters, hooks, state-dict keys and attributes, and stays an instance of
its class: it becomes one of a subclass whose `forward` calls the op. So optimizers, checkpoints, copies, pickles,
`torch.compile` and `torch.export` go on as before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import functional as F
from . import reference
from .modules import hooked

__all__ = ["Entry", "Report", "accelerate"]


@dataclass(frozen=True)
class Entry:
    """What `accelerate` found of one module."""

    path: str  # as in `named_modules`, "" for the model itself
    module: str  # the name of its class
    op: str | None  # of `sdan_fast.functional`: what computes it now, or would; None if it is left as it is
    reason: str  # why it is left; "" if it is not


@dataclass(frozen=True)
class Report:
    """What `accelerate` did, or would do; `print` it for a summary."""

    entries: tuple[
        Entry, ...
    ]  # of the modules that have parameters, and of what was fused, in the model's order
    dry_run: bool
    _undo: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False, compare=False)

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """The modules that this package's ops compute now, or would."""
        return tuple(entry for entry in self.entries if entry.op is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The modules that are left as they are, each with its reason."""
        return tuple(entry for entry in self.entries if entry.op is None)

    def undo(self) -> None:
        """Give every module that was swapped its own class back. Parameters keep the values that they have now."""
        while self._undo:
            module, own = self._undo.pop()
            module.__class__ = own

    def __str__(self) -> str:
        verb = "would run" if self.dry_run else "run"
        lines = [f"{len(self.swapped)} of {len(self.entries)} modules {verb} this package's ops"]
        groups: dict[str, list[str]] = {}
        for entry in (*self.swapped, *self.left):
            what = f"F.{entry.op}" if entry.op is not None else f"left, {entry.reason}"
            groups.setdefault(f"{entry.module}: {what}", []).append(entry.path or "the model itself")
        for what, paths in groups.items():
            more = "" if len(paths) <= 3 else f" and {len(paths) - 3} more"
            lines.append(f"  {len(paths)} x {what} ({', '.join(paths[:3])}{more})")
        return "\n".join(lines)


def accelerate(model: nn.Module, *, dry_run: bool = False) -> Report:
    """Let this package's ops compute what they can of a network, in place.

    Swapped are depth-wise convolutions with stride 1, odd kernels and "same" zero padding (`nn.Conv2d`, or a subclass
    that computes as it does), 1x1 convolutions, modules that compute a LayerNorm over the channels of N x C x H x W
    images (whatever their class: each is tried on random images), and in an `nn.Sequential` every 1xk convolution that
    a kx1 one follows, which become one `strip_conv_chain` as long as nothing hooks into them. Which backend runs an op
    is decided call by call, as always. An input that is not a batch of images is computed as before.

    A swapped module reads its parameters at each call; do not change its stride, padding or kernel size afterwards.

    Args:
        model: any network. This package's own modules and what was swapped before are left alone.
        dry_run: change nothing, only report.

    Returns:
        The report: of every module with parameters, which op computes it, or why none does. `undo()` takes all back.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, and it is a {type(model).__name__}")
    modules = list(_modules(model))
    found = {module: _kind_of(module) for _, module in modules if module._parameters}
    kinds = {module: kind for module, (kind, _) in found.items() if kind is not None}
    report: list[Entry] = []
    for path, module in modules:
        name = type(module).__name__
        if isinstance(module, nn.Sequential) and _own_forward(module, nn.Sequential) is None:
            inner = list(module)
            inner_kinds = [kinds.get(m) for m in inner]
            if any(_strips(inner, inner_kinds, i) > i for i in range(len(inner))):
                kinds[module] = _StripChains
                report.append(Entry(path, name, _StripChains.op, ""))
        if module in found:
            kind, reason = found[module]
            report.append(Entry(path, name, kind.op if kind else None, reason))
    done = Report(tuple(report), dry_run)
    if not dry_run:
        for module, kind in kinds.items():
            own = type(module)
            module.__class__ = _subclass(kind, own)
            done._undo.append((module, own))
    return done


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, but for the inside of this package's modules, which choose their ops, and parametrizations."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if type(module).__module__.partition(".")[0] != __package__:
            children = [
                (f"{name}.{key}" if name else key, m)
                for key, m in module._modules.items()
                if m is not None and not (key == "parametrizations" and parametrize.is_parametrized(module))
            ]
            stack += reversed(children)


class _Swapped(nn.Module):
    """A module's class with another forward; `op` is what that calls."""

    op = ""

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"op={self.op}")))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made here and has no name that a pickle could look it up by.
        kind, own = type(self).__bases__
        return _blank, (kind, own), *cast("tuple[Any, ...]", super().__reduce_ex__(protocol))[2:]


_subclasses: dict[tuple[type[_Swapped], type[nn.Module]], type[nn.Module]] = {}


def _subclass(kind: type[_Swapped], own: type[nn.Module]) -> type[nn.Module]:
    """The class `own` with the forward of `kind`: one for each pair, so that compiled code is found again."""
    made = _subclasses.get((kind, own))
    if made is None:
        body = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        made = _subclasses.setdefault((kind, own), type(own.__name__, (kind, own), body))
    return made


def _blank(kind: type[_Swapped], own: type[nn.Module]) -> nn.Module:
    made = _subclass(kind, own)
    return made.__new__(made)


class _Depthwise(_Swapped, nn.Conv2d):
    op = "depthwise_conv2d"

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:
            return super().forward(input)
        return F.depthwise_conv2d(input, self.weight, self.bias, dilation=self.dilation)


class _Pointwise(_Swapped, nn.Conv2d):
    op = "pointwise_conv2d"

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:
            return super().forward(input)
        return F.pointwise_conv2d(input, self.weight, self.bias)


class _Norm(_Swapped):
    op = "layer_norm2d"
    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.dim() != 4:
            return super().forward(*args, **kwargs)
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return super().forward(*args, **kwargs)  # some classes cast by themselves
        return F.layer_norm2d(x, self.weight, self.bias, self.eps)


class _StripChains(_Swapped, nn.Sequential):
    op = "strip_conv_chain"

    def forward(self, input: Any) -> Any:
        modules = list(self)
        kinds = [type(m).__bases__[0] if isinstance(m, _Swapped) and not hooked(m) else None for m in modules]
        i = 0
        while i < len(modules):
            end = _strips(modules, kinds, i) if isinstance(input, Tensor) and input.dim() == 4 else i
            if end > i:
                input = F.strip_conv_chain(input, _stages(modules[i:end]))
                i = end
            else:
                input = modules[i](input)
                i += 1
        return input


def _strips(modules: Sequence[nn.Module], kinds: Sequence[type | None], begin: int) -> int:
    """The end of the run of 1xk and kx1 convolutions, in turn, that begins at `begin`; `begin` if none does."""
    end = begin
    while end + 1 < len(modules) and kinds[end] is _Depthwise and kinds[end + 1] is _Depthwise:
        horizontal, vertical = (cast("nn.Conv2d", m).kernel_size for m in modules[end : end + 2])
        if horizontal[0] != 1 or horizontal[1] == 1 or vertical[0] == 1 or vertical[1] != 1:
            break
        end += 2
    return end


def _stages(strips: Sequence[nn.Module]) -> list[reference.StripStage]:
    convs = cast("Sequence[nn.Conv2d]", strips)
    return [
        (h.weight, h.bias, v.weight, v.bias, (v.dilation[0], h.dilation[1]))
        for h, v in zip(convs[::2], convs[1::2], strict=True)
    ]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _kind_of(module: nn.Module) -> tuple[type[_Swapped] | None, str]:
    """(what computes the module by one of this package's ops, "") or (None, why nothing does)."""
    if isinstance(module, _Swapped) or type(module).__module__.partition(".")[0] == __package__:
        return None, "this package computes it already"
    if isinstance(module, torch.jit.ScriptModule):
        return None, "it is compiled by TorchScript"
    if parametrize.is_parametrized(module):
        return None, "a parametrization computes its parameters"
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in parameters):
        return None, "its parameters have no shape before its first call"
    if "forward" in module.__dict__:
        return None, "its forward was replaced"
    if any(p.dtype not in _DTYPES for p in parameters):
        return None, f"no op takes {next(p.dtype for p in parameters if p.dtype not in _DTYPES)}"
    if isinstance(module, nn.Conv2d):
        return _kind_of_conv(module)
    if _computes_layer_norm2d(module):
        return _Norm, ""
    return None, "no op computes it"


def _own_forward(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a module does not compute what its base class `kind` does; None if it does."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for name in ("forward", "_conv_forward"):
        if getattr(type(module), name, None) is not getattr(kind, name, None):
            return "its class computes in its own way"
    return None


def _kind_of_conv(conv: nn.Conv2d) -> tuple[type[_Swapped] | None, str]:
    own = _own_forward(conv, nn.Conv2d)
    if own is not None:
        return None, own
    channels, (kh, kw), (dh, dw) = conv.in_channels, conv.kernel_size, conv.dilation
    if conv.padding_mode != "zeros":
        return None, f"its padding is {conv.padding_mode!r}, and the ops' is zeros"
    if conv.stride != (1, 1):
        return None, f"its stride is {conv.stride}, and the ops' is 1"
    if conv.groups == 1 and (kh, kw) == (1, 1):
        if conv.padding in ((0, 0), "same", "valid"):
            return _Pointwise, ""
        return None, "it is a 1x1 convolution with padding"
    if conv.groups != channels or conv.out_channels != channels:
        return None, "it is neither depth-wise nor 1x1"
    if kh % 2 == 0 or kw % 2 == 0:
        return None, "its kernel has an even side"
    if conv.padding not in ("same", (dh * (kh - 1) // 2, dw * (kw - 1) // 2)):
        return None, 'its padding is not "same"'
    return _Depthwise, ""


def _computes_layer_norm2d(module: nn.Module) -> bool:
    """Whether a module with a weight, a bias and an `eps` gives LayerNorm over channels, tried on a copy of it.

    Images of the scale of eps tell whether it is added to the variance, others whether that is all.
    """
    named, eps = module._parameters, getattr(module, "eps", None)
    weight, bias = named.get("weight"), named.get("bias")
    if weight is None or bias is None or len(named) != 2 or module._modules or module._buffers:
        return False
    if not isinstance(eps, float) or eps <= 0.0 or weight.dim() != 1 or weight.shape != bias.shape:
        return False
    c = len(weight)
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            probe: Any = copy.deepcopy(module).to_empty(device="cpu").float()
            w, b = (p.normal_(generator=generator) for p in (probe.weight, probe.bias))
            for scale, height, width in ((1.0, 3, 4 + (c == 4)), (2 * eps**0.5, 2 + (c == 2), 5 + (c == 5))):
                x = scale * (torch.randn(2, c, height, width, generator=generator) + 0.5)
                wanted = reference.layer_norm2d(x.double(), w.double(), b.double(), eps)
                for training in (True, False):
                    y = probe.train(training).forward(x)
                    if y.shape != x.shape or not torch.allclose(y.double(), wanted, rtol=0.0, atol=1e-3):
                        return False
            return probe.bfloat16().forward(x.bfloat16()).dtype == torch.bfloat16
    except Exception:  # what another class does with such an input is anybody's guess, and an answer
        return False
