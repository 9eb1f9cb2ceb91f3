"""GPU kernel launches of one RSDAM, forward and backward: PyTorch's own ops before, the Triton kernels after.

    python scripts/launch_counts.py          # prints the table of docs/triton.md; needs Triton, and no GPU

Nothing is measured and no kernel runs: a TorchDispatchMode counts the aten ops that launch kernels on a GPU, and
kernels/launch.py the Triton kernels that would be launched. An aten op counts as one launch, and as one for each
gradient that it computes. That is the least: cuDNN, for instance, often takes more for one convolution.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # so that the Triton backend takes CPU tensors; before its import

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdan_fast
from sdan_fast.kernels.launch import launched_by
from sdan_fast.modules import BRANCHES, MMLKA, RSDAM

# Ops that allocate or look, and launch nothing.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "is_same_size"}


class LaunchCounter(TorchDispatchMode):
    """Counts, by name, what would be launched on a GPU: aten ops here, Triton kernels in `counting`.

    It looks into this package's Triton ops, and records the overloads that it sees in `overloads`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.overloads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sdan_fast":
            name, overload = func._schema.name.removeprefix("sdan_fast::"), func._overloadname
            self.overloads[f"{name}.{overload}"] += 1
            if (
                overload == "triton"
            ):  # the op's own Python, with this mode on, so that its aten ops count as well
                module = importlib.import_module(f"sdan_fast.kernels.{name.removesuffix('_backward')}")
                with self:
                    return (module.backward if name.endswith("_backward") else module.forward)(
                        *args, **kwargs
                    )
        elif not _is_silent(func):
            self.launches[func._schema.name] += _gradients(func, args)
        return func(*args, **kwargs)


def _is_silent(func: Any) -> bool:
    """Whether an aten op launches no kernel: views, allocations, questions."""
    returns = func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return view or not returns or func._schema.name.removeprefix("aten::") in SILENT


def _gradients(func: Any, args: Any) -> int:
    """1, or for an op that computes several gradients, how many of them."""
    if func._schema.name.endswith("_backward") and func._schema.arguments[-1].name == "output_mask":
        return sum(args[-1])
    return 1


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    """Count every launch of the block; Triton kernels are counted and not run, so numbers mean nothing."""
    counter = LaunchCounter()

    def count(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        counter.launches[f"triton::{kernel.fn.__name__}"] += 1

    with counter, launched_by(count):
        yield counter


def launches(
    module: Callable[[Tensor], Tensor], x: Tensor, backend: str
) -> tuple[Counter[str], Counter[str]]:
    """What a module launches forward and backward (gradients in its input and in all of its parameters)."""
    x = x.detach().requires_grad_()
    with sdan_fast.use_backend(backend):
        with counting() as forward:
            y = module(x)
        grad = torch.ones_like(y)
        with counting() as backward:
            torch.autograd.backward(y, grad)
    return forward.launches, backward.launches


def table(channels: dict[int, int] | None = None) -> str:
    """The launches of RSDAM, and of the attention in it, for every table of branches and both memory formats."""
    lines = [
        "| groups | layout | RSDAM forward, before | after | backward, before | after | `mm_lka` forward | backward |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for groups in BRANCHES:
        width = 48 if groups == 3 else 56
        for name, fmt in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
            x = torch.zeros(1, width, 8, 16).contiguous(memory_format=fmt)
            counts = [
                counter.total()
                for module, backend in (
                    (RSDAM(width, groups), "reference"),
                    (RSDAM(width, groups), "triton"),
                    (MMLKA(width, groups), "triton"),
                )
                for counter in launches(module, x, backend)
            ]
            eager, eager_back, ours, ours_back, attention, attention_back = counts
            cells = (groups, name, eager, ours, eager_back, ours_back, attention, attention_back)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
