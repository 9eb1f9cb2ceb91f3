"""The composed op `sdan`, the whole network in one call, through the model that owns its tensors."""

from __future__ import annotations

import copy
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


def test_weights_are_never_stale() -> None:
    net, x = model(), torch.rand(1, 3, 9, 10)
    with torch.no_grad():
        net(x)
        net.blocks[0].sdm.fuse.weight.mul_(1.5)
        net.up.bias.data.add_(0.25)
        changed = net(x)
        with sdan_fast.use_backend("reference"):
            torch.testing.assert_close(changed, net(x), rtol=1e-4, atol=1e-5)
        net.load_state_dict(model(blocks=2).state_dict())
        torch.testing.assert_close(net(x), model()(x), rtol=1e-4, atol=1e-5)


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
