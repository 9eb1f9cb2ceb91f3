"""The whole network against everything a user could run it with: time, accuracy in bfloat16, peak memory."""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sdan_fast import backends, use_backend
from sdan_fast.commands import pictures
from sdan_fast.commands.check import Agreement, agreement, distance, worst
from sdan_fast.models import SDAN
from sdan_fast.models.fitted import seeded_sdan

from . import memory
from .cases import DTYPES, LAYOUTS
from .engines import Absent, Engine, prepare_onnx_runtime, prepare_openvino, to_onnx
from .measuring import PEER_SLACK, Clock, percentiles, race
from .peers import Contender, backends_of, compiled
from .plain import PlainSDAN
from .roofline import LEAST_ROUNDS, Roofline, multiply_adds, tensor_bytes

OnStep = Callable[[str], object]

LARGE = 512 * 512  # pixels beyond which float64 is computed in windows
_WINDOW = 64  # side of what is compared there, in input pixels


@dataclass(frozen=True)
class Configuration:
    """One network and one input."""

    name: str
    height: int = 180
    width: int = 320
    batch: int = 1
    channels: int = 56
    groups: int = 2
    blocks: int = 8
    scale: int = 4

    @property
    def model_settings(self) -> dict[str, int]:
        """Keyword arguments of `seeded_sdan`."""
        return {
            "scale": self.scale,
            "channels": self.channels,
            "blocks": self.blocks,
            "groups": self.groups,
        }

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 3, self.height, self.width

    @property
    def large(self) -> bool:
        return self.batch * self.height * self.width > LARGE


CONFIGURATIONS: dict[str, Configuration] = {
    c.name: c
    for c in (
        Configuration("180x320"),
        Configuration("64x64", 64, 64),
        Configuration("256x256", 256, 256),
        Configuration("batch-8", 64, 64, batch=8),
        Configuration("channels-48", channels=48),
        Configuration("groups-4", groups=4),
        Configuration("1080x1920", 1080, 1920),
    )
}


@dataclass
class Run:
    """One contender in one dtype."""

    contender: str
    layout: str
    dtype: str
    ours: bool
    share: float | None = None
    refused: str = ""
    wrong: bool = False
    seconds: Sequence[float] = ()
    psnr: float | None = None  # of bfloat16 against float32, peak 1
    peak_bytes: int | None = None
    call: Contender | None = field(default=None, repr=False)

    @property
    def title(self) -> str:
        return f"{self.contender}, {self.layout}" if self.layout else self.contender

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Report:
    """What was found about one configuration."""

    configuration: Configuration
    multiply_adds: int
    floors: dict[str, float]  # seconds by dtype
    limits: dict[str, Roofline]
    runs: list[Run]
    windows: bool  # whether float64 was computed in windows only

    def best_peer(self, dtype: str) -> Run | None:
        peers = [run for run in self.runs if run.dtype == dtype and not run.ours and run.seconds]
        return min(peers, key=lambda run: run.median, default=None)

    def record(self) -> dict[str, Any]:
        """Plain data."""
        runs = []
        for run in self.runs:
            best, floor = self.best_peer(run.dtype), self.floors[run.dtype]
            entry: dict[str, Any] = {
                "contender": run.contender,
                "layout": run.layout,
                "dtype": run.dtype,
                "ours": run.ours,
            }
            for key, value in (("share_of_error_bound", run.share), ("psnr_to_float32_db", run.psnr)):
                if value is not None:
                    entry[key] = value
            if run.peak_bytes is not None:
                entry["peak_bytes_of_a_forward"] = run.peak_bytes
            if run.refused:
                entry["refused"] = run.refused
            if run.wrong:
                entry["wrong"] = True
            if run.seconds:
                entry["seconds"] = percentiles(run.seconds) | {
                    "median": run.median,
                    "rounds": len(run.seconds),
                }
                entry["times_the_floor"] = run.median / floor
                if best is not None:
                    entry["best_peer_over_this"] = best.median / run.median
            runs.append(entry)
        c = self.configuration
        return {
            "configuration": c.name,
            "input": list(c.shape),
            "model": c.model_settings,
            "multiply_adds": self.multiply_adds,
            "floor_seconds": self.floors,
            "float64_in_windows_only": self.windows,
            "limits": {
                dtype: {
                    "clone_bytes_per_second": r.clone_bandwidth,
                    "gemm_operations_per_second": r.gemm_rate,
                    "fma_operations_per_second": r.fma_rate,
                }
                for dtype, r in self.limits.items()
            },
            "runs": runs,
        }


