"""A model of time: what a launch's counts take at a GPU's public rates, and the floor that no kernel beats.

Every number from here is modelled, not measured. A launch takes as long as its busiest resource: DRAM, the units for
multiply-adds, tensor cores, special functions and integers, issue slots, or the data path of shared memory and L1; and
never less than one round trip to DRAM, since what it writes depends on what it reads. The model has no other
latencies, no launch overhead and no cache between blocks or launches; blocks go evenly to SMs, and the SM with the most
blocks decides. The floor is the largest of that round trip, the compulsory bytes over the bandwidth, and the op's own
multiply-adds over the rate of the unit that does them. The round trip is not added but a lower limit: added to both, it
would flatter the ratio of every launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .counts import Counts
from .devices import Gpu

# PTX classes by the unit that executes them; the rest (memory, control) only takes issue slots.
_FLOAT, _INTEGER, _SPECIAL = ("fp32", "fp16"), ("int", "pred", "cvt"), ("sfu",)
SECTOR_PATH = 128  # bytes per clock of an SM's L1 and shared memory


@dataclass(frozen=True)
class Needed:
    """Multiply-adds that the op's definition needs of a launch: on float32 lanes, and on tensor cores."""

    lanes: float = 0.0
    tensor: float = 0.0


@dataclass(frozen=True)
class Modelled:
    """Seconds of one launch on one GPU: on each resource, and the floor."""

    resources: dict[str, float]
    floor: float

    @property
    def seconds(self) -> float:
        return max(self.resources.values())

    @property
    def bound(self) -> str:
        return max(self.resources, key=lambda name: self.resources[name])

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor


def modelled(gpu: Gpu, counts: Counts, needed: Needed) -> Modelled:
    """The model of one launch. needed: what the op's definition needs of it."""
    blocks = max(counts.grid, 1)
    # Seconds per clock of one SM, times how much more the SM with the most blocks has than the average.
    clock = math.ceil(blocks / gpu.sms) / blocks / gpu.clock

    def of(classes: tuple[str, ...]) -> float:
        return sum(counts.instructions.get(c, 0.0) for c in classes)

    path = counts.loads[1] + counts.stores[1]
    resources = {
        "latency": gpu.latency,
        "DRAM": counts.moved / gpu.bandwidth,
        "FMA units": of(_FLOAT) * 32 / gpu.fma_lanes * clock,
        "integer units": of(_INTEGER) * 32 / gpu.int_lanes * clock,
        "special functions": of(_SPECIAL) * 32 / gpu.special_lanes * clock,
        "issue slots": counts.total / gpu.issue * clock,
        "shared memory and L1": (counts.wavefronts + path / SECTOR_PATH) * clock,
    }
    if counts.mma_flops:
        resources["tensor cores"] = counts.mma_flops / 2 / gpu.tensor
    arithmetic = max(needed.lanes / gpu.fma, needed.tensor / gpu.tensor)
    return Modelled(resources, max(gpu.latency, counts.compulsory / gpu.bandwidth, arithmetic))


@dataclass(frozen=True)
class Work:
    """Multiply-adds of plain PyTorch's kernels by kind.

    stencil: depth-wise convolutions and their input gradients. weights: depth-wise weight gradients. product: 1x1
    convolutions, their gradients, and matrix products.
    """

    stencil: float = 0.0
    weights: float = 0.0
    product: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.stencil + other.stencil, self.weights + other.weights, self.product + other.product)

    @property
    def total(self) -> float:
        return self.stencil + self.weights + self.product


@dataclass(frozen=True)
class EagerStep:
    """One kernel that eager PyTorch launches: its name, the bytes of its tensors, its multiply-adds.

    dense: these are products that tensor cores can do (16-bit, not depth-wise). reads, writes: the storages that its
    result depends on, and those of the result; a step is told from another by them alone.
    """

    name: str
    bytes: int
    work: Work
    dense: bool
    reads: frozenset[int] = field(default=frozenset(), compare=False)
    writes: frozenset[int] = field(default=frozenset(), compare=False)

    @property
    def multiply_adds(self) -> int:
        return int(self.work.total)


_FREE = ("view", "expand", "permute", "transpose", "reshape", "split", "slice", "select", "unsqueeze", "squeeze",
         "detach", "alias", "as_strided", "empty", "empty_like", "t", "_unsafe_view", "chunk", "unbind",
         "split_with_sizes", "new_empty", "_reshape_alias", "empty_strided", "new_empty_strided")  # fmt: skip


