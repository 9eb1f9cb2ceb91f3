"""SDAN's building blocks against the same mathematics written once more, in plain torch.nn and in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sdan_fast
from sdan_fast.modules import BRANCHES, MMLKA, RSDAM, SDM, LayerNorm2d, StarConv


class PlainNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def plain_star(ci: int, co: int) -> nn.Module:
    class PlainStar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = PlainNorm(ci)
            self.pw1 = nn.Conv2d(ci, co, 1, bias=False)
            self.dw = nn.Conv2d(co, co, 3, padding=1, groups=co)
            self.pw2 = nn.Conv2d(ci, co, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(x)
            return nn.GELU()(self.dw(self.pw1(z))) * self.pw2(z)

    return PlainStar()


class PlainSDM(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        h = c // 2
        self.distill = nn.ModuleList([nn.Conv2d(c, h, 1), nn.Conv2d(c, h, 1), nn.Conv2d(c, h, 1)])
        self.star = nn.ModuleList([plain_star(c, c), plain_star(c, c), plain_star(c, c), plain_star(c, h)])
        self.fuse = nn.Conv2d(4 * h, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        gelu = nn.GELU()
        c1, c2, c3 = self.distill
        s1, s2, s3, s4 = self.star
        d1, r1 = gelu(c1(x)), gelu(s1(x))
        d2, r2 = gelu(c2(r1)), gelu(s2(r1))
        d3, r3 = gelu(c3(r2)), gelu(s3(r2))
        r4 = gelu(s4(r3))
        return self.fuse(torch.cat([d1, d2, d3, r4], 1))


# Every convolution of every branch, written out: (kh, kw, padding h, padding w, dilation h, dilation w).
CONVOLUTIONS = {
    1: [[(9, 9, 4, 4, 1, 1), (9, 9, 20, 20, 5, 5)]],
    2: [
        [(7, 7, 3, 3, 1, 1), (7, 7, 12, 12, 4, 4)],
        [(1, 11, 0, 5, 1, 1), (11, 1, 5, 0, 1, 1), (1, 11, 0, 30, 1, 6), (11, 1, 30, 0, 6, 1)],
    ],
    3: [
        [(1, 3, 0, 1, 1, 1), (3, 1, 1, 0, 1, 1), (1, 3, 0, 2, 1, 2), (3, 1, 2, 0, 2, 1)],
        [(1, 7, 0, 3, 1, 1), (7, 1, 3, 0, 1, 1), (1, 7, 0, 12, 1, 4), (7, 1, 12, 0, 4, 1)],
        [(1, 9, 0, 4, 1, 1), (9, 1, 4, 0, 1, 1), (1, 9, 0, 20, 1, 5), (9, 1, 20, 0, 5, 1)],
    ],
    4: [
        [(5, 5, 2, 2, 1, 1), (5, 5, 6, 6, 3, 3)],
        [(1, 7, 0, 3, 1, 1), (7, 1, 3, 0, 1, 1), (7, 7, 12, 12, 4, 4)],
        [(9, 9, 4, 4, 1, 1), (1, 9, 0, 20, 1, 5), (9, 1, 20, 0, 5, 1)],
        [(1, 11, 0, 5, 1, 1), (11, 1, 5, 0, 1, 1), (1, 11, 0, 30, 1, 6), (11, 1, 30, 0, 6, 1)],
    ],
}


class PlainMMLKA(nn.Module):
    def __init__(self, c: int, g: int) -> None:
        super().__init__()
        n = c // g
        self.branches = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.Conv2d(n, n, (kh, kw), padding=(ph, pw), dilation=(dh, dw), groups=n)
                    for kh, kw, ph, pw, dh, dw in branch
                )
            )
            for branch in CONVOLUTIONS[g]
        )
        self.proj = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.chunk(len(self.branches), 1)
        return x * self.proj(torch.cat([f(chunk) for f, chunk in zip(self.branches, chunks, strict=True)], 1))


class PlainRSDAM(nn.Module):
    def __init__(self, c: int, g: int) -> None:
        super().__init__()
        self.sdm = PlainSDM(c)
        self.attn = PlainMMLKA(c, g)
        self.proj = nn.Conv2d(c, c, 1)
        self.norm = PlainNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.proj(self.attn(self.sdm(x))))


def same(ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Both hold the same keys and shapes, and with the same random parameters give the same output and gradients."""
    ours.double()
    plain.double()
    for p in plain.parameters():
        nn.init.normal_(p, std=0.3)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    ours.load_state_dict(plain.state_dict())
    y, expected = ours(x), plain(x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(expected)
    expected.backward(seed)
    y.backward(seed)
    wanted = dict(plain.named_parameters())
    for key, p in ours.named_parameters():
        assert p.grad is not None, key
        torch.testing.assert_close(p.grad, wanted[key].grad, rtol=1e-8, atol=1e-8, msg=key)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


SIZES = [(2, 9, 13), (1, 1, 1), (1, 40, 3)]


@pytest.mark.parametrize(("n", "h", "w"), SIZES)
def test_layer_norm(n: int, h: int, w: int) -> None:
    same(LayerNorm2d(6), PlainNorm(6), torch.randn(n, 6, h, w, dtype=torch.float64))


@pytest.mark.parametrize(("n", "h", "w"), SIZES)
@pytest.mark.parametrize(("ci", "co"), [(6, 6), (6, 3)])
def test_star_conv(n: int, h: int, w: int, ci: int, co: int) -> None:
    same(StarConv(ci, co), plain_star(ci, co), torch.randn(n, ci, h, w, dtype=torch.float64))


@pytest.mark.parametrize("outer", ["gelu", "relu6", "relu", "silu"])
def test_star_conv_outer(outer: str) -> None:
    act = {"gelu": nn.GELU(), "relu6": nn.ReLU6(), "relu": nn.ReLU(), "silu": nn.SiLU()}[outer]
    ours, plain = StarConv(4, 6, outer=outer).double(), plain_star(4, 6).double()
    ours.load_state_dict(plain.state_dict())
    x = 5 * torch.randn(2, 4, 5, 7, dtype=torch.float64)
    assert not torch.allclose(act(plain(x)), plain(x), atol=1e-3)
    torch.testing.assert_close(ours(x), act(plain(x)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "h", "w"), SIZES)
def test_sdm(n: int, h: int, w: int) -> None:
    same(SDM(8), PlainSDM(8), torch.randn(n, 8, h, w, dtype=torch.float64))


@pytest.mark.parametrize(("n", "h", "w"), [(2, 9, 13), (1, 1, 1), (1, 67, 3)])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_mmlka(n: int, h: int, w: int, groups: int) -> None:
    same(MMLKA(12, groups), PlainMMLKA(12, groups), torch.randn(n, 12, h, w, dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_rsdam(groups: int) -> None:
    same(RSDAM(12, groups), PlainRSDAM(12, groups), torch.randn(2, 12, 11, 8, dtype=torch.float64))


def test_branch_tables() -> None:
    assert BRANCHES == {
        1: (("square", "square", 9),),
        2: (("square", "square", 7), ("strip", "strip", 11)),
        3: (("strip", "strip", 3), ("strip", "strip", 7), ("strip", "strip", 9)),
        4: (("square", "square", 5), ("strip", "square", 7), ("square", "strip", 9), ("strip", "strip", 11)),
    }


def test_branch_convolutions() -> None:
    for groups, branches in CONVOLUTIONS.items():
        built = [
            [(*conv.kernel_size, *conv.padding, *conv.dilation) for conv in branch]
            for branch in MMLKA(12, groups).branches
        ]
        assert built == branches


def test_default_initialisation_is_that_of_conv2d() -> None:
    torch.manual_seed(1)
    ours = MMLKA(8, 1)
    torch.manual_seed(1)
    plain = PlainMMLKA(8, 1)
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    norm = LayerNorm2d(5)
    assert torch.equal(norm.weight, torch.ones(5))
    assert torch.equal(norm.bias, torch.zeros(5))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MMLKA(13, 1), "channels must be even, and it is 13"),
        (lambda: MMLKA(14, 4), r"channels must be divisible by groups \(4\), and it is 14"),
        (lambda: MMLKA(12, 5), "groups must be one of 1, 2, 3, 4, and it is 5"),
        (lambda: MMLKA(12, 0), "groups must be one of 1, 2, 3, 4, and it is 0"),
        (lambda: MMLKA(12, [2]), r"groups must be one of 1, 2, 3, 4, and it is \[2\]"),
        (lambda: MMLKA(12, True), "groups must be one of 1, 2, 3, 4, and it is True"),
        (lambda: MMLKA(0, 2), "channels must be at least 1, and it is 0"),
        (lambda: SDM(7), "channels must be even, and it is 7"),
        (lambda: SDM(-2), "channels must be at least 1, and it is -2"),
        (lambda: RSDAM(10, 3), r"channels must be divisible by groups \(3\), and it is 10"),
        (lambda: StarConv(4, 0), "channels_out must be at least 1, and it is 0"),
        (lambda: StarConv(4, 4, outer="tanh"), "outer must be one of .*gelu.*, and it is 'tanh'"),
        (lambda: LayerNorm2d(0), "channels must be at least 1, and it is 0"),
    ],
)
def test_wrong_configurations_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("channels", [8.0, "8", True])
def test_wrong_types_are_refused(channels: object) -> None:
    with pytest.raises(TypeError, match="channels must be an int"):
        MMLKA(channels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [lambda: LayerNorm2d(8), lambda: StarConv(8, 4), lambda: SDM(8), lambda: MMLKA(8), lambda: RSDAM(8)],
)
def test_wrong_channels_of_the_input_are_refused(make: object) -> None:
    module = make()  # type: ignore[operator]
    with pytest.raises((ValueError, RuntimeError), match=r"\b6\b"):
        module(torch.randn(1, 6, 5, 5))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_memory_format_is_kept(groups: int) -> None:
    module = RSDAM(12, groups).eval()
    x = torch.randn(2, 12, 6, 7)
    with torch.no_grad():
        plain = module(x)
        last = module.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)


