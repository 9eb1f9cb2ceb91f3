"""SDAN under torch.compile and torch.export: one graph, no break, no recompilation per size, autocast in and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sdan_fast
from sdan_fast import functional as F
from sdan_fast.models import SDAN

SIZES = ((2, 12, 16), (3, 9, 11), (4, 16, 8))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> SDAN:
    torch.manual_seed(1)
    return SDAN(scale=2, channels=8, blocks=2)


def picture(n: int, h: int, w: int) -> Tensor:
    return torch.rand(n, 3, h, w)


def ops_of(counter: CompileCounterWithBackend) -> set[str]:
    return {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_inference_is_one_graph_for_every_size(backend: str) -> None:
    net = model().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.no_grad(), sdan_fast.use_backend(backend):
        for size in SIZES:
            x = picture(*size)
            torch._dynamo.mark_dynamic(x, [0, 2, 3])
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_training_is_one_graph_for_every_size(backend: str) -> None:
    net = model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with sdan_fast.use_backend(backend):
        for size in SIZES:
            x = picture(*size)
            torch._dynamo.mark_dynamic(x, [0, 2, 3])
            grads = []
            for run in (compiled, net):
                net.zero_grad()
                run(x).square().mean().backward()
                grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
            assert len(grads[0]) == len(list(net.parameters()))
            for got, wanted in zip(*grads, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1


def test_hooks_inside_of_a_block_are_in_the_graph() -> None:
    """One graph with the hook in it, and another one when the hook has gone."""
    net = model().eval()
    x = picture(1, 12, 16)
    with torch.no_grad():
        expected = net(x)
        handle = net.blocks[1].sdm.star[0].pw1.register_forward_hook(lambda _m, _x, y: 2 * y)
        hooked = net(x)
        assert not torch.allclose(hooked, expected, rtol=1e-4, atol=1e-5)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(net, fullgraph=True, backend=counter)
        torch.testing.assert_close(compiled(x), hooked, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1
        handle.remove()
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 2


def test_inductor_runs_inference_and_training() -> None:
    net = model()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    x = picture(
        2, 12, 16
    )  # with a batch of one, Inductor 2.14.1 fails on plain 1x1 convolutions (docs/decisions.md)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    loss = compiled(x).square().mean()
    loss.backward()
    got = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net(x).square().mean().backward()
    for grad, p in zip(got, net.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(sdan_fast.backends.BACKENDS["cpu"].missing is not None, reason="needs the cpu kernels")
def test_changing_the_backend_recompiles() -> None:
    """A graph holds the op of the backend in force when it was traced; another backend gets another graph."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda a, b: F.star(a, b), fullgraph=True, backend=counter)
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    seen = []
    for name in ("cpu", "reference", "cpu"):
        with sdan_fast.use_backend(name):
            compiled(a, b)
        seen.append((counter.frame_count, "sdan_fast.star.cpu" in ops_of(counter)))
    assert seen == [(1, True), (2, True), (2, True)]


@pytest.mark.parametrize("inside", (True, False), ids=("inside", "outside"))
@pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
def test_autocast(training: bool, inside: bool) -> None:
    net = model()

    def step(x: Tensor) -> Tensor:
        if not inside:
            return net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = picture(1, 12, 16)
    exact = model().double()(x.double())
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        y = compiled(x)
        expected = step(x)
        with sdan_fast.use_backend("reference"):
            reference = step(x)
    assert y.dtype == expected.dtype == reference.dtype == torch.bfloat16
    bound = (
        2 * (reference.double() - exact).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    )
    assert (y.double() - exact).abs().max() <= bound
    assert (expected.double() - exact).abs().max() <= bound
    if training:
        y.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("strict", (True, False), ids=("strict", "non-strict"))
def test_export_with_dynamic_height_and_width(strict: bool) -> None:
    net = model().eval()
    height, width = torch.export.Dim("height", min=2, max=4096), torch.export.Dim("width", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(
            net, (picture(1, 12, 16),), dynamic_shapes={"x": {2: height, 3: width}}, strict=strict
        )
        for size in ((1, 12, 16), (1, 7, 5), (1, 20, 33)):
            x = picture(*size)
            torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


def test_exported_program_survives_a_file(tmp_path: Any) -> None:
    net = model().eval()
    x = picture(1, 12, 16)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes={"x": {2: torch.export.Dim.AUTO}})
        torch.export.save(program, tmp_path / "sdan.pt2")
        loaded = torch.export.load(tmp_path / "sdan.pt2").module()
        torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-5)


def test_channels_last_stays() -> None:
    """A compiled op returns the strides that its fake kernel promised, in both memory formats."""
    compiled = torch.compile(
        lambda x: F.layer_norm2d(x, weight, None) * 2, fullgraph=True, backend="aot_eager"
    )
    weight = torch.ones(6)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 5, 7).contiguous(memory_format=memory_format)
        y = compiled(x)
        assert y.stride() == x.stride()
        torch.testing.assert_close(y, 2 * F.layer_norm2d(x, weight, None))


def test_checkpointing_and_inference_mode() -> None:
    net = model()
    x = picture(1, 10, 12).requires_grad_()
    plain = torch.autograd.grad(net(x).sum(), x)
    saved = torch.autograd.grad(torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(plain, saved, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        inference = net(x)
    with torch.no_grad():
        assert torch.equal(inference, net(x))