def picture(c: Configuration, first: int = 0) -> Tensor:
    """(N, 3, H, W) float32: photographs that scikit-image ships, the middle of each; seeded noise without it."""
    try:
        names = [pictures.PHOTOGRAPHS[(first + i) % len(pictures.PHOTOGRAPHS)] for i in range(c.batch)]
        return torch.cat([pictures.cover(pictures.photograph(name), c.height, c.width) for name in names])
    except ModuleNotFoundError:
        return torch.rand(c.shape, generator=torch.Generator().manual_seed(first))


def cost(model: SDAN, x: Tensor) -> int:
    """Multiply-adds of one forward, counted on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        plain = PlainSDAN(copy.deepcopy(model))
        fake = mode.from_tensor(x)
        return multiply_adds(lambda: plain(fake))


# --- contenders --------------------------------------------------------------------------------------------------


class Network:
    """One configuration's model in one dtype, in every layout, and who runs it."""

    def __init__(self, model: SDAN, x: Tensor, dtype: str, device: str) -> None:
        self.dtype, self.device = dtype, device
        kind = DTYPES[dtype]
        self.models = {
            name: copy.deepcopy(model).to(device, kind).to(memory_format=layout)  # type: ignore[call-overload]
            for name, layout in LAYOUTS.items()
        }
        self.inputs = {
            name: x.to(device, kind).contiguous(memory_format=layout) for name, layout in LAYOUTS.items()
        }

    def contender(self, name: str, layout: str, *, ours: bool) -> Contender:
        """`name` is a backend, or "eager", "Inductor" or "Inductor, freezing"."""
        model, x = self.models[layout], self.inputs[layout]
        if ours:
            return Contender(name, layout, True, lambda: (model(x),), functools.partial(use_backend, name))
        plain: Callable[..., Tensor] = PlainSDAN(model).eval()
        if name == "Inductor":
            plain = compiled(plain)
        elif name == "Inductor, freezing":
            plain = compiled(plain, options={"freezing": True})
        return Contender(name, layout, False, lambda: (plain(x),))


def _engine(prepare: Callable[[bytes, str], Engine], onnx: bytes, dtype: str, x: Tensor) -> Callable[[], Any]:
    run, source = prepare(onnx, dtype), x.numpy()
    return lambda: (torch.from_numpy(run(source)),)


def contenders(
    c: Configuration, model: SDAN, x: Tensor, dtype: str, device: str,
    *, peers: Sequence[str], everywhere: bool, on_step: OnStep,
) -> Iterator[Run]:  # fmt: skip
    """Everyone who runs this network in this dtype; who cannot comes with the reason."""
    network = Network(model, x, dtype, device)
    missing = {line.name: line.reason for line in backends.status()}
    for backend in backends_of(device):
        for layout in LAYOUTS:
            run = Run(backend, layout, dtype, True, refused=missing[backend])
            if not run.refused:
                run.call = network.contender(backend, layout, ours=True)
            yield run
    for name in ("eager", "Inductor", "Inductor, freezing"):
        if name not in peers:
            continue
        if name != "eager" and dtype != "float32" and not everywhere:
            why = f"takes a minute to compile; competes in {dtype} only with --all, or if --peer names it"
            yield Run(name, "NCHW", dtype, False, refused=why)
            continue
        for layout in LAYOUTS if name == "eager" else ("NCHW",):
            yield Run(name, layout, dtype, False, call=network.contender(name, layout, ours=False))
    if device != "cpu":
        return
    engines = {"ONNX Runtime": prepare_onnx_runtime, "OpenVINO": prepare_openvino}
    onnx: bytes | None = None
    for name, prepare in engines.items():
        if name not in peers:
            continue
        run = Run(name, "", dtype, False)
        try:
            if onnx is None and not (name == "ONNX Runtime" and dtype != "float32"):
                on_step("exporting to ONNX")
                onnx = _exported(c, model, x)
            on_step(f"preparing {name}")
            run.call = Contender(name, "", False, _engine(prepare, onnx or b"", dtype, x))
        except Absent as error:
            run.refused = str(error)
        yield run


