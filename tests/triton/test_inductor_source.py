"""What Inductor writes down of a kernel, for a file of its own, is all that the kernel needs: checked without a GPU."""

from __future__ import annotations

import builtins
import importlib
import os
import pkgutil
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("interpreted kernels are no JITFunctions", allow_module_level=True)

from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from triton.runtime.jit import ConstexprFunction, JITFunction

import sdan_fast.kernels
from sdan_fast.bench import cases
from sdan_fast.kernels import launch
from sdan_fast.ops import OPS
from tests.ops.harness import captured


def launched() -> list[Any]:
    """Every kernel that some op launches, forward or backward, in either layout."""
    found: dict[str, Any] = {}

    def note(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        found[kernel.fn.__name__] = kernel

    with launch.launched_by(note):
        for name in [module.name for module in pkgutil.iter_modules(sdan_fast.kernels.__path__)]:
            if name not in OPS:
                continue
            subject, module = cases.SUBJECTS[name], importlib.import_module(f"sdan_fast.kernels.{name}")
            for layout in cases.LAYOUTS:
                args, kwargs = cases.Case(subject, subject.variants[0], (9, 12), batch=2).arguments(layout)
                op, flat, options = captured(name, args, kwargs)
                y = module.forward(*flat, **options)
                mask = [slot is not None for slot in op.slots(flat)]
                module.backward(torch.ones_like(y), *flat, **options, output_mask=mask)
    return list(found.values())


KERNELS = launched()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_the_source_that_inductor_copies_is_whole(kernel: Any) -> None:
    source = user_defined_triton_kernel_transitive_closure_source_code(kernel)
    known = set(vars(builtins)) | {"triton", "tl"}
    defined = {line.split("def ")[1].split("(")[0] for line in source.splitlines() if line.startswith("def ")}
    defined |= {
        line.split("=")[0].split(":")[0].strip() for line in source.splitlines() if " = tl.constexpr(" in line
    }
    defined |= {line.rsplit(" ", 1)[1] for line in source.splitlines() if line.startswith("from ")}
    seen: dict[str, Any] = {}

    def walk(function: Any) -> None:
        code = function.fn.__code__
        for inner in (code, *(c for c in code.co_consts if hasattr(c, "co_names"))):
            for name in inner.co_names:
                if name in function.fn.__globals__ and name not in known:
                    assert name in defined, (
                        f"{function.fn.__name__} needs {name}, which Inductor does not copy"
                    )
                    value = function.fn.__globals__[name]
                    assert seen.setdefault(name, value) is value, (
                        f"two of its functions mean different {name}"
                    )
                    if isinstance(value, JITFunction | ConstexprFunction) and value is not function:
                        walk(value)

    walk(kernel)


def test_all_kernels_are_seen() -> None:
    assert len(KERNELS) >= 15
