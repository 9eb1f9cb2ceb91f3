"""The choice of a backend, its explanation, and what a call costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import timeit
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sdan_fast
from sdan_fast import backends
from sdan_fast import functional as F
from sdan_fast.models import SDAN

HAS_CPU = backends.BACKENDS["cpu"].missing is None
needs_cpu = pytest.mark.skipif(not HAS_CPU, reason="the cpu kernels were not built")


def test_status_lists_every_backend_with_a_reason() -> None:
    lines = sdan_fast.status()
    assert [line.name for line in lines] == list(backends.ORDER)
    assert all(line.available or line.reason for line in lines)
    assert lines[-1].name == "reference" and lines[-1].available


def test_use_backend_refuses_unknown_names() -> None:
    with pytest.raises(
        ValueError, match="backend must be one of auto, cpu, triton, cuda, reference, and it is 'gpu'"
    ):
        sdan_fast.use_backend("gpu").__enter__()
    with pytest.raises(ValueError, match=r"backend must be one of .*, and it is \[\]"):
        sdan_fast.use_backend([]).__enter__()  # type: ignore[arg-type]


def test_use_backend_nests_and_restores() -> None:
    before = sdan_fast.current_backend()
    with sdan_fast.use_backend("reference"):
        with pytest.raises(KeyError), sdan_fast.use_backend("auto"):
            raise KeyError
        assert sdan_fast.current_backend() == "reference"
    assert sdan_fast.current_backend() == before


def test_use_backend_is_the_thread_s_own() -> None:
    seen = []
    with sdan_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(sdan_fast.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_a_named_backend_that_cannot_raises_with_its_reason() -> None:
    a = torch.randn(2, 3)
    for name in ("triton", "cuda"):
        if backends.BACKENDS[name].missing is not None:
            with (
                sdan_fast.use_backend(name),
                pytest.raises(RuntimeError, match=f"star cannot run on .*'{name}': .+"),
            ):
                F.star(a, a)


@needs_cpu
def test_float64_is_the_reference_s() -> None:
    a = torch.randn(2, 3, dtype=torch.float64)
    assert sdan_fast.explain("star", a, a).backend == "reference"
    with (
        sdan_fast.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"float32 or bfloat16 or float16.* float64"),
    ):
        F.star(a, a)


@needs_cpu
def test_explain_says_who_and_why_not() -> None:
    a = torch.randn(2, 3)
    explanation = sdan_fast.explain("star", a, a, outer="gelu")
    assert explanation.backend == "cpu"
    assert explanation.reasons["reference"] == "'cpu' comes first"
    assert set(explanation.reasons) == {"triton", "cuda", "reference"}
    assert str(explanation).startswith("star: runs on cpu\n  not triton: ")
    with sdan_fast.use_backend("reference"):
        named = sdan_fast.explain("star", a, a)
    assert named.backend == "reference"
    assert named.reasons["cpu"] == "use_backend names 'reference'"


def test_explain_computes_nothing_and_checks_everything() -> None:
    with pytest.raises(ValueError, match=r"fn_name must be one of .* 'stars'"):
        sdan_fast.explain("stars")
    with pytest.raises(ValueError, match="b must have the shape"):
        sdan_fast.explain("star", torch.ones(2), torch.ones(3))
    x, w = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 1, 3)
    assert sdan_fast.explain("separable_conv2d", x, w, None, w.mT, None).op == "strip_conv_chain"
    assert sdan_fast.current_backend() == "auto"


def test_explain_takes_a_model() -> None:
    model = SDAN(scale=2, channels=8, blocks=1)
    with torch.no_grad():
        explanation = sdan_fast.explain(model, torch.rand(1, 3, 8, 8))
    assert explanation.op == "sdan"
    assert explanation.backend == ("cpu" if HAS_CPU else "reference")
    with pytest.raises(ValueError, match="called none"):
        sdan_fast.explain(torch.nn.Identity(), torch.ones(1))


@needs_cpu
def test_auto_leaves_to_pytorch_what_it_does_faster() -> None:
    """In large channels_last images only; docs/performance.md has the measurements."""

    def chosen(
        name: str, shape: tuple[int, ...], dtype: torch.dtype, *args: object, **kwargs: object
    ) -> str | None:
        x = torch.empty(shape, dtype=dtype, device="cpu").to(memory_format=torch.channels_last)
        images = 2 if name == "pointwise_gate" else 1
        explanation = sdan_fast.explain(name, *[x] * images, *args, **kwargs)
        assert explanation.backend == "cpu" or "faster" in explanation.reasons["cpu"]
        return explanation.backend

    large, small, huge = (1, 28, 180, 320), (1, 28, 64, 64), (1, 28, 400, 400)
    few_channels = (1, 7, 360, 320)  # less than a short vector
    short_vectors = sdan_fast.backends.kernel_instruction_set() == "avx2"
    in_place = short_vectors or str(sdan_fast.backends.kernel_instruction_set()).startswith("avx512")
    for kernel, dilation, *expectations in (
        ((1, 3), 1, "reference", "reference"),
        ((1, 3), 4, "reference", "reference"),
        ((1, 3), 6, "reference", "cpu"),
        ((1, 11), 2, "cpu", "cpu"),
        ((5, 1), 1, "cpu", "reference"),
        ((5, 1), 4, "reference", "reference"),
        ((13, 1), 1, "cpu", "cpu"),
        ((3, 3), 1, "cpu", "reference"),
        ((5, 5), 2, "reference", "reference"),
        ((7, 7), 1, "reference", "cpu"),
        ((7, 7), 4, "cpu", "cpu"),
    ):
        expected = "cpu" if in_place else expectations[0]
        weight = torch.empty(28, 1, *kernel)
        assert chosen("depthwise_conv2d", large, torch.float32, weight, dilation=dilation) == expected, kernel
        expected = expectations[short_vectors]
        assert (
            chosen("depthwise_conv2d", few_channels, torch.float32, weight[:7], dilation=dilation) == expected
        )
        assert chosen("depthwise_conv2d", small, torch.float32, weight, dilation=dilation) == "cpu", kernel

    strip = torch.empty(28, 1, 1, 3)
    expected = "cpu" if short_vectors else "reference"
    assert chosen("depthwise_conv2d", huge, torch.float32, strip) == expected

    only_short = "reference" if short_vectors else "cpu"
    for channels in (28, 56, 64):
        shape, weight = (1, channels, 180, 320), torch.empty(channels, channels, 1, 1)
        assert chosen("pointwise_conv2d", shape, torch.float32, weight) == "cpu", channels
    stages = [(torch.empty(28, 1, 1, 3), None, torch.empty(28, 1, 3, 1), None, d) for d in (1, 2)]
    assert chosen("strip_conv_chain", large, torch.float32, stages) == "cpu"
    few_stages = [tuple(t[:7] if isinstance(t, torch.Tensor) else t for t in stage) for stage in stages]
    assert chosen("strip_conv_chain", few_channels, torch.float32, few_stages) == only_short
    assert chosen("strip_conv_chain", small, torch.float32, stages) == "cpu"

    low = "reference" if torch.cpu._is_avx512_bf16_supported() else "cpu"
    for inputs, expected in ((28, "cpu"), (27, low)):
        weight = torch.empty(inputs, inputs, 1, 1, dtype=torch.bfloat16)
        assert chosen("pointwise_gate", (1, inputs, 180, 320), torch.bfloat16, weight) == expected
        assert chosen("pointwise_gate", (1, inputs, 16, 16), torch.bfloat16, weight) == "cpu"
    tiles = sdan_fast.backends.kernel_instruction_set() == "avx512+amx"
    weight = torch.empty(56, 56, 1, 1, dtype=torch.bfloat16)
    for activation, expected in (("none", "reference" if tiles else "cpu"), ("gelu", "cpu")):
        found = chosen("pointwise_conv2d", (1, 56, 180, 320), torch.bfloat16, weight, activation=activation)
        assert found == expected, activation
    gate = torch.empty(large).to(memory_format=torch.channels_last)
    chain = [(torch.empty(28, 1, 1, 11), None, torch.empty(28, 1, 11, 1), None, 6)]
    expected = "cpu" if in_place else "reference"
    assert chosen("gated_strip_conv_chain", large, torch.float32, gate, chain) == expected
    assert sdan_fast.explain("gated_strip_conv_chain", gate.contiguous(), gate, chain).backend == "cpu"
    for channels, kernel, with_tiles in (
        (28, (3, 3), "cpu"),
        (28, (1, 3), "cpu"),
        (16, (1, 3), low),
        (16, (3, 3), "cpu"),
    ):
        shape, weight = (1, channels, 180, 320), torch.empty(channels, 1, *kernel, dtype=torch.bfloat16)
        expected = with_tiles if tiles else low
        assert chosen("depthwise_conv2d", shape, torch.bfloat16, weight) == expected, (channels, kernel)
    half = [tuple(t.bfloat16() if isinstance(t, torch.Tensor) else t for t in stage) for stage in stages[:1]]
    assert chosen("strip_conv_chain", large, torch.bfloat16, half) == ("cpu" if tiles else low)
    assert chosen("strip_conv_chain", huge, torch.bfloat16, half) == low


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_variable_names_the_backend() -> None:
    code = "import sdan_fast; print(sdan_fast.current_backend())"
    assert run_python(code, SDAN_FAST_BACKEND="reference").stdout.strip() == "reference"
    failed = run_python(code, SDAN_FAST_BACKEND="fast")
    assert failed.returncode != 0
    assert "SDAN_FAST_BACKEND must be one of" in failed.stderr.splitlines()[-1]


@needs_cpu
def test_an_overload_without_a_kernel_says_why() -> None:
    a = torch.ones(2)
    for backend in ("triton", "cuda"):
        if backends.BACKENDS[backend].missing is not None:
            with pytest.raises(RuntimeError, match=f"sdan_fast::star.{backend} cannot run: "):
                getattr(torch.ops.sdan_fast.star, backend)(a, a)


@needs_cpu
def test_kernels_refuse_bad_arguments_without_the_python_checks() -> None:
    """torch.ops reaches the C++ directly: what Python would have refused must be an error there too, not a crash."""
    star, chain = torch.ops.sdan_fast.star.cpu, torch.ops.sdan_fast.strip_conv_chain.cpu
    x, h, v = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 1, 3), torch.ones(2, 1, 3, 1)
    bad = [
        lambda: star(torch.ones(2), torch.ones(3)),
        lambda: star(torch.ones(2), torch.ones(2).half()),
        lambda: star(torch.ones(2), torch.ones(2), activation="tanh"),
        lambda: star(torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)),
        lambda: torch.ops.sdan_fast.depthwise_conv2d.cpu(x, torch.ones(3, 1, 3, 3)),
        lambda: torch.ops.sdan_fast.depthwise_conv2d.cpu(x, torch.ones(2, 1, 2, 3)),
        lambda: torch.ops.sdan_fast.depthwise_conv2d.cpu(x, torch.ones(2, 1, 3, 3), dilation=0),
        lambda: torch.ops.sdan_fast.depthwise_conv2d.cpu(x[0], torch.ones(2, 1, 3, 3)),
        lambda: chain(x, [h], [], bias_mask=[False], dilations=[1]),
        lambda: chain(x, [h, v], [], bias_mask=[True, False], dilations=[1, 1]),
        lambda: chain(x, [h, v], [], bias_mask=[False, False], dilations=[1]),
        lambda: chain(x, [v, h], [], bias_mask=[False, False], dilations=[1, 1]),
        lambda: torch.ops.sdan_fast.layer_norm2d.cpu(x, torch.ones(3), None),
        lambda: torch.ops.sdan_fast.pointwise_gate.cpu(x, x, torch.ones(2, 3, 1, 1)),
        lambda: torch.ops.sdan_fast.pointwise_gate.cpu(x, x[:, :0], torch.ones(2, 0, 1, 1)),
        lambda: torch.ops.sdan_fast.pointwise_conv2d.cpu(x[:, :0], torch.ones(2, 0, 1, 1)),
        lambda: torch.ops.sdan_fast.mm_lka.cpu(
            x, [h], [], torch.ones(2, 2, 1, 1), bias_mask=[False], dilations=[1, 1], lengths=[2]
        ),
    ]
    for call in bad:
        with pytest.raises(RuntimeError):
            call()


def per_call(function: object, calls: int = 4000) -> float:
    return timeit.timeit(function, number=calls) / calls  # type: ignore[arg-type]


@needs_cpu
def test_call_overhead() -> None:
    """Under no_grad a star of one element costs at most three times the eager two-op version (docs/decisions.md)."""
    a, b = torch.randn(1, 1, 1, 1), torch.randn(1, 1, 1, 1)
    with torch.no_grad():
        ratios = []
        for _ in range(15):  # interleaved, and the best of many: other work on the machine only ever adds
            eager = per_call(lambda: torch.nn.functional.gelu(a) * b)
            ratios.append(per_call(lambda: F.star(a, b)) / eager)
    assert min(ratios) <= 3.0, f"{min(ratios):.2f} times the eager version"


@needs_cpu
@pytest.mark.parametrize(
    ("name", "call", "where"),
    [
        (
            "depthwise_conv2d",
            lambda n: (
                (
                    torch.zeros(1, 7, n, n).contiguous(memory_format=torch.channels_last),
                    torch.zeros(7, 1, 1, 5),
                ),
                {},
            ),
            (288, 128),
        ),
        (
            "separable_conv2d",
            lambda n: (
                (
                    torch.zeros(1, 7, n, n).contiguous(memory_format=torch.channels_last),
                    *(torch.zeros(7, 1, 1, 3), None, torch.zeros(7, 1, 3, 1), None),
                ),
                {},
            ),
            (288, 128),
        ),
    ],
)
def test_auto_prefers_pytorch_where_it_is_faster(name: str, call, where: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    for size, expected in zip(where, ("reference", "cpu"), strict=True):
        args, kwargs = call(size)
        found = sdan_fast.explain(name, *args, **kwargs)
        assert found.backend == expected, str(found)
        if expected == "reference":
            assert "PyTorch's own" in found.reasons["cpu"] and "faster" in found.reasons["cpu"]
            with sdan_fast.use_backend("cpu"):  # a named backend is taken at its word
                assert sdan_fast.explain(name, *args, **kwargs).backend == "cpu"
                getattr(F, name)(*args, **kwargs)
            # That PyTorch's forward is faster says nothing of its gradients, for which there is a kernel.
            args[0].requires_grad_()
            assert sdan_fast.explain(name, *args, **kwargs).backend == "cpu"
            with torch.no_grad():
                assert sdan_fast.explain(name, *args, **kwargs).backend == "reference"


def _wrong_calls() -> list[tuple[str, Callable[[], Tensor]]]:
    x, square = torch.randn(1, 4, 5, 6), torch.randn(4, 1, 3, 3)
    row, column, one = torch.randn(4, 1, 1, 3), torch.randn(4, 1, 3, 1), torch.randn(4, 4, 1, 1)
    vector, empty = torch.randn(4), torch.randn(1, 4, 0, 6)
    return [
        ("another shape", lambda: F.star(x, x[:, :2])),
        ("no activation", lambda: F.star(x, x, activation="tanh")),
        ("another dtype", lambda: F.star(x, x.double())),
        ("another device", lambda: F.star(x, x.to("meta"))),
        ("no tensor", lambda: F.star(x, 1.0)),  # type: ignore[arg-type]
        ("no image", lambda: F.layer_norm2d(x[0], vector, vector)),
        ("no rows", lambda: F.layer_norm2d(empty, vector, vector)),
        ("a weight too short", lambda: F.layer_norm2d(x, vector[:2], vector)),
        ("a weight elsewhere", lambda: F.layer_norm2d(x, vector.to("meta"), vector)),
        ("eps of bool", lambda: F.layer_norm2d(x, vector, vector, True)),
        ("eps below zero", lambda: F.layer_norm2d(x, vector, vector, -1.0)),
        ("a sparse image", lambda: F.layer_norm2d(x.to_sparse(), vector, vector)),
        ("a sparse weight", lambda: F.pointwise_conv2d(x, one.to_sparse())),
        ("a weight of floats of 64 bits", lambda: F.pointwise_conv2d(x, one.double())),
        ("a bias too short", lambda: F.pointwise_conv2d(x, one, vector[:1])),
        ("inputs that do not fit", lambda: F.pointwise_gate(x, x[:, :2], one)),
        ("a bias of integers", lambda: F.pointwise_gate(x, x, one, vector.int())),
        ("an even kernel", lambda: F.depthwise_conv2d(x, torch.randn(4, 1, 2, 2))),
        ("dilation zero", lambda: F.depthwise_conv2d(x, square, dilation=0)),
        ("dilation of bool", lambda: F.depthwise_conv2d(x, square, dilation=True)),
        ("a dilation too large", lambda: F.depthwise_conv2d(x, square, dilation=1 << 30)),
        ("three dilations", lambda: F.depthwise_conv2d(x, square, dilation=(1, 1, 1))),  # type: ignore[arg-type]
        ("no stages", lambda: F.strip_conv_chain(x, [])),
        ("a square strip", lambda: F.strip_conv_chain(x, [(square, None, column, None, 1)])),
        (
            "a chain's bias too long",
            lambda: F.strip_conv_chain(x, [(row, one[0, 0, 0], column, x[0, 0, 0], 1)]),
        ),
    ]


@pytest.mark.parametrize("name", [name for name, _ in _wrong_calls()])
def test_calls_that_a_kernel_checks_are_refused_alike(name: str) -> None:
    call = dict(_wrong_calls())[name]
    with torch.enable_grad(), pytest.raises((TypeError, ValueError)) as checked:
        call()
    with torch.no_grad(), pytest.raises(checked.type, match=re.escape(str(checked.value))):
        call()