def test_a_whole_module_is_one_op_whose_parameters_are_read_at_each_call() -> None:
    module = StarConv(4, 4).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    before = module(x)
    assert sdan_fast.explain(module, x).op == "star_conv"
    with torch.no_grad():
        module.pw1.weight.mul_(2)
    assert not torch.allclose(module(x), before)


WHOLES = {
    "star_conv": lambda: StarConv(8, 4),
    "sdm": lambda: SDM(8),
    "mm_lka": lambda: MMLKA(8),
    "rsdam": lambda: RSDAM(8),
}


def parts_of(make: str) -> list[str]:
    """The parts that a module calls itself; those of its parts are tested there, and once from the whole network."""
    whole = WHOLES[make]()
    inner = [
        name for name, part in whole.named_modules() if name and isinstance(part, (StarConv, SDM, MMLKA))
    ]
    return [
        name
        for name, part in whole.named_modules()
        if name and not isinstance(part, nn.ModuleList) and not any(name.startswith(f"{i}.") for i in inner)
    ]


def check_looked_at(whole: nn.Module, part: str, x: Tensor, op: str) -> None:
    """All hooks of one part run, in inference and in training, and results stay; without them it is one op again."""
    assert sdan_fast.explain(whole, x).op == op
    inner = whole.get_submodule(part)
    with torch.no_grad():
        expected = whole(x)
    seen: list[str] = []
    kinds = {
        "pre": inner.register_forward_pre_hook,
        "forward": inner.register_forward_hook,
        "backward pre": inner.register_full_backward_pre_hook,
        "backward": inner.register_full_backward_hook,
    }
    for kind, register in kinds.items():
        seen.clear()
        handle = register(lambda *_, kind=kind: seen.append(kind))
        with torch.no_grad():
            torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-5)
        whole(x.clone().requires_grad_()).sum().backward()
        assert seen == [kind] * (1 if "backward" in kind else 2)
        handle.remove()
        assert sdan_fast.explain(whole, x).op == op


