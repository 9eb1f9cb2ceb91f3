"""`accelerate` on networks that know nothing of this package: the same results and gradients, the same module."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import sdan_fast
from sdan_fast.accelerate import Report
from sdan_fast.models import SDAN

C = 12


class ChannelsFirstNorm(nn.Module):
    """As ConvNeXt's, BasicSR's and others write it."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class PermutedNorm(nn.LayerNorm):
    """As timm and torchvision write it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Taller(nn.Conv2d):
    """A subclass that only says more."""

    story = "long"


class Scaled(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def depthwise(kernel: int | tuple[int, int], dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (dilation * (kh - 1) // 2, dilation * (kw - 1) // 2)
    return nn.Conv2d(C, C, (kh, kw), padding=padding, dilation=dilation, groups=C, bias=bias)


class Attention(nn.Module):
    """A large-kernel attention whose kernel is two squares or four strips."""

    def __init__(self, strips: bool) -> None:
        super().__init__()
        self.norm = PermutedNorm(C) if strips else ChannelsFirstNorm(C)
        squares = [depthwise(5), depthwise(7, 3)]
        lines = [depthwise((1, 5)), depthwise((5, 1), bias=False), depthwise((1, 7), 3), depthwise((7, 1), 3)]
        self.kernel = nn.Sequential(*(lines if strips else squares), nn.Conv2d(C, C, 1))
        self.mix = nn.Sequential(nn.Conv2d(C, 2 * C, 1), nn.GELU(), nn.Conv2d(2 * C, C, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return x + self.mix(z * self.kernel(z))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.blocks = nn.Sequential(Attention(strips=False), Attention(strips=True))
        self.tail = nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, 3, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.blocks(self.stem(x)))


SWAPPED = {
    "blocks.0.norm": "layer_norm2d",
    "blocks.0.kernel.0": "depthwise_conv2d",
    "blocks.0.kernel.1": "depthwise_conv2d",
    "blocks.0.kernel.2": "pointwise_conv2d",
    "blocks.0.mix.0": "pointwise_conv2d",
    "blocks.0.mix.2": "pointwise_conv2d",
    "blocks.1.norm": "layer_norm2d",
    "blocks.1.kernel": "strip_conv_chain",
    "blocks.1.kernel.0": "depthwise_conv2d",
    "blocks.1.kernel.1": "depthwise_conv2d",
    "blocks.1.kernel.2": "depthwise_conv2d",
    "blocks.1.kernel.3": "depthwise_conv2d",
    "blocks.1.kernel.4": "pointwise_conv2d",
    "blocks.1.mix.0": "pointwise_conv2d",
    "blocks.1.mix.2": "pointwise_conv2d",
}


def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    for block in model.blocks:
        nn.init.normal_(block.norm.weight, 1.0)
        nn.init.normal_(block.norm.bias)
    return model.eval()


def picture(*shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 17, 14), generator=torch.Generator().manual_seed(1))


class OpsCalled(TorchDispatchMode):
    """Counts the calls of this package's ops; inside of it, "auto" in inference calls no op without one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sdan_fast":
            self.counts[func._schema.name.removeprefix("sdan_fast::")] += 1
        return func(*args, **(kwargs or {}))


def ops_of(call: Callable[[], object]) -> dict[str, int]:
    with OpsCalled() as called:
        call()
    return dict(called.counts)


