"""What every op has to pass, on every backend that this process can run; `test_<op>.py` supplies the calls.

The yardstick is DESIGN's error bound: no more than twice the error of eager PyTorch in the same dtype, plus two ulps of
the largest value, both against float64 on the same (already rounded) input.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import sdan_fast
from sdan_fast import backends, functional, reference
from sdan_fast.ops import OPS, Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")

# Under Triton's interpreter only Triton has something new to show.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CANDIDATES = ("triton",) if INTERPRETING else ("cpu", "triton", "cuda")
BACKENDS = tuple(name for name in CANDIDATES if backends.BACKENDS[name].missing is None)


@dataclass(frozen=True)
class Case:
    """One call of an op: `build(t)` makes the arguments out of `t(*shape)`, which draws a float64 tensor."""

    id: str
    build: Callable[[Callable[..., Tensor]], tuple[Sequence[Any], dict[str, Any]]]

    def arguments(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> tuple[list[Any], dict[str, Any]]:
        """The same numbers on every device."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.id)))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        args, kwargs = self.build(draw)
        return list(cast((list(args), kwargs), dtype, device)[0]), kwargs


def device_of(backend: str) -> str:
    """The device of the tensors that a backend takes: "cpu" for the reference, and for Triton's interpreter."""
    known = backends.BACKENDS.get(backend)
    return known.devices[0] if known is not None else "cpu"


def cast(tree: Any, dtype: torch.dtype, device: str | None = None) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, dtype), tree)


def fresh(tree: Any, dtype: torch.dtype, requires_grad: bool = False) -> Any:
    """Leaves in another dtype."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.detach().to(dtype).clone().requires_grad_(requires_grad), tree
    )


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


def every_program() -> Iterator[str]:
    """The memory formats, each with and without oneDNN: eager PyTorch is a program of its own in each of them, and any
    one may be lucky with a given draw."""
    before = torch._C._get_mkldnn_enabled()
    try:
        for enabled in (True, False):
            torch._C._set_mkldnn_enabled(
                enabled
            )  # torch.backends.mkldnn.flags warns of GPUs that are not there
            yield from FORMATS[:2]
    finally:
        torch._C._set_mkldnn_enabled(before)


def worst_of(runs: list[list[Tensor]], exact: list[Tensor]) -> list[Tensor]:
    """Of each result the one that is furthest from float64."""
    return [
        max(candidates, key=lambda g, e=e: error(g, e)) for e, *candidates in zip(exact, *runs, strict=True)
    ]


def assert_within_bound(
    value: Tensor, eager: Tensor, exact: Tensor, what: str = "output", times: float = 1
) -> None:
    assert value.dtype == eager.dtype, f"{what}: {value.dtype} where eager PyTorch has {eager.dtype}"
    assert value.shape == exact.shape, f"{what}: {tuple(value.shape)} where {tuple(exact.shape)} was expected"
    assert not value.isnan().any() or exact.isnan().any(), f"{what} has NaNs: something was not written"
    scale = exact.abs().max().item() if exact.numel() else 0.0
    bound = times * (2 * error(eager, exact) + 2 * torch.finfo(value.dtype).eps * scale)
    assert error(value, exact) <= bound, f"{what}: error {error(value, exact):.3g} over the bound {bound:.3g}"


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; the gaps of a view hold a sentinel that no kernel may read or write."""
    if layout == "contiguous" or x.dim() != 4:
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        n, c, h, w = x.shape
        big = torch.full((n + 1, c + 2, h + 3, 2 * w + 5), float("nan"), dtype=x.dtype, device=x.device)
        view = big[1:, 1 : c + 1, 2 : h + 2, 3 : 2 * w + 3 : 2]
        view.copy_(x)
        return view
    if layout == "expanded":
        return x[:, :, :, :1].expand(x.shape)
    if layout == "repeated":
        return x[:1].expand(x.shape[0] + 1, -1, -1, -1)
    raise AssertionError(layout)


