"""The whole network: parameter counts, keys, arithmetic, and the same forward written once more in plain torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune

import sdan_fast
from sdan_fast.bench.roofline import multiply_adds
from sdan_fast.models import SDAN, BSConv
from sdan_fast.modules import RSDAM

from .test_modules import PlainRSDAM, check_looked_at


class PlainBSConv(nn.Sequential):
    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.pw = nn.Conv2d(ci, co, 1, bias=False)
        self.dw = nn.Conv2d(co, co, 3, padding=1, groups=co)


class PlainSDAN(nn.Module):
    def __init__(self, scale: int, c: int, n: int, g: int) -> None:
        super().__init__()
        self.head = PlainBSConv(12, c)
        self.blocks = nn.ModuleList(PlainRSDAM(c, g) for _ in range(n))
        self.fuse = nn.Conv2d(n * c, c, 1)
        self.tail = PlainBSConv(c, c)
        self.up = nn.Conv2d(c, 3 * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        s = f = self.head(x.repeat(1, 4, 1, 1))
        fs = []
        for block in self.blocks:
            f = block(f)
            fs.append(f)
        f = self.tail(nn.GELU()(self.fuse(torch.cat(fs, 1)))) + s
        return self.shuffle(self.up(f))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("channels", "groups", "scale", "count"),
    [
        (56, 2, 2, 405_060),
        (56, 2, 3, 412_635),
        (56, 2, 4, 423_240),
        (48, 2, 4, 320_928),
        (40, 2, 4, 232_568),
        (56, 4, 4, 420_104),
    ],
)
def test_parameter_counts(channels: int, groups: int, scale: int, count: int) -> None:
    model = SDAN(scale, channels, 8, groups)
    assert sum(p.numel() for p in model.parameters()) == count
    assert not list(model.buffers())


def test_defaults() -> None:
    model = SDAN()
    assert (model.scale, model.channels, len(model.blocks), model.groups) == (4, 56, 8, 2)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_multiply_adds(backend: str) -> None:
    with sdan_fast.use_backend(backend), torch.no_grad(), FakeTensorMode():
        model = SDAN(4, 56, 8, 2).eval()
        x = torch.empty(1, 3, 180, 320)
        assert model(x).shape == (1, 3, 720, 1280)
        assert multiply_adds(lambda: model(x)) == pytest.approx(23.8e9, rel=0.003)


def expected_keys(blocks: int, convolutions: list[int]) -> set[str]:
    """The state-dict keys of SDAN, written out; `convolutions` per branch."""
    bsconv = ("pw.weight", "dw.weight", "dw.bias")
    both = ("weight", "bias")
    keys = {f"{name}.{leaf}" for name in ("head", "tail") for leaf in bsconv}
    keys |= {f"{name}.{leaf}" for name in ("fuse", "up") for leaf in both}
    star = ("norm.weight", "norm.bias", "pw1.weight", "dw.weight", "dw.bias", "pw2.weight")
    for i in range(blocks):
        b = f"blocks.{i}"
        keys |= {f"{b}.sdm.distill.{j}.{leaf}" for j in range(3) for leaf in both}
        keys |= {f"{b}.sdm.star.{j}.{leaf}" for j in range(4) for leaf in star}
        keys |= {f"{b}.{name}.{leaf}" for name in ("sdm.fuse", "attn.proj", "proj", "norm") for leaf in both}
        keys |= {
            f"{b}.attn.branches.{k}.{j}.{leaf}"
            for k, n in enumerate(convolutions)
            for j in range(n)
            for leaf in both
        }
    return keys


@pytest.mark.parametrize(
    ("groups", "convolutions"), [(1, [2]), (2, [2, 4]), (3, [4, 4, 4]), (4, [2, 3, 3, 4])]
)
def test_state_dict_keys(groups: int, convolutions: list[int]) -> None:
    state = SDAN(2, 12, 3, groups).state_dict()
    assert set(state) == expected_keys(3, convolutions)
    assert all(v.dim() == 4 for k, v in state.items() if k.endswith("weight") and "norm" not in k)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("scale", "blocks", "h", "w"), [(4, 2, 9, 14), (3, 1, 1, 1), (2, 3, 5, 17), (1, 1, 6, 6)]
)
def test_equals_plain_torch_in_float64(scale: int, blocks: int, h: int, w: int, groups: int) -> None:
    ours, plain = SDAN(scale, 12, blocks, groups).double(), PlainSDAN(scale, 12, blocks, groups).double()
    for p in plain.parameters():
        nn.init.normal_(p, std=0.3)
    ours.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, h, w, dtype=torch.float64)
    y, expected = ours(x), plain(x)
    assert y.shape == (2, 3, scale * h, scale * w)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    seed = torch.randn_like(expected)
    y.backward(seed)
    expected.backward(seed)
    wanted = dict(plain.named_parameters())
    for key, p in ours.named_parameters():
        assert p.grad is not None, key
        torch.testing.assert_close(p.grad, wanted[key].grad, rtol=1e-7, atol=1e-7, msg=key)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_receptive_radius_is_exact(blocks: int, groups: int) -> None:
    """One input pixel changes outputs exactly as far away as `receptive_radius` says."""
    model = SDAN(1, 12, blocks, groups).double().eval()
    radius = model.receptive_radius
    x = torch.rand(1, 3, 1, 2 * radius + 9, dtype=torch.float64)
    other = x.clone()
    middle = radius + 4
    other[..., middle] += 1e4
    with torch.no_grad():
        changed = (model(x) != model(other)).any(dim=1)[0, 0].nonzero().flatten()
    assert changed.max() <= middle + radius
    assert changed.min() >= middle - radius
    grad_x = x.clone().requires_grad_()
    model(grad_x)[..., middle].sum().backward()
    assert grad_x.grad is not None
    reached = grad_x.grad.abs().sum(dim=1)[0, 0].nonzero().flatten()
    assert reached.max() == middle + radius
    assert reached.min() == middle - radius


def test_receptive_radius_of_the_default_model() -> None:
    with torch.device("meta"):
        assert SDAN().receptive_radius == 315


def test_meta_device() -> None:
    with torch.device("meta"):
        assert SDAN(4, 8, 1)(torch.empty(2, 3, 5, 6)).shape == (2, 3, 20, 24)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_empty_batch(dtype: torch.dtype, backend: str) -> None:
    model = SDAN(2, 8, 1).to(dtype)
    x = torch.empty(0, 3, 5, 6, dtype=dtype)
    with sdan_fast.use_backend(backend):
        with torch.no_grad():
            assert model(x).shape == (0, 3, 10, 12)
        y = model(x.requires_grad_())
        assert y.shape == (0, 3, 10, 12)
        y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 3, 0, 6), (2, 3, 5, 0), (0, 3, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pictures_without_pixels_are_refused(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = SDAN(2, 8, 1).to(dtype)
    for training in (False, True):
        with (
            torch.set_grad_enabled(training),
            pytest.raises(ValueError, match="x must have at least one row and one column, and its shape is"),
        ):
            model(torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 1, 8, 8), (1, 3, 8), (1, 8, 8, 3)])
def test_wrong_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have the shape \(N, 3, H, W\), and it has"):
        SDAN(2, 8, 1)(torch.rand(shape))
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, and it is a NoneType"):
        SDAN(2, 8, 1)(None)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ((0, 56, 8, 2), "scale must be at least 1"),
        ((4, 55, 8, 1), "channels must be even"),
        ((4, 56, 0, 2), "blocks must be at least 1"),
        ((4, 56, 8, 3), "channels must be divisible by groups"),
        ((4, 56, 8, 5), "groups must be one of"),
    ],
)
def test_wrong_configurations_are_refused(config: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SDAN(*config)


def test_repr_and_docstrings_say_what_it_is() -> None:
    assert "SDAN(\n  scale=4, channels=8, blocks=1, groups=2" in repr(SDAN(4, 8, 1))
    assert "reconstruction" in (SDAN.__doc__ or "")
    assert BSConv(3, 4)(torch.rand(1, 3, 2, 2)).shape == (1, 4, 2, 2)


@pytest.mark.parametrize(
    "part", ["head", "head.dw", "blocks.0", "blocks.1.sdm.star.2.pw1", "fuse", "tail", "tail.pw", "up"]
)
def test_hooks_on_the_parts_run(part: str) -> None:
    """Whoever hooks a part of the network, at any depth, sees it called, in inference too, and its gradient."""
    check_looked_at(SDAN(2, 4, 2).eval(), part, torch.rand(1, 3, 6, 7), "sdan")


def test_a_replaced_block_is_called() -> None:
    model = SDAN(2, 4, 2).eval()
    x = torch.rand(1, 3, 6, 7)
    with torch.no_grad():
        expected = model(x)
        model.blocks[0] = torch.nn.Sequential(model.blocks[0])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_blocks_that_differ_run_as_they_are() -> None:
    """The fused op has one layout and one eps for all blocks."""
    x = torch.rand(1, 3, 6, 7)
    for change in (
        lambda model: model.blocks.__setitem__(1, RSDAM(12, 4)),
        lambda model: setattr(model.blocks[1].norm, "eps", 0.5),
        lambda model: model.blocks[1].attn.branches.__setitem__(0, RSDAM(12, 3).attn.branches[1]),
        lambda model: setattr(model.fuse, "bias", None),
    ):
        model = SDAN(2, 12, 2, 3).eval()
        with torch.no_grad():
            before = model(x)
            change(model)
            assert sdan_fast.explain(model, x).op != "sdan"
            y = model(x)
            assert y.shape == before.shape
            parts = nn.functional.pixel_shuffle(model.up(model.features(x)), model.scale)
            assert torch.equal(y, parts)


def test_a_hook_that_computes_a_weight_runs() -> None:
    """Pruning, and the older weight_norm, make a part's weight in a hook before each call."""
    model = SDAN(2, 4, 2)
    prune.l1_unstructured(model.fuse, "weight", 0.5)
    for _ in range(2):
        model(torch.rand(1, 3, 6, 7)).sum().backward()
