"""A model of time: what a launch's counts take at a GPU's public rates, and the floor that no kernel beats.

Every number from here is modelled, not measured. A launch takes as long as its busiest resource: DRAM, the units for
multiply-adds, tensor cores, special functions and integers, issue slots, or the data path of shared memory and L1. The
model has no latencies, no launch overhead and no cache between blocks; blocks go evenly to SMs, and the SM with the
most blocks decides. The floor is the larger of the compulsory bytes over the bandwidth and the op's own multiply-adds
over the rate of the unit that may do them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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


def modelled(gpu: Gpu, counts: Counts, multiply_adds: float, tensor_cores: bool) -> Modelled:
    """The model of one launch. multiply_adds: what the op needs of it; tensor_cores: whether these may do them."""
    blocks = max(counts.grid, 1)
    # Seconds per clock of one SM, times how much more the SM with the most blocks has than the average.
    clock = math.ceil(blocks / gpu.sms) / blocks / gpu.clock

    def of(classes: tuple[str, ...]) -> float:
        return sum(counts.instructions.get(c, 0.0) for c in classes)

    path = counts.loads[1] + counts.stores[1]
    resources = {
        "DRAM": counts.moved / gpu.bandwidth,
        "FMA units": of(_FLOAT) * 32 / gpu.fma_lanes * clock,
        "integer units": of(_INTEGER) * 32 / gpu.int_lanes * clock,
        "special functions": of(_SPECIAL) * 32 / gpu.special_lanes * clock,
        "issue slots": counts.total / gpu.issue * clock,
        "shared memory and L1": (counts.wavefronts + path / SECTOR_PATH) * clock,
    }
    if counts.mma_flops:
        resources["tensor cores"] = counts.mma_flops / 2 / gpu.tensor
    rate = gpu.tensor if tensor_cores else gpu.fma
    return Modelled(resources, max(counts.compulsory / gpu.bandwidth, multiply_adds / rate))


@dataclass(frozen=True)
class EagerStep:
    """One kernel that eager PyTorch launches: its name, the bytes of its tensors, its multiply-adds.

    dense: these are products that tensor cores can do (16-bit, not depth-wise).
    """

    name: str
    bytes: int
    multiply_adds: int
    dense: bool


_FREE = ("view", "expand", "permute", "transpose", "reshape", "split", "slice", "select", "unsqueeze", "squeeze",
         "detach", "alias", "as_strided", "empty", "empty_like", "t", "_unsafe_view", "chunk", "unbind",
         "split_with_sizes", "new_empty", "_reshape_alias", "empty_strided", "new_empty_strided")  # fmt: skip


class EagerSteps(TorchDispatchMode):
    """Collects PyTorch's own kernels, in `steps`. With `skip`, those that only write their `out` are not run."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.steps: list[EagerStep] = []
        self.skip = skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        out = kwargs["out"] if self.skip and "out" in kwargs else func(*args, **kwargs)
        if name not in _FREE:
            distinct = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in distinct.values())
            macs, dense = _multiply_adds(name, args, out)
            self.steps.append(
                EagerStep(name, size, macs, dense and all(t.element_size() == 2 for t in inputs))
            )
        return out


def _multiply_adds(name: str, args: Any, out: Any) -> tuple[int, bool]:
    """(multiply-adds, whether of a dense product) of one ATen call.

    FlopCounterMode is no help here: it counts the weight gradient of a grouped convolution as that of a dense one.
    """
    if name == "convolution":
        return out.numel() * args[1][0].numel(), args[1].shape[1] > 1
    if name == "convolution_backward":
        gradient, _, weight = args[:3]
        return sum(args[-1][:2]) * gradient.numel() * weight[0].numel(), weight.shape[1] > 1
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left = args[1] if "add" in name else args[0]
        return out.numel() * left.shape[-1], True
    return 0, False


def eager_steps(call: Callable[[], Any]) -> list[EagerStep]:
    """The kernels of plain PyTorch in a call, views left out."""
    with EagerSteps() as mode:
        call()
    return mode.steps


def step_seconds(gpu: Gpu, step: EagerStep) -> float:
    """One of PyTorch's kernels at its own floor."""
    rate = gpu.tensor if step.dense else gpu.fma
    return max(step.bytes / gpu.bandwidth, step.multiply_adds / rate)


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
