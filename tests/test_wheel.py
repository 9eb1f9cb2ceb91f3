"""What every installed package has to show, whatever torch it meets; scripts/wheel_check.py runs this file.

It needs nothing but torch, numpy, pytest and the installed package. In a checkout it tests the editable
install.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sdan_fast
from sdan_fast import functional, reference

PACKAGE = Path(sdan_fast.__file__).parent
EXPECTED_TORCH = os.environ.get("SDAN_FAST_WHEEL_CHECK")  # set by wheel_check: which torch this run is about
INFO = PACKAGE / "_build_info.json"

C, K = 6, 5  # channels and taps: no multiple of any vector


def _draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def _stage(t: Callable[..., Tensor], dilation: int) -> tuple[Any, ...]:
    return t(C, 1, 1, K), t(C), t(C, 1, K, 1), t(C), dilation


def _branches(t: Callable[..., Tensor]) -> list[list[tuple[Any, ...]]]:
    half = C // 2
    return [
        [(t(half, 1, 3, 3), t(half), 1), (t(half, 1, 3, 3), None, 2)],
        [(t(half, 1, 1, K), t(half), 1), (t(half, 1, K, 1), t(half), 1), (t(half, 1, 1, K), t(half), 3)],
    ]


IMAGE = (2, C, 9, 13)
CALLS: dict[str, Callable[[Callable[..., Tensor]], tuple[Any, ...]]] = {
    "star": lambda t: (t(*IMAGE), t(*IMAGE)),
    "depthwise_conv2d": lambda t: (t(*IMAGE), t(C, 1, 3, K), t(C)),
    "separable_conv2d": lambda t: (t(*IMAGE), *_stage(t, 1)[:4]),
    "strip_conv_chain": lambda t: (t(*IMAGE), [_stage(t, 1), _stage(t, 3)]),
    "layer_norm2d": lambda t: (t(*IMAGE), t(C), t(C)),
    "pointwise_conv2d": lambda t: (t(*IMAGE), t(7, C, 1, 1), t(7)),
    "pointwise_gate": lambda t: (t(*IMAGE), t(2, 4, 9, 13), t(C, 4, 1, 1), t(C)),
    "star_conv": lambda t: (
        t(*IMAGE), t(C), t(C), t(8, C, 1, 1), t(8, 1, 3, 3), t(8), t(8, C, 1, 1),
    ),
    "mm_lka": lambda t: (t(*IMAGE), _branches(t), t(C, C, 1, 1), t(C)),
}  # fmt: skip


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype)
    return type(tree)(_cast(item, dtype) for item in tree) if isinstance(tree, (list, tuple)) else tree


def build_info() -> dict[str, Any]:
    assert INFO.is_file(), "the build leaves its record beside the package"
    return json.loads(INFO.read_text(encoding="utf-8"))


def test_the_package_under_test_is_the_installed_one() -> None:
    assert importlib.metadata.version("sdan-fast") == sdan_fast.__version__ == build_info()["sdan_fast"]
    if EXPECTED_TORCH is not None:
        assert torch.__version__ == EXPECTED_TORCH
        assert PACKAGE.is_relative_to(Path(sys.prefix).resolve()), f"{PACKAGE} is not in this environment"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_extension_loads(kind: str) -> None:
    told = build_info()[kind]
    if not told["built"]:
        assert told["reason"].strip()
        with pytest.raises(ImportError):
            importlib.import_module(f"sdan_fast._C_{kind}")
        pytest.skip(f"not built: {told['reason']}")
    module = importlib.import_module(f"sdan_fast._C_{kind}")
    assert Path(module.__file__ or "").resolve().parent == PACKAGE.resolve()
    assert Path(module.__file__ or "").name.endswith(".abi3.so")


def test_every_module_is_in_the_package() -> None:
    """A folder without __init__.py, or one that setup.py leaves out, is missing from the wheel only."""
    extras = {
        "typer",
        "rich",
        "PIL",
        "safetensors",
        "skimage",
        "onnx",
        "onnxruntime",
        "openvino",
        "matplotlib",
    }
    names = [module.name for module in pkgutil.walk_packages(sdan_fast.__path__, "sdan_fast.")]
    for name in ("sdan_fast.kernels.star", "sdan_fast.ops.star", "sdan_fast.models.sdan", "sdan_fast.cli"):
        assert name in names or importlib.util.find_spec(name) is not None, f"{name} is not in the package"
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in extras and not name.startswith("sdan_fast._C_"):
                raise


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_is_the_reference(name: str, dtype: torch.dtype) -> None:
    """max|err| <= 2 max|eager's err| + 2 eps max|ref|, against float64 on the same input."""
    args = _cast(CALLS[name](_draw(sum(map(ord, name)))), dtype)
    exact = getattr(reference, name)(*_cast(args, torch.float64))
    eager = getattr(reference, name)(*args)
    got = getattr(functional, name)(*args)
    assert got.dtype == eager.dtype
    assert got.shape == eager.shape
    bound = 2 * (eager.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_built_backend_is_the_one_that_runs(name: str) -> None:
    """A wheel whose kernels never register would pass the rest, on the reference."""
    explained = sdan_fast.explain(name, *_cast(CALLS[name](_draw(0)), torch.float32))
    assert explained.backend == ("cpu" if build_info()["cpu"]["built"] else "reference"), str(explained)


def test_tiny_model_runs_and_trains() -> None:
    from sdan_fast.models import SDAN

    torch.manual_seed(0)
    model = SDAN(scale=2, channels=8, blocks=2, groups=2)
    x = torch.rand(1, 3, 11, 14)
    y = model(x)
    assert y.shape == (1, 3, 22, 28)
    with sdan_fast.use_backend("reference"):
        eager, exact = model(x), model.double()(x.double())
    bound = 2 * (eager.double() - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (y.double() - exact).abs().max() <= bound
    model.float()
    model(x).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_a_function_compiles_whole_and_follows_the_backend() -> None:
    """One graph without a break, under every Dynamo; another backend is another graph."""
    graphs: list[str] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: functional.star(a, b), backend=note, fullgraph=True)
    a, b = torch.randn(2, 3, 5).unbind(0)
    with torch.no_grad():
        for backend in ("auto", "reference", "auto"):
            with sdan_fast.use_backend(backend):
                torch.testing.assert_close(compiled(a, b), reference.star(a, b))
    expected = [build_info()["cpu"]["built"], False]
    assert ["sdan_fast.star.cpu" in graph for graph in graphs] == expected, graphs


def test_info_command() -> None:
    if EXPECTED_TORCH is None:
        pytest.importorskip("typer")
    done = subprocess.run(
        [sys.executable, "-m", "sdan_fast", "info", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["build"]["cpu"]["built"] == build_info()["cpu"]["built"]
    assert [line["name"] for line in told["backends"]] == ["cpu", "triton", "cuda", "reference"]