@pytest.mark.parametrize(("make", "part"), [(make, part) for make in WHOLES for part in parts_of(make)])
def test_hooks_on_parts_run_at_any_depth(make: str, part: str) -> None:
    check_looked_at(WHOLES[make](), part, torch.randn(1, 8, 6, 7), make)


@pytest.mark.parametrize("make", WHOLES)
def test_replaced_parts_are_called(make: str) -> None:
    """Another module in a part's place, a wrapper or none at all, and another forward of the same one."""
    x = torch.randn(1, 8, 6, 7)
    for part in parts_of(make):
        whole = WHOLES[make]()
        parent, _, name = part.rpartition(".")
        inner = whole.get_submodule(part)
        with torch.no_grad():
            expected = whole(x)
            inner.forward = lambda y, forward=inner.forward: 2 * forward(y)
            doubled = whole(x)
            assert not torch.allclose(doubled, expected), part
            del inner.forward
            torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-5)
            setattr(whole.get_submodule(parent), name, nn.Sequential(inner))
            torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-5, msg=part)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("make", WHOLES)
def test_computed_parameters(make: str) -> None:
    """What computes a part's weight is asked at each call: parametrizations, and pruning, which has a hook for it."""
    x = torch.randn(1, 8, 6, 7)
    for part in parts_of(make):
        plain, whole = WHOLES[make](), WHOLES[make]()
        whole.load_state_dict(plain.state_dict())
        inner = whole.get_submodule(part)
        if "weight" not in inner._parameters:
            continue
        with torch.no_grad():
            plain.get_submodule(part).weight.mul_(2)
        nn.utils.parametrize.register_parametrization(inner, "weight", Doubled())
        for _ in range(2):  # a second step fails where a graph was kept
            y = whole(x)
            torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
            y.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(whole(x), plain(x), rtol=1e-4, atol=1e-5)
        nn.utils.parametrize.remove_parametrizations(inner, "weight")
        torch.testing.assert_close(whole(x), plain(x), rtol=1e-4, atol=1e-5)
        prune.identity(inner, "weight")
        for _ in range(2):
            whole(x).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(whole(x), plain(x), rtol=1e-4, atol=1e-5)