def same_bits(backward: Callable[[list[bool]], list[Tensor]], slots: int) -> None:
    """One thread and two, and any subset of the gradients, give the same bits."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        everything = backward([True] * slots)
        for n in (1, 2):
            torch.set_num_threads(n)
            for mask in itertools.product((False, True), repeat=slots):
                wanted = [g for g, asked in zip(everything, mask, strict=True) if asked]
                for one, other in zip(backward(list(mask)), wanted, strict=True):
                    assert torch.equal(one, other), f"{n} threads, {mask}"
    finally:
        torch.set_num_threads(threads)


Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # the name of an op, its flat arguments and its options


def full_mask(call: Call) -> list[bool]:
    """Every gradient that the call has."""
    return [slot is not None for slot in OPS[call[0]].slots(call[1])]


def kernel(call: Call, grad: Tensor, mask: Sequence[bool]) -> list[Tensor]:
    """The gradients in `mask`, by the CPU kernel alone."""
    name, args, kwargs = call
    return OPS[name].backward_overloads["cpu"](grad, *args, **kwargs, output_mask=list(mask))


def formula(call: Call, grad: Tensor, mask: Sequence[bool]) -> list[Tensor]:
    """The gradients in `mask`, by the definition."""
    name, args, kwargs = call
    found = OPS[name].reference_backward(grad, *args, **kwargs, output_mask=list(mask))
    return [g for g, wanted in zip(found, mask, strict=True) if wanted and g is not None]


def captured(
    fn_name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Op, tuple[Any, ...], dict[str, Any]]:
    """The op and its flat arguments that a call of `functional` ends in."""
    token = backends._current.set(backends._EXPLAIN)
    try:
        getattr(functional, fn_name)(*args, **kwargs)
    except backends._Explained as call:
        return call.op, call.args_, call.kwargs_
    finally:
        backends._current.reset(token)
    raise AssertionError(f"{fn_name} called no op")


class OpContract:
    """The tests of one op. A subclass names it, lists its calls, and says how many leading arguments are images."""

    fn_name: str
    cases: Sequence[Case]
    images: int = 1
    any_shape: bool = False  # whether the op takes images without pixels, too
    grad_cases: Sequence[str] | None = None  # ids for the slow derivative checks; default: the first two
    differentiated_as: str | None = None  # a composed op is differentiated through its parts: the name of one

    # -- helpers --

    @property
    def ours(self) -> Callable[..., Tensor]:
        return getattr(functional, self.fn_name)

    @property
    def plain(self) -> Callable[..., Tensor]:
        return getattr(reference, self.fn_name)

    def with_layout(self, args: list[Any], layout: str) -> list[Any]:
        if layout == "expanded" and self.differentiated_as is not None:
            # Level after level, a handful of distinct pixels end where LayerNorm divides by next to nothing.
            layout = "repeated"
        return [laid_out(a, layout) if i < self.images else a for i, a in enumerate(args)]

    def small(self) -> Iterator[Case]:
        wanted = self.grad_cases or [c.id for c in self.cases[:2]]
        return (c for c in self.cases if c.id in wanted)

    # -- values --

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
    def test_matches_float64(self, dtype: torch.dtype, backend: str) -> None:
        for case in self.cases:
            args, kwargs = case.arguments(dtype, device_of(backend))
            results = []
            for layout in FORMATS:
                call = self.with_layout(args, layout)
                exact = self.plain(*cast(call, torch.float64), **kwargs)
                # Eager PyTorch is two programs, one for each memory format, and either may be lucky.
                runs = [self.plain(*self.with_layout(call, other), **kwargs) for other in FORMATS[:2]]
                eager = max(runs, key=lambda y, exact=exact: error(y, exact))
                with sdan_fast.use_backend(backend), torch.no_grad():
                    y = self.ours(*call, **kwargs)
                wanted = reference.output_format(call[0])
                assert y.is_contiguous(memory_format=wanted), f"{case.id} {layout}: strides {y.stride()}"
                assert y.dtype == eager.dtype and y.shape == exact.shape and not y.isnan().any()
                results.append((y, eager, exact))
            self.check_all(*map(list, zip(*results, strict=True)), case.id)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_empty_batch(self, backend: str) -> None:
        args, kwargs = self.cases[0].arguments(torch.float32, device_of(backend))
        empty = [a[:0] if i < self.images else a for i, a in enumerate(args)]
        with sdan_fast.use_backend(backend):
            y = self.ours(*empty, **kwargs)
        assert y.shape == self.plain(*empty, **kwargs).shape
        assert y.numel() == 0
        leaves = fresh(empty, torch.float32, requires_grad=True)
        with sdan_fast.use_backend(backend):
            self.ours(*leaves, **kwargs).sum().backward()
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in tensors(leaves))

    @pytest.mark.parametrize("backend", ("reference", *BACKENDS))
    def test_images_without_pixels_are_refused(self, backend: str) -> None:
        """In every dtype, in inference and in training, by one sentence; PyTorch's convolutions refuse them too."""
        for dtype in (torch.float32, torch.bfloat16, *[torch.float64] * (backend == "reference")):
            args, kwargs = self.cases[0].arguments(dtype, device_of(backend))
            for training in (False, True):
                for cut in (slice(0), slice(None)), (slice(None), slice(0)):
                    leaves = fresh(args, dtype, requires_grad=training)
                    empty = [
                        a[(slice(None), slice(None), *cut)] if i < self.images else a
                        for i, a in enumerate(leaves)
                    ]
                    with sdan_fast.use_backend(backend):
                        if self.any_shape:
                            assert self.ours(*empty, **kwargs).shape == empty[0].shape
                            continue
                        with pytest.raises(ValueError, match="must have at least one row and one column"):
                            self.ours(*empty, **kwargs)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_inputs_stay_and_results_repeat(self, backend: str) -> None:
        """Inputs are not written, and two runs agree bit by bit, gradients included."""
        args, kwargs = self.cases[0].arguments(torch.float32, device_of(backend))
        results = []
        for _ in range(2):
            leaves = fresh(args, torch.float32, requires_grad=True)
            with sdan_fast.use_backend(backend):
                y = self.ours(*leaves, **kwargs)
            y.backward(torch.ones_like(y))
            results.append([y.detach(), *(t.grad for t in tensors(leaves))])
            for before, after in zip(tensors(args), tensors(leaves), strict=True):
                assert torch.equal(before, after)
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)

    # -- derivatives --

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
    def test_gradients_match_float64(self, dtype: torch.dtype, backend: str) -> None:
        collected: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for case in self.cases:
            base, kwargs = case.arguments(dtype, device_of(backend))

            def gradients(
                run: Callable[..., Tensor],
                kind: torch.dtype,
                layout: str,
                base: Any = base,
                kwargs: Any = kwargs,
            ) -> list[Tensor]:
                leaves = fresh(base, kind, requires_grad=True)
                y = run(*self.with_layout(leaves, layout), **kwargs)
                if run == self.ours:
                    assert self.differentiated_as or "_Function" in type(y.grad_fn).__name__, (
                        "plain PyTorch ran"
                    )
                y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype).to(y))
                return [t.grad for t in tensors(leaves)]

            exact = gradients(self.plain, torch.float64, "contiguous")
            # PyTorch's own 16-bit channels_last backward is not always right, so it is no yardstick.
            if dtype == torch.float32:
                eager = [gradients(self.plain, dtype, layout) for layout in every_program()]
            else:
                eager = [gradients(self.plain, dtype, "contiguous")]
            worst = worst_of(eager, exact)
            for layout in ("contiguous", "channels_last", "sliced"):
                with sdan_fast.use_backend(backend):
                    ours = gradients(self.ours, dtype, layout)
                if self.differentiated_as is None:
                    self.check_all(ours, worst, exact, f"{case.id} {layout}")
                for everything, some in zip(collected, (ours, worst, exact), strict=True):
                    everything += some
        if self.differentiated_as is not None:
            self.check_all(*collected, "all cases,")

    def check_all(self, ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], what: str) -> None:
        """Each tensor within the bound. A composed op is a long chain of ops that are each within it, and some of its
        results have a handful of distinct elements: there the yardstick is eager's worst relative error over all."""
        if self.differentiated_as is None:
            for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
                assert_within_bound(*triple, f"{what} number {i}")
            return
        scales = [e.abs().max().item() for e in exact]
        worst = max(error(g, e) / s for g, e, s in zip(eager, exact, scales, strict=True))
        for i, (g, e, s) in enumerate(zip(ours, exact, scales, strict=True)):
            assert error(g, e) / s <= 2 * worst + 2 * torch.finfo(g.dtype).eps, f"{what} number {i}"

    def test_gradcheck(self) -> None:
        for case in self.small():
            op, flat, kwargs = self.flat_call(case, torch.float64)
            leaves = [t.detach().requires_grad_() for t in op.flatten(flat)]

            def run(*values: Tensor, op: Op = op, flat: Any = flat, kwargs: Any = kwargs) -> Tensor:
                return op.overloads[""](*op.unflatten(flat, values), **kwargs)

            assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradient_of_each_argument_alone(self, backend: str) -> None:
        """Any one tensor may require a gradient: x, a weight, a single bias."""
        case = next(self.small())
        args, kwargs = case.arguments(torch.float32, device_of(backend))
        collected: list[list[Tensor]] = [[], [], []]
        for i in range(len(tensors(args))):
            runs = ((self.plain, torch.float64), (self.plain, torch.float32), (self.ours, torch.float32))
            for grads, (run, kind) in zip(collected, runs, strict=True):
                leaves = fresh(args, kind)
                leaf = tensors(leaves)[i].requires_grad_()
                with sdan_fast.use_backend(backend):
                    y = run(*leaves, **kwargs)
                grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
        exact, eager, ours = collected
        self.check_all(ours, eager, exact, "each argument alone,")

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_second_derivative(self, backend: str) -> None:
        case = next(self.small())
        args, kwargs = case.arguments(torch.float32, device_of(backend))

        def second(run: Callable[..., Tensor], kind: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
            leaves = fresh(args, kind, requires_grad=True)
            with sdan_fast.use_backend(backend):
                y = run(*self.with_layout(leaves, layout), **kwargs)
            first = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)[0]
            return list(torch.autograd.grad(first.square().sum(), tensors(leaves)))

        exact = second(self.plain, torch.float64)
        eager = [second(self.plain, torch.float32, layout) for layout in every_program()]
        self.check_all(second(self.ours, torch.float32), worst_of(eager, exact), exact, "second derivative")

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_backward_runs_where_forward_ran(self, backend: str) -> None:
        args, kwargs = self.cases[0].arguments(torch.float32, device_of(backend))
        leaves = fresh(args, torch.float32, requires_grad=True)
        with sdan_fast.use_backend(backend):
            y = self.ours(*leaves, **kwargs)
        seen: list[str] = []

        class Record(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        with sdan_fast.use_backend("reference"), Record():
            y.sum().backward()
        op = (
            captured(self.fn_name, args, kwargs)[0]
            if self.differentiated_as is None
            else OPS[self.differentiated_as]
        )
        suffix = backend if backend in op.backward_kernels else "default"
        assert f"sdan_fast.{op.name}_backward.{suffix}" in seen

    # -- torch's own contract --

    def flat_call(self, case: Case, dtype: torch.dtype) -> tuple[Op, tuple[Any, ...], dict[str, Any]]:
        args, kwargs = case.arguments(dtype)
        return captured(self.fn_name, args, kwargs)

    @pytest.mark.parametrize("overload", ("", *BACKENDS), ids=lambda o: o or "default")
    def test_opcheck(self, overload: str) -> None:
        case = next(self.small())
        for layout in ("contiguous", "channels_last"):
            args, kwargs = case.arguments(torch.float32, device_of(overload))
            leaves = self.with_layout(fresh(args, torch.float32), layout)
            for leaf in tensors(leaves):
                leaf.requires_grad_()
            op, flat, op_kwargs = captured(self.fn_name, leaves, kwargs)
            torch.library.opcheck(op.overloads[overload], flat, op_kwargs)
            grad = torch.randn_like(op.overloads[overload](*flat, **op_kwargs))
            if not op.composed and (overload == "" or overload in op.backward_kernels):
                mask = [slot is not None for slot in op.slots(flat)]
                torch.library.opcheck(
                    op.backward_overloads[overload],
                    (grad, *pytree.tree_map_only(Tensor, Tensor.detach, flat)),
                    {**op_kwargs, "output_mask": mask},
                )

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("mode", ("forward", "all", "input", "parameters"))
    def test_flops_are_those_of_the_reference(self, mode: str, backend: str) -> None:
        args, kwargs = self.cases[0].arguments(torch.float32, device_of(backend))
        counts = []
        for run in (self.plain, self.ours):
            leaves = fresh(args, torch.float32)
            for i, leaf in enumerate(tensors(leaves)):
                leaf.requires_grad_(
                    mode == "all" or (mode == "input") == (i < self.images) and mode != "forward"
                )
            if mode == "parameters" and len(tensors(leaves)) == self.images:
                return  # the op has no parameters
            with sdan_fast.use_backend(backend), FlopCounterMode(display=False) as counter:
                y = run(*leaves, **kwargs)
                if mode != "forward":
                    y.sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1]

    @pytest.mark.parametrize(
        "low", (torch.bfloat16, torch.float16), ids=lambda d: str(d).removeprefix("torch.")
    )
    @pytest.mark.parametrize(
        "dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d).removeprefix("torch.")
    )
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_autocast(self, backend: str, dtype: torch.dtype, low: torch.dtype) -> None:
        """The dtype that the reference sequence returns, and its values, whatever the dtype of the images."""
        case = next(self.small())
        args, kwargs = case.arguments(torch.float32, device_of(backend))
        mixed = [a.to(dtype) if i < self.images else a for i, a in enumerate(args)]
        op, flat, op_kwargs = captured(self.fn_name, args, kwargs)
        with torch.autocast(device_of(backend), dtype=low):
            try:
                expected = self.plain(*mixed, **kwargs)
            except RuntimeError:
                pytest.skip("PyTorch's own sequence does not mix these dtypes")
            with sdan_fast.use_backend(backend):
                leaves = fresh(args, torch.float32, requires_grad=True)
                y = self.ours(
                    *[a.to(dtype) if i < self.images else a for i, a in enumerate(leaves)], **kwargs
                )
                direct = op.overloads[""](*mixed[: self.images], *flat[self.images :], **op_kwargs)
                assert direct.dtype == expected.dtype
        assert y.dtype == expected.dtype
        exact = self.plain(*cast(args, torch.float64), **kwargs)
        scale = exact.abs().max().item()
        assert error(y.detach(), exact) <= 2 * error(expected, exact) + 2 * torch.finfo(low).eps * scale
        y.float().sum().backward()
        for leaf in tensors(leaves):
            assert leaf.grad is not None and leaf.grad.dtype == torch.float32

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_transforms(self, backend: str) -> None:
        """vmap, grad and jvp of torch.func and forward-mode AD, through the functions and through the op itself."""
        args, kwargs = next(self.small()).arguments(torch.float32, device_of(backend))
        batch = torch.stack([args[0], 2 * args[0]])
        expected = torch.stack([self.plain(x, *args[1:], **kwargs) for x in batch])
        op, flat, op_kwargs = captured(self.fn_name, args, kwargs)
        # A composed op may have no kernel of its own on this backend, only its parts have: the unnamed overload knows.
        overload = op.overloads["" if op.composed and backend not in op.kernels else backend]
        with sdan_fast.use_backend(backend):
            mapped = torch.vmap(lambda x: self.ours(x, *args[1:], **kwargs))(batch)
            torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-5)
            mapped = torch.vmap(lambda x: overload(x, *flat[1:], **op_kwargs))(batch)
            torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-5)
            grad = torch.func.grad(lambda x: self.ours(x, *args[1:], **kwargs).sum())(args[0])
            direct = torch.func.grad(lambda x: overload(x, *flat[1:], **op_kwargs).sum())(args[0])
            x = args[0].clone().requires_grad_()
            (plain,) = torch.autograd.grad(self.plain(x, *args[1:], **kwargs).sum(), x)
            torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(direct, plain, rtol=1e-4, atol=1e-4)
            _, tangent = torch.func.jvp(lambda x: self.ours(x, *args[1:], **kwargs), (args[0],), (args[0],))
            _, wanted = torch.func.jvp(lambda x: self.plain(x, *args[1:], **kwargs), (args[0],), (args[0],))
            torch.testing.assert_close(tangent, wanted, rtol=1e-4, atol=1e-4)
            with forward_ad.dual_level(), torch.no_grad():
                dual = forward_ad.make_dual(args[0], args[0])
                for y in (self.ours(dual, *args[1:], **kwargs), overload(dual, *flat[1:], **op_kwargs)):
                    tangent = forward_ad.unpack_dual(y).tangent
                    assert tangent is not None, "the tangent was lost"
                    torch.testing.assert_close(tangent, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_batches_of_gradients(self, backend: str, layout: str) -> None:
        """vmap of images in either memory format; is_grads_batched, as autograd's vectorized jacobians use it."""
        args, kwargs = next(self.small()).arguments(torch.float32, device_of(backend))
        example = laid_out(args[0], layout)
        with sdan_fast.use_backend(backend):
            mapped = torch.vmap(lambda x: self.ours(x, *args[1:], **kwargs))(torch.stack([example] * 2))
        wanted = self.plain(*args, **kwargs)
        torch.testing.assert_close(mapped, torch.stack([wanted] * 2), rtol=1e-4, atol=1e-5)
        vectors = torch.stack(
            [torch.ones_like(wanted), torch.linspace(-1, 1, wanted.numel()).to(wanted).view_as(wanted)]
        )
        found = []
        for run in (self.ours, self.plain):
            leaves = self.with_layout(fresh(args, torch.float32), layout)
            for leaf in tensors(leaves):
                leaf.requires_grad_()
            with sdan_fast.use_backend(backend):
                y = run(*leaves, **kwargs)
            grads = torch.autograd.grad(y, tensors(leaves), vectors, is_grads_batched=True, create_graph=True)
            second = torch.autograd.grad(grads[0].square().sum(), leaves[0], allow_unused=True)
            found.append([*grads, *second])
        for ours, plain in zip(*found, strict=True):
            assert (ours is None) == (plain is None)
            if ours is not None:
                torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())

    # -- compilation --

    @pytest.mark.parametrize("backend", ("reference", *BACKENDS))
    def test_compiles_without_a_break_or_a_recompilation(self, backend: str) -> None:
        """fullgraph with dynamic N, H and W: one graph serves every size, in inference and in training."""
        case, device = next(self.small()), device_of(backend)
        args, kwargs = case.arguments(torch.float32, device)
        graphs: list[torch.fx.GraphModule] = []

        def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *a: self.ours(*a, **kwargs), fullgraph=True, backend=aot_autograd(fw_compiler=count)
        )
        sizes = [(2, 7, 9), (3, 12, 10), (4, 6, 15)]
        for training in (False, True):
            graphs.clear()
            for n, h, w in sizes:
                leaves = fresh(args, torch.float32, requires_grad=training)
                call = [
                    torch.randn(n, a.shape[1], h, w, device=device_of(backend), requires_grad=training)
                    if i < self.images
                    else a
                    for i, a in enumerate(leaves)
                ]
                for image in call[: self.images]:
                    torch._dynamo.mark_dynamic(image, [0, 2, 3])  # raises where a size gets baked in
                with sdan_fast.use_backend(backend), torch.set_grad_enabled(training):
                    y = compiled(*call)
                    expected = self.plain(*call, **kwargs)
                torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
                if training:
                    wanted = torch.autograd.grad(expected.square().sum(), call[0])
                    got = torch.autograd.grad(y.square().sum(), call[0])
                    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
            op, _, _ = captured(self.fn_name, args, kwargs)
            if backend != "reference" and not (training and op.composed):
                targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
                name = op.name if backend in op.kernels or not op.composed else self.differentiated_as
                assert f"sdan_fast.{name}.{backend}" in targets or backend == "triton" and not INTERPRETING
            assert len(graphs) <= (2 if training else 1), f"{len(graphs)} graphs for {len(sizes)} sizes"
