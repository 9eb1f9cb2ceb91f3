"""The one mechanism behind every op: schema, fake kernel, autograd, autocast, vmap, FLOP formula, backends.

An op `sdan_fast::<name>` has one overload per backend, so that a graph says who runs what: `.cpu`, `.triton`, `.cuda`,
and the unnamed one, which asks `sdan_fast.backends` at run time. `sdan_fast::<name>_backward` takes the gradient of the
output, then the forward's arguments, then `output_mask`, and returns the gradients asked for; its unnamed overload is
the reference formula. C++ registers its kernels for these names by itself; a backend's table of kernels is read back
from the dispatcher. docs/decisions.md says why it is done this way, with the measured call overheads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry, shape_wrapper

from .. import backends

NAMESPACE = "sdan_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS: dict[str, Op] = {}
_PLAIN = (Tensor, torch.nn.Parameter)

_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active
_autocasting = torch._C._is_any_autocast_enabled
_batched = torch._C._functorch.is_legacy_batchedtensor


def _forward_mode() -> bool:
    """Whether tensors may carry tangents: kernels below autograd would lose them without a word."""
    return forward_ad._current_level >= 0


def _no_backward(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("a composed op is differentiated through its parts")


@dataclass(eq=False)
class Op:
    """One op and everything that torch knows of it.

    Attributes:
        name: the op is `torch.ops.sdan_fast.<name>`.
        arguments: its schema between the parentheses.
        check: raises ValueError or TypeError for arguments that the op refuses; takes the op's arguments.
        reference: the op in plain PyTorch; takes the op's arguments.
        flops: takes the op's arguments with shapes for tensors.
        reference_backward: its gradient in plain PyTorch; takes (grad_output, the op's arguments, output_mask) and
            returns one gradient or None for every tensor slot.
        backward_flops: takes (the op's arguments with shapes for tensors, output_mask).
        autocast: takes (the tensors, lower precision dtype, device type) and returns (the dtype to compute in,
            the dtype that the reference sequence returns).
        output_shape: takes the op's arguments; the output's shape where it is not the first tensor's.
        plain_elsewhere: whether a named backend without a kernel for it leaves it to plain PyTorch.
        kernel_checks: where the CPU kernel itself refuses every tensor that `check` refuses: takes the op's arguments,
            and returns whether the others, too, are such that the kernel checks them.
    """

    name: str
    arguments: str
    check: Callable[..., None]
    reference: Callable[..., Tensor]
    flops: Callable[..., int]
    reference_backward: Callable[..., Sequence[Tensor | None]] = _no_backward
    backward_flops: Callable[..., int] = _no_backward
    autocast: Callable[[Sequence[Tensor], torch.dtype, str], tuple[torch.dtype, torch.dtype]] | None = None
    output_shape: Callable[..., list[Any]] | None = None
    plain_elsewhere: bool = False
    kernel_checks: Callable[..., bool] | None = None

    composed: ClassVar[bool] = False  # see ComposedOp

    kernels: set[str] = field(default_factory=set, init=False)  # the backends with a forward kernel
    backward_kernels: set[str] = field(default_factory=set, init=False)
    supports: dict[str, Callable[..., str | None]] = field(
        default_factory=dict, init=False
    )  # why not these arguments
    slower: dict[str, Callable[..., str | None]] = field(
        default_factory=dict, init=False
    )  # where "auto" prefers plain PyTorch to this backend, and why: measured, see docs/performance.md
    overloads: dict[str, Any] = field(default_factory=dict, init=False)  # by backend; "" asks at run time
    backward_overloads: dict[str, Any] = field(default_factory=dict, init=False)
    kinds: tuple[str, ...] = field(default=(), init=False)  # the types of the positional arguments

    def __post_init__(self) -> None:
        schema = torch._C.parse_schema(f"{NAMESPACE}::{self.name}({self.arguments}) -> Tensor")
        positional = [a for a in schema.arguments if not a.kwarg_only]
        self.kinds = tuple(str(a.type) for a in positional)
        OPS[self.name] = self
        self.define("")
        self.define_backward("")
        self._register_dispatched()

    def requires_grad(self, args: Sequence[Any]) -> bool:
        """Whether autograd has to record a call with these arguments."""
        return torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in self.flatten(args)
        )

    # -- calling ----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Check the arguments, choose a backend, run it; differentiable, compilable, autocast-aware."""
        if _autocasting():
            return self._autocast_call(args, kwargs)
        if self.kernel_checks is not None and (found := self._checked_by_kernel(args, kwargs)) is not None:
            return found
        self.check(*args, **kwargs)
        backend = backends.choose(self, args, kwargs)
        if _transforms_active():  # vmap, jvp and the like see through plain PyTorch best
            return self.reference(*args, **kwargs)
        if backend == "reference":
            if self._left_to_pytorch_with_gradient(args):
                return self.differentiable("", args, kwargs)
            return self.reference(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.overloads[backend](*args, **kwargs)
        if _forward_mode():
            return self.reference(*args, **kwargs)
        if torch.is_grad_enabled():
            return self.differentiable(backend, args, kwargs)
        with _below_autograd():
            return self.overloads[backend](*args, **kwargs)

    def _checked_by_kernel(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result of a plain CPU call in inference, whose checks here would take longer than a small kernel.

        None for every other call, and for one that the kernel refuses: then the checks say what is wrong with it.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not args:
            return None
        x = args[0]
        for arg in args:
            for t in arg if type(arg) is list else (arg,):
                if type(t) in _PLAIN:
                    if not t.is_cpu:
                        return None
                elif t is not None and type(t) is not float:
                    return None
        if (
            type(x) not in _PLAIN
            or x.dtype not in backends.KERNEL_DTYPES
            or x.numel() == 0
            or "cpu" not in self.kernels
            or backends.named() not in ("auto", "cpu")
            or _transforms_active()
            or _forward_mode()
        ):
            return None
        try:
            if not self.kernel_checks(*args, **kwargs):  # type: ignore[misc]
                return None
            slower = self.slower.get("cpu")
            if slower is not None and backends.named() == "auto" and slower(*args, **kwargs) is not None:
                return None
            with _below_autograd():
                return self.overloads["cpu"](*args, **kwargs)
        except Exception:
            return None

    def _left_to_pytorch_with_gradient(self, args: tuple[Any, ...]) -> bool:
        """Whether a call that no kernel takes needs this op's own gradient formula.

        PyTorch's 16-bit channels_last gradients on a CPU crash or are wrong for some convolutions, which the formula
        avoids (docs/decisions.md); where the reference is named, plain PyTorch is what was asked for.
        """
        x = args[0]
        return (
            not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and x.element_size() == 2
            and backends.current_backend() != "reference"
            and not _forward_mode()
            and self.requires_grad(args)
        )

    def _autocast_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute in the dtype that the op's rule says, and return what the reference sequence would."""
        device_type = _device_type(args)
        cast = self._autocast_arguments(args, device_type) if torch.is_autocast_enabled(device_type) else None
        if cast is None:
            with torch.autocast(device_type, enabled=False):
                return self(*args, **kwargs)
        cast_args, returned = cast
        self.check(*cast_args, **kwargs)
        if backends.choose(
            self, cast_args, kwargs
        ) == "reference" and not self._left_to_pytorch_with_gradient(cast_args):
            return self.reference(*args, **kwargs)  # autocast does there what it always does
        with torch.autocast(device_type, enabled=False):
            return self(*cast_args, **kwargs).to(returned)

    def differentiable(self, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run one overload with its autograd. The dispatcher's own way here costs about 10 us more a call."""
        overload = self.overloads[backend]
        if torch.is_grad_enabled():
            tensors = self.flatten(args)
            if any(t.requires_grad for t in tensors):
                return _Function.apply(_Call(self, backend, False, args, kwargs), *tensors)
        with _below_autograd():
            return overload(*args, **kwargs)

    def differentiable_backward(
        self, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        """Run one overload of the backward op, itself differentiable; `args` begin with grad_output."""
        # Under autograd's is_grads_batched, for which kernels have no rules, and plain PyTorch has.
        if _batched(args[0]) or _transforms_active():
            grads = self.reference_backward(*args, **kwargs)
            return [
                g for g, wanted in zip(grads, kwargs["output_mask"], strict=True) if wanted and g is not None
            ]
        overload = self.backward_overloads[backend]
        if torch.is_grad_enabled():
            tensors = [args[0], *self.flatten(args[1:])]
            if any(t.requires_grad for t in tensors):
                return list(_Function.apply(_Call(self, backend, True, args, kwargs), *tensors))
        with _below_autograd():
            return overload(*args, **kwargs)

    # -- arguments --------------------------------------------------------------------------------------------

    def flatten(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors of the op's positional arguments, in order; a bias that is None has no entry."""
        tensors: list[Tensor] = []
        for kind, arg in zip(self.kinds, args, strict=False):
            if kind == "List[Tensor]":
                tensors.extend(arg)
            elif arg is not None and kind in ("Tensor", "Optional[Tensor]"):
                tensors.append(arg)
        return tensors

    def unflatten(self, args: Sequence[Any], tensors: Iterable[Any]) -> tuple[Any, ...]:
        """`args` with its tensors replaced, in order; the other arguments stay."""
        it = iter(tensors)
        rebuilt: list[Any] = []
        for kind, arg in zip(self.kinds, args, strict=False):
            if kind == "List[Tensor]":
                rebuilt.append([next(it) for _ in arg])
            elif arg is not None and kind in ("Tensor", "Optional[Tensor]"):
                rebuilt.append(next(it))
            else:
                rebuilt.append(arg)
        return tuple(rebuilt)

    def slots(self, args: Sequence[Any]) -> list[Any]:
        """One entry per tensor slot of the schema, as `output_mask` counts them: an absent bias is None."""
        slots: list[Any] = []
        for i, kind in enumerate(self.kinds):
            arg: Any = args[i] if i < len(args) else None
            if kind == "List[Tensor]":
                slots.extend(arg)
            elif kind in ("Tensor", "Optional[Tensor]"):
                slots.append(arg)
        return slots

    # -- registration -----------------------------------------------------------------------------------------

    def define(self, backend: str) -> None:
        """Define the overload of one backend, with its fake kernel, autograd and vmap rule."""
        qualified = _qualified(self.name, backend)
        _forget_flops(self.name)
        LIBRARY.define(f"{qualified}({self.arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        overload = getattr(getattr(torch.ops.sdan_fast, self.name), backend or "default")
        self.overloads[backend] = overload
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", self._fake, lib=LIBRARY)

        def autograd(*args: Any, **kwargs: Any) -> Tensor:
            # torch.func.grad and the like: nodes of autograd.Function cannot nest there
            if _transforms_active() or _forward_mode():
                return self.reference(*args, **kwargs)
            return self.differentiable(backend, args, kwargs)

        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
            def example(i: int) -> tuple[Any, ...]:
                return pytree.tree_map(
                    lambda arg, dim: arg if dim is None else arg.select(dim, i), args, in_dims
                )

            return torch.stack([overload(*example(i), **kwargs) for i in range(info.batch_size)]), 0

        LIBRARY.impl(qualified, autograd, "Autograd")
        torch.library.register_vmap(f"{NAMESPACE}::{qualified}", vmap, lib=LIBRARY)
        self._register_flops(overload, lambda *args, **kwargs: self.flops(*args, **kwargs))

    def define_backward(self, backend: str) -> None:
        """Define the backward op's overload of one backend."""
        positional, _, keyword = self.arguments.partition(" *,")
        keyword = f"{keyword.strip()}, bool[] output_mask" if keyword else "bool[] output_mask"
        arguments = f"Tensor grad_output, {positional.rstrip(', ')}, *, {keyword}"
        qualified = _qualified(f"{self.name}_backward", backend)
        _forget_flops(f"{self.name}_backward")
        LIBRARY.define(f"{qualified}({arguments}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
        overload = getattr(getattr(torch.ops.sdan_fast, f"{self.name}_backward"), backend or "default")
        self.backward_overloads[backend] = overload
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", self._fake_backward, lib=LIBRARY)

        def autograd(*args: Any, **kwargs: Any) -> list[Tensor]:
            return self.differentiable_backward(backend, args, kwargs)

        LIBRARY.impl(qualified, autograd, "Autograd")
        self._register_flops(overload, lambda _grad, *args, **kwargs: self.backward_flops(*args, **kwargs))

    def _register_dispatched(self) -> None:
        """The unnamed overloads: who runs is asked at run time, and the backward is the reference formula."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            self.check(*args, **kwargs)
            backend = backends.choose(self, args, kwargs)
            if backend != "reference":
                return self.overloads[backend](*args, **kwargs)
            with torch.autocast(_device_type(args), enabled=False):
                out = self.reference(*args, **kwargs)
            return out.contiguous(memory_format=output_format(args[0]))

        def backward(grad_output: Tensor, *args: Any, output_mask: list[bool], **kwargs: Any) -> list[Tensor]:
            with torch.autocast(_device_type(args), enabled=False):
                grads = self.reference_backward(grad_output, *args, **kwargs, output_mask=output_mask)
            return [
                g.contiguous(memory_format=output_format(like))
                for g, like, wanted in zip(grads, self.slots(args), output_mask, strict=True)
                if wanted and g is not None
            ]

        def autocast(*args: Any, **kwargs: Any) -> Tensor:
            device_type = _device_type(args)
            cast = self._autocast_arguments(args, device_type)
            with torch.autocast(device_type, enabled=False):
                if cast is None:
                    return self.overloads[""](*args, **kwargs)
                return self.overloads[""](*cast[0], **kwargs).to(cast[1])

        LIBRARY.impl(self.name, forward, "CompositeExplicitAutograd")
        if not self.composed:
            LIBRARY.impl(f"{self.name}_backward", backward, "CompositeExplicitAutograd")
        for key in ("AutocastCPU", "AutocastCUDA"):
            LIBRARY.impl(self.name, self.reference if self.composed else autocast, key)

    def _register_flops(self, overload: Any, formula: Callable[..., int]) -> None:
        """Torch keeps FLOP formulas by op, whose hash changes with every overload: so after each one, anew."""

        def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
            return formula(*args, **kwargs)

        flop_registry[overload._overloadpacket] = shape_wrapper(flops)

    # -- what torch calls -------------------------------------------------------------------------------------

    def _fake(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        shape = list(x.shape) if self.output_shape is None else self.output_shape(*args, **kwargs)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=output_format(x))

    def _fake_backward(self, _grad: Tensor, *args: Any, output_mask: list[bool], **_: Any) -> list[Tensor]:
        return [
            torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=output_format(t))
            for t, wanted in zip(self.slots(args), output_mask, strict=True)
            if wanted
        ]

    def _autocast_arguments(
        self, args: tuple[Any, ...], device_type: str
    ) -> tuple[tuple[Any, ...], torch.dtype] | None:
        """The arguments in the dtype to compute in, and the dtype to return; None where autocast stays out."""
        tensors = self.flatten(args)
        if any(t.dtype not in FLOATING or t.dtype == torch.float64 for t in tensors):
            return None
        assert self.autocast is not None
        computed, returned = self.autocast(tensors, torch.get_autocast_dtype(device_type), device_type)
        return self.unflatten(args, [t.to(computed) for t in tensors]), returned


def _qualified(name: str, backend: str) -> str:
    return f"{name}.{backend}" if backend else name


def _device_type(args: Sequence[Any]) -> str:
    return args[0].device.type if isinstance(args[0], Tensor) else "cpu"


def output_format(x: Tensor) -> torch.memory_format:
    """The memory format of an op's output, from its first tensor; see `sdan_fast.reference.output_format`."""
    from ..reference import output_format as rule

    return rule(x)


@dataclass(eq=False)
class ComposedOp(Op):
    """An op made of other ops, whose kernels fuse them for inference.

    Where a gradient is needed, under autocast, or where no kernel can run the call, it is its parts: `reference` is
    here their composition, which chooses a backend for each. So it has no backward of its own.
    """

    composed: ClassVar[bool] = True

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if _autocasting() or _transforms_active():
            return self.reference(*args, **kwargs)
        if not torch.compiler.is_compiling() and _forward_mode():
            return self.reference(*args, **kwargs)
        backend = backends.choose(self, args, kwargs) if isinstance(args[0], Tensor) else "reference"
        if backend == "reference" or self.requires_grad(args):
            self.check(*args, **kwargs)
            return self._compose(args, kwargs)
        if torch.compiler.is_compiling():
            self.check(*args, **kwargs)
            return self.overloads[backend](*args, **kwargs)
        # The kernels check what they read, and of images without pixels they read nothing.
        if args[0].numel() == 0:
            self.check(*args, **kwargs)
        try:
            with _below_autograd():
                return self.overloads[backend](*args, **kwargs)
        except (RuntimeError, TypeError):
            # The kernel checks its hundreds of tensors itself, in a hundredth of the time; here they are only named.
            self.check(*args, **kwargs)
            raise

    def differentiable(self, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the dispatcher runs where autograd is looking."""
        if self.requires_grad(args):
            return self._compose(args, kwargs)
        with _below_autograd():
            return self.overloads[backend](*args, **kwargs)

    def _compose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The parts; their last sum may lie as a transposed operand does, and not as an op's result."""
        return self.reference(*args, **kwargs).contiguous(memory_format=output_format(args[0]))

    def define_backward(self, backend: str) -> None:
        """There is none: the parts have theirs."""


# --- autograd ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    """One call of a forward or backward overload, as its autograd needs it; the tensors are saved beside it."""

    op: Op
    backend: str
    is_backward: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Tensor | tuple[Tensor, ...]:
        if self.is_backward:
            return tuple(self.op.backward_overloads[self.backend](*self.args, **self.kwargs))
        if self.backend == "":  # remember who runs it: the backward must be the same, also outside the `with`
            chosen = backends.choose(self.op, self.args, self.kwargs)
            self.backend = "" if chosen == "reference" else chosen
        return self.op.overloads[self.backend](*self.args, **self.kwargs)

    def gradients(
        self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...], grads: tuple[Tensor, ...]
    ) -> list[Tensor | None]:
        """One gradient or None for each of the call's tensors."""
        if self.is_backward:
            return self._second_order(tensors, needs, grads)
        op = self.op
        args = op.unflatten(self.args, tensors)
        it = iter(needs)
        mask = [slot is not None and next(it) for slot in op.slots(args)]
        backend = self.backend if self.backend in op.backward_kernels else ""
        found = iter(
            op.differentiable_backward(backend, (grads[0], *args), {**self.kwargs, "output_mask": mask})
        )
        return [next(found) if needed else None for needed in needs]

    def _second_order(
        self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...], grads: tuple[Tensor, ...]
    ) -> list[Tensor | None]:
        """Differentiate the reference's own gradient: exact, of any order, and not what a kernel is needed for."""
        op, create_graph = self.op, torch.is_grad_enabled()
        kwargs = dict(self.kwargs)
        mask = kwargs.pop("output_mask")
        with torch.enable_grad():
            # Fresh aliases, so that differentiating stops at this call's inputs and yet stays differentiable.
            alias = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
            args = op.unflatten(self.args[1:], alias[1:])
            wanted = [t for t, selected in zip(op.slots(args), mask, strict=True) if selected]
            y = op.reference(*args, **kwargs)
            first = torch.autograd.grad(y, wanted, alias[0], create_graph=True)
            pairs = [(f, g) for f, g in zip(first, grads, strict=True) if f.requires_grad]
            targets = [t for t, needed in zip(alias, needs, strict=True) if needed]
            second = torch.autograd.grad(
                [f for f, _ in pairs],
                targets,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        found = iter(second)
        return [next(found) if needed else None for needed in needs]


def _forget_flops(name: str) -> None:
    """Take an op's formula out of torch's table before an overload is added, which changes the op's hash.

    A dict finds a key by identity along the way of its new hash too, and so would now and then keep the entry where the
    old hash had put it, to be lost when the table grows.
    """
    packet = getattr(torch.ops.sdan_fast, name, None)
    if packet is not None:
        flop_registry.pop(packet, None)


class _Function(torch.autograd.Function):
    """The autograd node of a call: it saves the inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Any:
        with _below_autograd():
            out = call.run()
        ctx.call = call
        ctx.save_for_backward(*tensors)
        call.args = _without_tensors(call.args)  # the saved ones are enough, and are version-checked
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, *ctx.call.gradients(ctx.saved_tensors, ctx.needs_input_grad[1:], grads))


_PRESENT = object()  # stands for a saved tensor in `_Call.args`


def _without_tensors(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return pytree.tree_map_only(Tensor, lambda _: _PRESENT, args)


# --- kernels -----------------------------------------------------------------------------------------------------


def attach_kernels() -> None:
    """Define every backend's overloads and fill the table of who has a kernel for what."""
    for backend in backends.ORDER[:-1]:
        for op in OPS.values():
            op.define(backend)
            op.define_backward(backend)
    if backends.BACKENDS["triton"].missing is None:
        from . import _triton

        _triton.attach(OPS.values())
    if backends.BACKENDS["cuda"].missing is None:
        from . import _cuda

        _cuda.attach()
    for name in ("cpu", "cuda"):
        attach_compiled(name, name.upper())
    _attach_stubs()


def attach_compiled(backend: str, dispatch_key: str) -> None:
    """Find in the dispatcher what an extension module registered for one backend's overloads."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in OPS.values():
        if has(f"{NAMESPACE}::{op.name}.{backend}", dispatch_key):
            op.kernels.add(backend)
        if not op.composed and has(f"{NAMESPACE}::{op.name}_backward.{backend}", dispatch_key):
            op.backward_kernels.add(backend)


def _attach_stubs() -> None:
    """Say in one sentence why an overload cannot run on CPU tensors or at all, instead of the dispatcher's page."""
    for backend in backends.ORDER[:-1]:
        requirements = backends.BACKENDS[backend]
        for op in OPS.values():
            for kernels, name in ((op.kernels, op.name), (op.backward_kernels, f"{op.name}_backward")):
                if name != op.name and op.composed:
                    continue
                if backend not in kernels:
                    key, reason = (
                        "CompositeExplicitAutograd",
                        f"the {backend} backend has no kernel for {name}",
                    )
                elif "cpu" not in requirements.devices:
                    key, reason = "CPU", f"the {backend} backend runs on {requirements.devices[0]} tensors"
                else:
                    continue
                qualified, why = _qualified(name, backend), requirements.missing or reason

                def stub(*_: Any, _name: str = qualified, _reason: str = why, **__: Any) -> Any:
                    raise RuntimeError(f"sdan_fast::{_name} cannot run: {_reason}")

                LIBRARY.impl(qualified, stub, key)