class EagerSteps(TorchDispatchMode):
    """Collects PyTorch's own kernels, in `steps`. With `skip`, those that only write their `out` are not run."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.steps: list[EagerStep] = []
        self.skip = skip
        self.kept: list[Any] = []  # what was seen, so that no other storage takes its name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        out = kwargs["out"] if self.skip and "out" in kwargs else func(*args, **kwargs)
        if name not in _FREE:
            distinct = {id(t): t for t in _tensors((args, kwargs, out))}
            size = sum(t.numel() * t.element_size() for t in distinct.values())
            work = _multiply_adds(name, args, out)
            dense = work.product > 0 and all(t.element_size() == 2 for t in _tensors(args))
            if not self.skip:
                self.kept.append((args, out))
            self.steps.append(
                EagerStep(name, size, work, dense, _storages(_operands(name, args, kwargs)), _storages(out))
            )
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _storages(values: Any) -> frozenset[int]:
    return frozenset(t.untyped_storage()._cdata for t in _tensors(values))


def _operands(name: str, args: Any, kwargs: Any) -> Any:
    """What a call's results depend on: of a convolution's saved tensors, those for the gradients that are wanted."""
    if name == "convolution_backward":
        gradient, x, weight = args[:3]
        return [gradient, x if args[-1][1] else None, weight if args[-1][0] else None]
    return args, kwargs


def _multiply_adds(name: str, args: Any, out: Any) -> Work:
    """Multiply-adds of one ATen call.

    FlopCounterMode is no help here: it counts the weight gradient of a grouped convolution as that of a dense one.
    """
    if name == "convolution":
        macs = out.numel() * args[1][0].numel()
        return Work(product=macs) if args[1].shape[1] > 1 else Work(stencil=macs)
    if name == "convolution_backward":
        gradient, _, weight = args[:3]
        macs = gradient.numel() * weight[0].numel()
        of_x, of_weight = (macs * int(wanted) for wanted in args[-1][:2])
        return Work(product=of_x + of_weight) if weight.shape[1] > 1 else Work(of_x, of_weight)
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left = args[1] if "add" in name else args[0]
        return Work(product=out.numel() * left.shape[-1])
    return Work()


def live(steps: Sequence[EagerStep], results: Any) -> list[EagerStep]:
    """The steps that the results depend on: a linear op's input gradient, for one, takes no forward."""
    wanted, kept = set(_storages(results)), []
    for step in reversed(steps):
        if step.writes & wanted:
            wanted |= step.reads
            kept.append(step)
    return kept[::-1]


def eager_steps(call: Callable[[], Any], *, needed: bool = False) -> list[EagerStep]:
    """The kernels of plain PyTorch in a call, views left out; `needed`: only those that its results depend on."""
    with EagerSteps() as mode:
        results = call()
    return live(mode.steps, results) if needed else mode.steps


def step_seconds(gpu: Gpu, step: EagerStep) -> float:
    """One of PyTorch's kernels at its own floor."""
    rate = gpu.tensor if step.dense else gpu.fma
    return max(gpu.latency, step.bytes / gpu.bandwidth, step.multiply_adds / rate)


def eager_seconds(gpu: Gpu, steps: list[EagerStep]) -> float:
    """The same model of an unfused sequence, with every kernel at its own floor: kinder to it than to ours."""
    return sum(step_seconds(gpu, step) for step in steps)


def on_meta(value: Any) -> Any:
    """Arguments without data."""
    if isinstance(value, Tensor):
        return value.to("meta")
    return [on_meta(v) for v in value] if isinstance(value, list) else value


def reference_calls(
    op: str, args: list[Any], kwargs: dict[str, Any], mask: list[bool] | None
) -> Callable[[], Any]:
    """The plain PyTorch sequence of an op's forward (mask None) or backward, on meta tensors."""
    from sdan_fast.ops import OPS

    meta = on_meta(args)
    if mask is None:
        return lambda: OPS[op].reference(*meta, **kwargs)
    with torch.no_grad():
        gradient = torch.empty_like(OPS[op].reference(*meta, **kwargs))
    return lambda: OPS[op].reference_backward(gradient, *meta, **kwargs, output_mask=mask)
