"""What only a GPU can show: networks on its backends, CUDA graphs, streams, Inductor, more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import sdan_fast
from sdan_fast import functional as F
from sdan_fast import reference
from sdan_fast.bench import cases
from sdan_fast.commands.check import agreement, gradient_agreement
from sdan_fast.models import SDAN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BACKENDS = ("triton", "cuda")
LAYOUTS = tuple(cases.LAYOUTS)
DTYPES = tuple(cases.DTYPES)


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    """The yardstick is float32 itself."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


# --- the network ---------------------------------------------------------------------------------------------


def trained(
    settings: dict[str, int], state: dict[str, Tensor], image: Tensor, dtype: torch.dtype, backend: str
) -> Sequence[Tensor]:
    """Output and gradients (of the image, then of the parameters) of one forward and backward."""
    net = SDAN(**settings).to("cuda", dtype)
    net.load_state_dict(state)
    x = image.to(dtype).requires_grad_()
    with sdan_fast.use_backend(backend):
        y = net(x)
    y.backward(torch.linspace(-1, 1, y.numel(), device="cuda").to(dtype).view_as(y))
    return [g for g in (y.detach(), x.grad, *(p.grad for p in net.parameters())) if g is not None]


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_network(backend: str, dtype: str, layout: str, groups: int) -> None:
    settings = {"scale": 2, "channels": 54 if groups == 3 else 56, "blocks": 2, "groups": groups}
    state = SDAN(**settings).state_dict()
    image = torch.rand(2, 3, 37, 50, device="cuda").contiguous(memory_format=cases.LAYOUTS[layout])
    kind = cases.DTYPES[dtype]
    exact = trained(settings, state, image, torch.float64, "reference")
    eager = trained(settings, state, image, kind, "reference")
    found = trained(settings, state, image, kind, backend)
    assert len(found) == len(exact) == len(state) + 2
    output = agreement(found[0], eager[0], exact[0])
    gradients = gradient_agreement(found[1:], eager[1:], exact[1:])
    assert output.ok, f"output at {output.share:.2f} of the bound"
    assert gradients.ok, f"gradients at {gradients.share:.2f} of the bound"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_in_a_cuda_graph(backend: str, layout: str) -> None:
    """Captured once, replayed on another image: what the call gives, bit by bit."""
    net = SDAN(scale=2, blocks=2).to("cuda", torch.bfloat16).eval()
    images = torch.rand(2, 1, 3, 32, 48, device="cuda", dtype=torch.bfloat16)
    x = images[0].contiguous(memory_format=cases.LAYOUTS[layout])
    with sdan_fast.use_backend(backend), torch.no_grad():
        net(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        x.copy_(images[1])
        graph.replay()
        assert torch.equal(y, net(x))


@pytest.mark.parametrize("op", list(cases.SUBJECTS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_in_a_cuda_graph(backend: str, op: str) -> None:
    """Forward and backward of every op: no synchronisation with the host, no allocation outside of the graph's pool."""
    case = cases.Case(cases.SUBJECTS[op], cases.SUBJECTS[op].variants[0], (24, 40), "bfloat16", 2)
    args, kwargs = cases.pytree.tree_map(
        lambda leaf: leaf.requires_grad_() if isinstance(leaf, Tensor) else leaf,
        case.arguments("NCHW", "cuda"),
    )
    leaves = cases.tensors((args, kwargs))

    def step() -> Sequence[Tensor]:
        y = case.subject.ours(*args, **kwargs)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    with sdan_fast.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            args[0].mul_(2)
        graph.replay()
        for got, wanted in zip(captured, step(), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_current_stream(backend: str) -> None:
    """An input that a slow stream is still to write is read after that, and not when the call is made."""
    a, b = torch.randn(2, 1, 8, 64, 64, device="cuda").unbind(0)
    weight = torch.randn(8, 1, 1, 11, device="cuda")
    with sdan_fast.use_backend(backend), torch.no_grad():
        wanted = F.depthwise_conv2d(F.star(a, b), weight)
        late = torch.zeros_like(a)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.copy_(a)
            got = F.depthwise_conv2d(F.star(late, b), weight)
        side.synchronize()
    assert torch.equal(got, wanted)


# --- Inductor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_inductor_makes_of_an_op(backend: str) -> None:
    """Of Triton it sees the launches, and calls the kernel itself; CUDA C++ stays one call of the op."""
    from torch._inductor.utils import run_and_get_code

    overload = getattr(torch.ops.sdan_fast.star, backend)
    a, b = torch.randn(2, 1, 8, 16, 16, device="cuda").unbind(0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: overload(a.sin(), b) * 2, fullgraph=True)
    y, codes = run_and_get_code(compiled, a, b)
    torch.testing.assert_close(y, reference.star(a.sin(), b) * 2)
    code = "\n".join(codes)
    called = f"sdan_fast.star.{backend}"
    assert (called in code) == (backend == "cuda")
    if backend == "triton":
        assert "star_forward" in code


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_compiled_by_inductor(backend: str, training: bool, layout: str) -> None:
    net = SDAN(scale=2, channels=16, blocks=1).cuda().train(training)
    x = torch.rand(2, 3, 24, 32, device="cuda").contiguous(memory_format=cases.LAYOUTS[layout])
    torch._dynamo.reset()
    with sdan_fast.use_backend(backend), torch.set_grad_enabled(training):
        compiled = torch.compile(net)
        y, wanted = compiled(x), net(x)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        if training:
            found = torch.autograd.grad(y.square().mean(), list(net.parameters()))
            expected = torch.autograd.grad(wanted.square().mean(), list(net.parameters()))
            for got, want in zip(found, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


# --- large tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend: str, layout: str) -> None:
    """The last rows of the last image: every offset that leads there needs 64 bits."""
    n, c, h, w = 3, 8, 9000, 10000
    if torch.cuda.mem_get_info()[0] < 6 * 2 * n * c * h * w:
        pytest.skip("needs 26 GB of free GPU memory")
    x = torch.empty(n, c, h, w, device="cuda", dtype=torch.bfloat16, memory_format=cases.LAYOUTS[layout])
    x.normal_()
    weight, vector = torch.randn(c, 1, 5, 1).to(x), torch.randn(c).to(x)
    tail = x[-1:, :, -16:].contiguous()
    calls = {
        "star": lambda x: F.star(x, x),
        "depthwise_conv2d": lambda x: F.depthwise_conv2d(x, weight, vector),
        "layer_norm2d": lambda x: F.layer_norm2d(x, vector, vector),
    }
    for name, call in calls.items():
        with torch.no_grad(), sdan_fast.use_backend(backend):
            y = call(x)
        assert y.numel() > 2**31
        with torch.no_grad(), sdan_fast.use_backend("reference"):
            wanted = call(tail)
        torch.testing.assert_close(
            y[-1:, :, -12:], wanted[:, :, -12:], rtol=2e-2, atol=2e-2, msg=lambda m, name=name: f"{name}: {m}"
        )
        del y