_ONNX: dict[str, bytes] = {}


def _exported(c: Configuration, model: SDAN, x: Tensor) -> bytes:
    """Once for all dtypes of a configuration."""
    if c.name not in _ONNX:
        _ONNX.clear()
        _ONNX[c.name] = to_onnx(PlainSDAN(model).eval(), x)
    return _ONNX[c.name]


PEERS = ("eager", "Inductor", "Inductor, freezing", "ONNX Runtime", "OpenVINO")


# --- verification ------------------------------------------------------------------------------------------------


class Truth:
    """The float64 result, whole; or, for a large picture, windows of it in two opposite corners.

    A window is computed from all that it can see, so it is exact. The rest of a large result is held against eager
    PyTorch's in the same dtype, with eager's own error added to the bound.
    """

    def __init__(self, model: SDAN, x: Tensor, *, windows: bool) -> None:
        exact = PlainSDAN(copy.deepcopy(model).double()).eval()
        self.scale = model.scale
        self.regions: list[tuple[slice, slice, Tensor]] = []
        height, width = x.shape[2:]
        if not windows:
            whole = slice(None)
            self.regions.append((whole, whole, exact(x.double())))
            return
        reach = model.receptive_radius
        for top, left in ((0, 0), (height - _WINDOW, width - _WINDOW)):
            above, below = max(0, top - reach), min(height, top + _WINDOW + reach)
            before, after = max(0, left - reach), min(width, left + _WINDOW + reach)
            y = exact(x[:, :, above:below, before:after].double())
            inside = [
                slice(self.scale * (start - seen), self.scale * (start - seen + _WINDOW))
                for start, seen in ((top, above), (left, before))
            ]
            place = [slice(self.scale * start, self.scale * (start + _WINDOW)) for start in (top, left)]
            self.regions.append((place[0], place[1], y[:, :, inside[0], inside[1]].clone()))

    def judge(self, result: Tensor, eager: Tensor) -> Agreement:
        found = [
            agreement(result[:, :, rows, columns], eager[:, :, rows, columns], exact)
            for rows, columns, exact in self.regions
        ]
        if len(self.regions) > 1:
            near = max(distance(eager[:, :, rows, columns], exact) for rows, columns, exact in self.regions)
            found.append(Agreement(distance(result, eager), max(a.bound for a in found) + near))
        return worst(found)