def close(got: Tensor, wanted: Tensor) -> None:
    """`wanted` is another program's: two float32 computations of some ten layers."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5 * float(wanted.detach().abs().max()))


def test_what_is_swapped() -> None:
    report = sdan_fast.accelerate(network())
    assert {entry.path: entry.op for entry in report.swapped} == SWAPPED
    assert {entry.path: entry.reason for entry in report.left} == {
        "stem": "it is neither depth-wise nor 1x1",
        "tail.0": "no op computes it",
        "tail.1": "its stride is (2, 2), and the ops' is 1",
    }
    assert str(report).splitlines()[:2] == [
        "15 of 18 modules run this package's ops",
        "  1 x ChannelsFirstNorm: F.layer_norm2d (blocks.0.norm)",
    ]
    assert (
        "  6 x Conv2d: F.depthwise_conv2d (blocks.0.kernel.0, blocks.0.kernel.1, blocks.1.kernel.0 and 3 more)"
        in str(report)
    )


def test_it_is_these_ops_that_run() -> None:
    model = network().requires_grad_()
    x = picture()
    assert ops_of(lambda: model(x)) == {}
    sdan_fast.accelerate(model)
    counts = ops_of(lambda: model(x))
    assert counts == {"layer_norm2d": 2, "depthwise_conv2d": 2, "pointwise_conv2d": 6, "strip_conv_chain": 1}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_results_and_gradients(memory_format: torch.memory_format) -> None:
    plain, model = (network().to(memory_format=memory_format).train() for _ in range(2))
    sdan_fast.accelerate(model)
    results = []
    for each in (plain, model):
        x = picture().to(memory_format=memory_format).requires_grad_()
        y = each(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in each.parameters())])
    for got, wanted in zip(results[1], results[0], strict=True):
        close(got, wanted)


def test_keeps_parameters_keys_classes_and_attributes() -> None:
    model = network()
    model.blocks[0].kernel[0].note = "mine"
    modules, parameters = list(model.modules()), list(model.parameters())
    kinds, keys = [type(m) for m in modules], list(model.state_dict())
    sdan_fast.accelerate(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(m, kind) for m, kind in zip(modules, kinds, strict=True))
    assert list(model.state_dict()) == keys
    assert model.blocks[0].kernel[0].note == "mine"
    assert "groups=12, op=depthwise_conv2d)" in repr(model.blocks[0].kernel[0])
    network().load_state_dict(model.state_dict())


def test_dry_run_changes_nothing() -> None:
    model = network()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    report = sdan_fast.accelerate(model, dry_run=True)
    assert {entry.path: entry.op for entry in report.swapped} == SWAPPED
    assert str(report).startswith("15 of 18 modules would run this package's ops\n")
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    report.undo()


def test_undo_and_again() -> None:
    model = network()
    kinds = [type(m) for m in model.modules()]
    report = sdan_fast.accelerate(model)
    again = sdan_fast.accelerate(model)
    assert not again.swapped
    assert {e.reason for e in again.left if e.path in SWAPPED} == {"this package computes it already"}
    assert len(again.left) == len(report.entries) - 1  # the nn.Sequential has no parameters of its own
    again.undo()
    assert ops_of(lambda: model(picture()))
    report.undo()
    assert [type(m) for m in model.modules()] == kinds
    assert ops_of(lambda: model(picture())) == {}
    report.undo()


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_swapped(through: str) -> None:
    model = network()
    sdan_fast.accelerate(model)
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = picture()
    assert ops_of(lambda: twin(x)) == ops_of(lambda: model(x)) != {}
    assert torch.equal(twin(x), model(x))
    assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_follows_the_parameters() -> None:
    model, other = network(), network()
    sdan_fast.accelerate(model)
    x = picture()
    with torch.inference_mode():
        model(x)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    model.load_state_dict(other.state_dict())
    close(model(x), other(x))
    close(model.double()(x.double()), other.double()(x.double()))


def test_hooks_are_called_and_keep_a_chain_apart() -> None:
    model = network()
    sdan_fast.accelerate(model)
    x, seen = picture(), []
    wanted = model(x)
    handle = model.blocks[1].kernel[1].register_forward_hook(lambda *_: seen.append("hook"))
    counts = ops_of(lambda: close(model(x), wanted))
    assert seen == ["hook"]
    assert counts["depthwise_conv2d"] == 4 and counts["strip_conv_chain"] == 1  # the second stage is whole
    handle.remove()
    assert ops_of(lambda: model(x))["depthwise_conv2d"] == 2
    prune.l1_unstructured(model.blocks[0].kernel[0], "weight", 0.5)
    plain = network()
    prune.l1_unstructured(plain.blocks[0].kernel[0], "weight", 0.5)
    close(model(x), plain(x))


def test_a_chain_follows_its_sequential() -> None:
    model = nn.Sequential(depthwise((1, 5)), depthwise((5, 1)), nn.ReLU())
    plain = copy.deepcopy(model)
    sdan_fast.accelerate(model)
    x = torch.randn(1, C, 9, 8)
    assert ops_of(lambda: model(x)) == {"strip_conv_chain": 1}
    for each in (model, plain):
        each.insert(1, nn.Sigmoid())
    assert ops_of(lambda: close(model(x), plain(x))) == {"depthwise_conv2d": 2}
    assert ops_of(lambda: close(model[1:](x), plain[1:](x))) == {"depthwise_conv2d": 1}


def test_columns_before_rows_are_no_chain() -> None:
    model = nn.Sequential(depthwise((5, 1)), depthwise((1, 5)))
    plain = copy.deepcopy(model)
    report = sdan_fast.accelerate(model)
    x = torch.randn(1, C, 9, 8)
    assert [entry.op for entry in report.entries] == ["depthwise_conv2d"] * 2
    assert ops_of(lambda: close(model(x), plain(x))) == {"depthwise_conv2d": 2}


def test_a_single_image_without_a_batch() -> None:
    model = nn.Sequential(depthwise((1, 5)), depthwise((5, 1)), nn.Conv2d(C, C, 1))
    plain = copy.deepcopy(model)
    sdan_fast.accelerate(model)
    x = torch.randn(C, 9, 8)
    assert torch.equal(model(x), plain(x))
    norm = PermutedNorm(C)
    sdan_fast.accelerate(norm)
    with pytest.raises(RuntimeError):
        norm(x)  # as before


class CastingNorm(ChannelsFirstNorm):
    """Computes in its parameters' dtype, and has a second way to be called."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x.to(self.weight.dtype)).to(x.dtype)