def test_each_norm_keeps_its_own_eps() -> None:
    module = RSDAM(8)
    module.sdm.star[1].norm.eps = 0.5
    x = torch.randn(1, 8, 6, 7)
    with torch.no_grad():
        y = module(x)
        expected = x + module.norm(module.proj(module.attn(module.sdm(x))))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        module.sdm.star[1].norm.eps = module.norm.eps
        assert not torch.allclose(module(x), y, atol=1e-4)


@pytest.mark.parametrize("make", WHOLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looked_at_modules_keep_dtype_and_memory_format(make: str, dtype: torch.dtype) -> None:
    whole = WHOLES[make]().to(dtype, memory_format=torch.channels_last)
    whole.get_submodule(parts_of(make)[-1]).register_forward_hook(lambda *_: None)
    x = torch.randn(2, 8, 6, 7, dtype=dtype).to(memory_format=torch.channels_last)
    y = whole(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()


def test_repr_says_what_it_is() -> None:
    assert "MMLKA(\n  12, groups=3" in repr(MMLKA(12, 3))
    assert "outer='gelu'" in repr(SDM(4))
    assert repr(LayerNorm2d(4)) == "LayerNorm2d(4, eps=1e-05)"


def test_reference_backend_runs_the_same_module() -> None:
    module = RSDAM(12, 4)
    x = torch.randn(1, 12, 9, 9)
    with torch.no_grad():
        ours = module(x)
        with sdan_fast.use_backend("reference"):
            reference = module(x)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