def psnr(result: Tensor, reference: Tensor) -> float:
    """Of values in [0, 1], in dB; infinite if they are equal."""
    error = float((result.double() - reference.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


# --- all of it ---------------------------------------------------------------------------------------------------


def measure(
    c: Configuration,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: str = "cpu",
    peers: Sequence[str] = PEERS,
    everywhere: bool = False,
    rounds: int = 30,
    budget: float = 30.0,
    with_memory: bool = True,
    with_psnr: bool = True,
    on_step: OnStep = lambda step: None,
) -> Report:
    """One configuration: everyone verified, then timed in turn, dtype by dtype.

    Args:
        c: network and input.
        dtypes: names of `cases.DTYPES`; bfloat16's PSNR needs float32 among them.
        device: "cpu" or "cuda".
        peers: which of `PEERS` compete; eager PyTorch must, as the yardstick of errors.
        everywhere: whether Inductor competes in 16 bits as well.
        rounds: at most, for each dtype.
        budget: seconds of timing for each dtype.
        with_memory: whether to measure the peak memory of a forward, in processes of their own.
        with_psnr: whether to compare bfloat16 with float32 on every photograph.
        on_step: told what is being done.
    """
    model, x = seeded_sdan(**c.model_settings), picture(c)
    report = Report(c, cost(model, x), {}, {}, [], c.large)
    clock = Clock(device)
    with torch.no_grad():
        on_step("float64")
        truth = Truth(model, x, windows=c.large)
        # Before there is any peer, whose threads may go on for a while after a call.
        for dtype in dtypes:
            on_step(f"this machine's limits in {dtype}")
            roofline = _limits(device, dtype)
            report.limits[dtype] = roofline
            report.floors[dtype] = roofline.floor(
                report.multiply_adds, _compulsory_bytes(model, c, DTYPES[dtype])
            )
        for dtype in dtypes:
            torch._dynamo.reset()
            runs = list(
                contenders(c, model, x, dtype, device, peers=peers, everywhere=everywhere, on_step=on_step)
            )
            _verify(runs, truth, on_step)
            right = [run for run in runs if run.call is not None and not run.refused and not run.wrong]
            on_step(f"timing {dtype}, {len(right)} in turn")
            times = race(
                [run.call for run in right if run.call],
                clock,
                rounds=rounds,
                budget=budget,
                least=1 if c.large else LEAST_ROUNDS,
                on_call=lambda name: on_step(f"timing {name}"),
            )
            for run, seconds in zip(right, times, strict=True):
                run.seconds = seconds
            report.runs += runs
        if with_psnr and {"float32", "bfloat16"} <= set(dtypes) and not c.large:
            _add_psnr(c, model, report, device, on_step)
    for run in report.runs:
        run.call = None
    if with_memory:
        _add_memory(c, report, device, on_step)
    return report


def _limits(device: str, dtype: str) -> Roofline:
    from .roofline import measure as measure_limits

    return measure_limits(device, dtype=DTYPES[dtype])


def _compulsory_bytes(model: SDAN, c: Configuration, dtype: torch.dtype) -> int:
    """Parameters and picture once, the result once."""
    pixels = c.batch * 3 * c.height * c.width
    size = torch.empty((), dtype=dtype).element_size()
    return tensor_bytes(*model.parameters()) // 4 * size + pixels * (1 + c.scale**2) * size


def _verify(runs: Sequence[Run], truth: Truth, on_step: OnStep) -> None:
    """Call everyone once; what is not within its bound is wrong, and what cannot run says why."""
    eager: dict[str, Tensor] = {}  # the yardsticks, by layout
    for run in sorted(runs, key=lambda r: r.contender != "eager"):
        if run.refused or run.call is None:
            continue
        on_step(f"checking {run.title}" + (" (compiling)" if "Inductor" in run.contender else ""))
        try:
            with run.call.context():
                (result,) = run.call.call()
        except Exception as error:
            if run.ours and "cannot run on the backend" not in str(error):
                raise
            run.refused = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        result = result.cpu()
        if run.contender == "eager":
            eager[run.layout] = result
        yardstick = eager.get(run.layout, eager["NCHW"])
        # An engine that takes and gives float32 rounds to its own precision within.
        run.share = truth.judge(result.to(yardstick.dtype), yardstick).share
        run.wrong = not run.share <= (1 if run.ours else PEER_SLACK)


def _add_psnr(c: Configuration, model: SDAN, report: Report, device: str, on_step: OnStep) -> None:
    """The mean over the photographs, of ours and of eager PyTorch's, each in its own layout."""
    low = [
        run
        for run in report.runs
        if run.dtype == "bfloat16" and run.seconds and (run.ours or run.contender == "eager")
    ]
    values: dict[str, list[float]] = {run.title: [] for run in low}
    plain = PlainSDAN(copy.deepcopy(model).to(device)).eval()
    for first, name in enumerate(pictures.PHOTOGRAPHS):
        on_step(f"PSNR of bfloat16, {name}")
        x = picture(c, first)
        exact = plain(x.to(device))
        network = Network(model, x, "bfloat16", device)
        for run in low:
            contender = network.contender(run.contender, run.layout, ours=run.ours)
            with contender.context():
                values[run.title].append(psnr(contender.call()[0], exact))
    for run in low:
        run.psnr = statistics.mean(values[run.title])


def _add_memory(c: Configuration, report: Report, device: str, on_step: OnStep) -> None:
    """Of ours and of eager PyTorch, in NCHW and channels_last."""
    for run in report.runs:
        if run.seconds and (run.ours or run.contender == "eager"):
            on_step(f"peak memory of {run.title}, {run.dtype}")
            run.peak_bytes = memory.peak_elsewhere(
                shape=list(c.shape),
                model=c.model_settings,
                dtype=run.dtype,
                layout=run.layout,
                ours=run.ours,
                backend=run.contender if run.ours else "auto",
                device=device,
            )