def test_a_norm_takes_all_that_it_took() -> None:
    norm = CastingNorm(C)
    plain = copy.deepcopy(norm)
    x = torch.randn(2, C, 5, 4)
    assert sdan_fast.accelerate(norm).swapped
    assert ops_of(lambda: close(norm(x), plain(x))) == {"layer_norm2d": 1}
    for call in (
        lambda m: m(x, 2.0),
        lambda m: m(x=x),
        lambda m: m(x.bfloat16()),
        lambda m: m(x[..., :1, :1].bfloat16()),
    ):
        assert torch.equal(call(norm), call(plain))


def test_autocast_returns_what_it_returned() -> None:
    model, x = network(), picture()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        sdan_fast.accelerate(model)
        got = model(x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.03 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(training: bool) -> None:
    model, x = network().train(training), picture()
    with torch.no_grad():
        wanted = network().train(training)(x)
    sdan_fast.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    close(y, wanted)
    y.sum().backward()


def test_a_compiled_model_notices() -> None:
    model, x = network(), picture()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = compiled(x)
    report = sdan_fast.accelerate(compiled)
    assert report.swapped[0].path == "_orig_mod.blocks.0.norm"
    counts = ops_of(lambda: close(model(x), wanted))
    assert counts["strip_conv_chain"] == 1
    close(compiled(x), wanted)


def test_exports() -> None:
    model, x = network(), picture()
    sdan_fast.accelerate(model)
    program = torch.export.export(model, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("sdan_fast.strip_conv_chain.") for target in targets)
    close(program.module()(x), model(x))


def _replaced() -> nn.Module:
    conv = depthwise(3)
    conv.forward = lambda x: x  # type: ignore[method-assign]
    return conv


class GroupedNorm(ChannelsFirstNorm):
    """Divides by what the whole image deviates by."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.group_norm(x, 1, eps=self.eps)
        return self.weight[:, None, None] * y + self.bias[:, None, None]


class ForgetsEps(ChannelsFirstNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(
            x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-12
        ).movedim(-1, 1)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(C, C, 3, groups=C), 'its padding is not "same"'),
        (nn.Conv2d(C, C, 3, padding=2, groups=C), 'its padding is not "same"'),
        (nn.Conv2d(C, C, 4, padding="same", groups=C), "its kernel has an even side"),
        (nn.Conv2d(C, 2 * C, 3, padding=1, groups=C), "it is neither depth-wise nor 1x1"),
        (nn.Conv2d(C, C, 3, padding=1, groups=2), "it is neither depth-wise nor 1x1"),
        (nn.Conv2d(C, C, 1, groups=2), "it is neither depth-wise nor 1x1"),
        (nn.Conv2d(C, C, 1, padding=1), "it is a 1x1 convolution with padding"),
        (nn.Conv2d(C, C, 1, stride=2), "its stride is (2, 2), and the ops' is 1"),
        (
            nn.Conv2d(C, C, 3, padding=1, groups=C, padding_mode="reflect"),
            "its padding is 'reflect', and the ops' is zeros",
        ),
        (Scaled(C, C, 3, padding=1, groups=C), "its class computes in its own way"),
        (_replaced(), "its forward was replaced"),
        (parametrizations.weight_norm(depthwise(3)), "a parametrization computes its parameters"),
        (nn.LazyConv2d(C, 1), "its parameters have no shape before its first call"),
        (depthwise(3).to(torch.complex64), "no op takes torch.complex64"),
        (torch.jit.script(depthwise(3)), "it is compiled by TorchScript"),
        (nn.Conv1d(C, C, 3, padding=1, groups=C), "no op computes it"),
        (nn.ConvTranspose2d(C, C, 3, padding=1, groups=C), "no op computes it"),
        (nn.LayerNorm(C), "no op computes it"),
        (nn.GroupNorm(1, C), "no op computes it"),
        (nn.BatchNorm2d(C), "no op computes it"),
        (nn.InstanceNorm2d(C, affine=True), "no op computes it"),
        (GroupedNorm(C), "no op computes it"),
        (ForgetsEps(C), "no op computes it"),
        (sdan_fast.modules.LayerNorm2d(C), "this package computes it already"),
    ],
)
def test_what_is_left_and_why(module: nn.Module, reason: str) -> None:
    own = type(module)
    report = sdan_fast.accelerate(module)
    assert [(entry.path, entry.op, entry.reason) for entry in report.entries] == [("", None, reason)]
    assert type(module) is own
    assert reason in str(report)


@pytest.mark.parametrize(
    ("module", "op"),
    [
        (Taller(C, C, 3, padding=1, groups=C), "depthwise_conv2d"),
        (nn.Conv2d(C, C, (3, 5), padding="same", dilation=(2, 1), groups=C), "depthwise_conv2d"),
        (nn.Conv2d(1, 1, 5, padding=2), "depthwise_conv2d"),
        (nn.Conv2d(C, 5, 1, padding="valid", dilation=3), "pointwise_conv2d"),
        (ChannelsFirstNorm(C), "layer_norm2d"),
        (ChannelsFirstNorm(4, eps=1e-3), "layer_norm2d"),
        (ChannelsFirstNorm(5, eps=1e-12), "layer_norm2d"),
        (ChannelsFirstNorm(2).to(torch.bfloat16), "layer_norm2d"),
        (PermutedNorm(C), "layer_norm2d"),
    ],
)
def test_what_is_found_and_how_it_computes(module: nn.Module, op: str) -> None:
    plain, own = copy.deepcopy(module), type(module)
    report = sdan_fast.accelerate(module)
    assert [entry.op for entry in report.entries] == [op]
    assert isinstance(module, own)
    p = next(module.parameters())
    x = torch.randn(2, p.shape[0] if p.dim() == 1 else own_channels(module), 9, 6).to(p.dtype)
    if p.dtype == torch.float32:
        close(module(x), plain(x))
    else:
        wanted = plain.double()(x.double())
        worst = (module(x) - wanted).abs().max(), (copy.deepcopy(plain).to(p.dtype)(x) - wanted).abs().max()
        assert worst[0] <= 2 * worst[1] + 0.01 * wanted.abs().max()


def own_channels(module: nn.Module) -> int:
    assert isinstance(module, nn.Conv2d)
    return module.in_channels


def test_on_meta() -> None:
    with torch.device("meta"):
        model = Network()
    assert {entry.path: entry.op for entry in sdan_fast.accelerate(model).swapped} == SWAPPED


def test_our_own_network_is_left_whole() -> None:
    model = SDAN(2, channels=8, blocks=1)
    report = sdan_fast.accelerate(nn.Sequential(model, depthwise(3)))
    assert [entry.path for entry in report.entries] == ["1"]
    assert type(model) is SDAN


def test_shared_modules_are_swapped_once() -> None:
    conv = depthwise(3)
    report = sdan_fast.accelerate(nn.ModuleList([conv, conv]))
    assert [entry.path for entry in report.entries] == ["0"]


def test_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    sdan_fast.accelerate(nn.Sequential(PermutedNorm(C), ChannelsFirstNorm(C)))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("wrong", [None, "model", torch.zeros(2), Network])
def test_refuses_what_is_no_module(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, and it is a "):
        sdan_fast.accelerate(wrong)


def test_the_example_prints_what_its_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "accelerate.md").read_text(encoding="utf-8")
    code, printed = re.findall(r"^```(?:python)?\n(.*?)^```$", page, re.M | re.S)
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_report_of_nothing() -> None:
    assert sdan_fast.accelerate(nn.ReLU()) == Report((), dry_run=False)
    assert str(sdan_fast.accelerate(nn.ReLU())) == "0 of 0 modules run this package's ops"
