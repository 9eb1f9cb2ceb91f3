"""Registers the Triton kernels of `sdan_fast.kernels` as the `.triton` overloads, the way torch.library.triton_op does.

On CUDA tensors an overload is opaque until functionalization, where it is replaced by the launches that it makes, so
that Inductor sees the kernels. Under Triton's interpreter it stays opaque and serves CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._op import LIBRARY, NAMESPACE, Op


def attach(ops: Iterable[Op]) -> None:
    """Register the kernels of every op that has a module of its name in `sdan_fast.kernels`."""
    for op in ops:
        if importlib.util.find_spec(f"sdan_fast.kernels.{op.name}") is None:
            continue
        module = importlib.import_module(f"sdan_fast.kernels.{op.name}")
        op.supports["triton"] = module.supports
        _register(f"{op.name}.triton", module.forward)
        op.kernels.add("triton")
        if hasattr(module, "backward"):
            _register(f"{op.name}_backward.triton", module.backward)
            op.backward_kernels.add("triton")


def _register(name: str, function: Callable[..., Tensor | list[Tensor]]) -> None:
    if backends.interpreting_triton():
        LIBRARY.impl(name, function, "CPU")
        return
    from torch._library.triton import set_wrap_triton_enabled
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def eager(*args: Any, **kwargs: Any) -> Any:
        with set_wrap_triton_enabled(False):  # the higher-order op costs about a millisecond a launch
            return function(*args, **kwargs)

    def decompose(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled():  # torch.export keeps the op whole
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return function(*args, **kwargs)

    LIBRARY.impl(name, eager, "CUDA")
    torch.library.register_torch_dispatch(
        f"{NAMESPACE}::{name}", FunctionalTensorMode, decompose, lib=LIBRARY
    )
