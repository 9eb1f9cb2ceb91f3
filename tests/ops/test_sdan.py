"""The composed op `sdan`, the whole network in one call, through the model that owns its tensors."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Callable

import pytest
import torch

import sdan_fast
from sdan_fast import backends, ops
from sdan_fast.models import SDAN

from .harness import DTYPES, assert_within_bound, laid_out

pytestmark = pytest.mark.skipif(backends.BACKENDS["cpu"].missing is not None, reason="needs the cpu kernels")


def model(**configuration: int) -> SDAN:
    torch.manual_seed(3)
    return SDAN(**{"scale": 2, "channels": 12, "blocks": 2, **configuration}).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("groups", (1, 2, 3, 4))
def test_matches_float64(groups: int, dtype: torch.dtype) -> None:
    net = model(groups=groups, scale=groups).to(dtype)
    exact_net = copy.deepcopy(net).double()
    for shape in ((2, 3, 17, 23), (1, 3, 1, 1), (1, 3, 1, 40), (1, 3, 5, 4), (0, 3, 4, 4)):
        x = torch.rand(shape).to(dtype)
        for layout in ("contiguous", "channels_last", "sliced"):
            picture = laid_out(x, layout)
            with torch.no_grad(), sdan_fast.use_backend("reference"):
                exact, eager = exact_net(x.double()), net(x)
            with torch.no_grad(), sdan_fast.use_backend("cpu"):
                y = net(picture)
            assert_within_bound(y, eager, exact, f"{shape} {layout}")


def test_the_fused_op_is_what_runs() -> None:
    net, x = model(), torch.rand(1, 3, 8, 9)
    seen: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def run() -> list[str]:
        seen.clear()
        with Record():
            net(x)
        return [name for name in seen if name.startswith("sdan_fast")]

    with torch.no_grad():
        assert run() == ["sdan_fast.sdan.cpu"]
        handle = net.blocks[1].register_forward_hook(lambda *_: None)
        assert run().count("sdan_fast.rsdam.cpu") == 2  # a hook sees its block
        handle.remove()
    assert "sdan_fast.star_conv.cpu" in run()  # gradients are needed: the parts


def test_opcheck_and_flops() -> None:
    net, x = model(), torch.rand(1, 3, 8, 9)
    caught: list[tuple] = []
    original: Callable = ops.sdan.overloads["cpu"]
    with torch.no_grad():

        class Catch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                if func is original:
                    caught.append((args, kwargs))
                return func(*args, **(kwargs or {}))

        with Catch():
            net(x)
        args, kwargs = caught[0]
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        for overload in ("", "cpu"):
            torch.library.opcheck(ops.sdan.overloads[overload], detached, kwargs)
        counts = []
        for backend in ("reference", "cpu"):
            counter = torch.utils.flop_counter.FlopCounterMode(display=False)
            with sdan_fast.use_backend(backend), counter:
                net(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def add_through_numpy(net: SDAN) -> None:
    net.tail.dw.bias.detach().numpy()[...] += 0.5


def replace(net: SDAN) -> None:
    net.head.dw.bias = torch.nn.Parameter(net.head.dw.bias + 0.25)


def make_strided(net: SDAN) -> None:
    proj = net.blocks[1].proj.weight
    proj.data = (2 * proj.data).transpose(0, 1).contiguous().transpose(0, 1)


def update_in_inference_mode(net: SDAN) -> None:
    with torch.inference_mode():
        net.blocks[0].norm.bias.add_(0.5)


CHANGES: dict[str, Callable[[SDAN], object]] = {
    "in place": lambda net: net.blocks[0].sdm.fuse.weight.mul_(1.5),
    "behind autograd": lambda net: net.up.bias.data.add_(0.25),
    "through numpy": add_through_numpy,
    "replaced": replace,
    "strided": make_strided,
    "strided, in place": lambda net: net.blocks[1].proj.weight.mul_(0.5),
    "in inference mode": update_in_inference_mode,
    "load_state_dict": lambda net: net.load_state_dict({k: 0.9 * v for k, v in model().state_dict().items()}),
}


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode), ids=lambda m: m.__name__)
def test_weights_are_never_stale(mode: Callable) -> None:
    """What is kept prepared is that of the weights at the time of the call, whichever way they changed."""
    net, x = model(), torch.rand(1, 3, 9, 10)
    with mode():
        last = net(x)
        for how, change in CHANGES.items():
            with torch.no_grad():
                change(net)
            changed = net(x)
            assert not torch.equal(changed, last), how
            with sdan_fast.use_backend("reference"):
                torch.testing.assert_close(changed, net(x), rtol=1e-4, atol=1e-5, msg=how)
            assert torch.equal(changed, net(x)), how
            last = changed


def test_many_models_in_turn() -> None:
    """More of them than are kept prepared, of one shape, in two dtypes."""
    nets = [model(groups=g).to(dtype) for dtype in (torch.float32, torch.bfloat16) for g in (1, 2, 3)]
    nets += [copy.deepcopy(nets[0])]
    with torch.no_grad():
        nets[-1].fuse.weight.mul_(1.5)
        x = torch.rand(1, 3, 7, 6)
        first = [net(x.to(net.fuse.weight.dtype)) for net in nets]
        for _ in range(2):
            for net, wanted in zip(nets, first, strict=True):
                assert torch.equal(net(x.to(wanted.dtype)), wanted)
    assert len({tuple(y.flatten().tolist()) for y in first}) == len(nets)


def test_a_forked_child_may_call_the_model() -> None:
    net, x = model(), torch.rand(1, 3, 20, 30)
    with torch.no_grad():
        expected = net(x)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # as a DataLoader's worker does: OpenMP's threads are not forked
            same = torch.equal(net(x), expected)
            net.up.bias.add_(1.0)
            os._exit(0 if same and not torch.equal(net(x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(net(x), expected)


def test_bfloat16_is_closer_to_float32_than_eager_is() -> None:
    net, x = model(channels=24, groups=2, scale=4), torch.rand(1, 3, 24, 24)
    x = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic").clamp(0, 1)
    half = copy.deepcopy(net).bfloat16()
    with torch.no_grad():
        with sdan_fast.use_backend("reference"):
            exact, eager = net(x), half(x.bfloat16()).float()
        ours = half(x.bfloat16()).float()

    def psnr(y: torch.Tensor) -> float:
        return -10 * math.log10((y - exact).square().mean().item())

    assert psnr(ours) >= psnr(eager) + 2


def test_several_threads_may_call_one_model() -> None:
    net, pictures = model(), [torch.rand(1, 3, 20 + i, 30) for i in range(4)]
    with torch.no_grad():
        expected = [net(x) for x in pictures]
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                results[i] = net(pictures[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate(expected):
        assert torch.equal(results[i], wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Threads meet at other rows each time: in one band, in several, in tiles of columns, in several pictures."""
    net, before = model(channels=24).to(dtype), torch.get_num_threads()
    try:
        with torch.no_grad():
            for shape in ((1, 3, 48, 40), (1, 3, 90, 9), (1, 3, 2, 300), (1, 3, 7, 1200), (3, 3, 21, 33)):
                x = torch.rand(shape).to(dtype)
                torch.set_num_threads(1)
                alone = net(x)
                for threads in (2, 3, 5):
                    torch.set_num_threads(threads)
                    for _ in range(4):
                        assert torch.equal(net(x), alone), f"{shape}, {threads} threads"
    finally:
        torch.set_num_threads(before)


def test_a_wrong_tensor_is_named() -> None:
    net, x = model(), torch.rand(1, 3, 8, 9)
    net.tail.pw.weight = torch.nn.Parameter(torch.ones(12, 11, 1, 1), requires_grad=False)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"tail pw weight must have the shape \[12, 12, 1, 1\]"),
    ):
        net(x)
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match="head pw weight must be float64 like x, and it is float32"),
    ):
        net(x.double())
