"""Settings per device and `sdan-fast tune`: files, their errors, the choice by a fake timer, and no GPU."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from sdan_fast.cli import app
from sdan_fast.commands import tune
from sdan_fast.kernels import device_settings, heuristics

GOOD = {"format": 1, "settings": {"conv_nhwc": {"11 taps d1, 28 channels by 4": {"P": 4, "warps": 8}}}}


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_device_has_one_file_name():
    assert device_settings.file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.json"


def test_a_file_replaces_choices_of_its_class_of_calls_alone(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(GOOD))
    before = heuristics.conv_nhwc(11, 1, 320, 1, 28, 4, False, 2)
    with device_settings.in_force(device_settings.load(path)):
        after, other = (heuristics.conv_nhwc(11, 1, 320, 1, c, 4, False, 2) for c in (28, 56))
    assert (before.P, before.warps) == (8, 4)
    assert (after.P, after.warps, after.BG * after.BL) == (4, 8, 2 * before.BG * before.BL)
    assert (other.P, other.warps) == (8, 4)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"settings": {}}', "format must be 1, got None"),
        ('{"format": 1}', "settings must be an object of kernels"),
        ('{"format": 1, "settings": {"conv": {}}}', "has no kernel 'conv'"),
        (
            '{"format": 1, "settings": {"star": {"all": 3}}}',
            r"settings.star\['all'\] must be an object, got int",
        ),
        ('{"format": 1, "settings": {"star": {"all": {"WARPS": 4}}}}', "has no choice 'WARPS'"),
        ('{"format": 1, "settings": {"star": {"all": {"warps": 3}}}}', "warps must be one of 2, 4, 8, got 3"),
        ('{"format": 1, "settings": {"star": {"all": {"warps": true}}}}', "must be one of"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(content, complaint, tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(content)
    with pytest.raises(device_settings.SettingsError, match=complaint) as error:
        device_settings.load(path)
    assert str(path) in str(error.value)


def test_where_files_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv(device_settings.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(device_settings.SettingsError, match="not a folder"):
        device_settings.find("A GPU")
    monkeypatch.setenv(device_settings.VARIABLE, str(tmp_path))
    assert device_settings.find("A GPU") is None
    device_settings.write(tmp_path / "a-gpu.json", "A GPU", GOOD["settings"])
    assert device_settings.find("A GPU") == tmp_path / "a-gpu.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(device_settings, "_table", None)
    assert device_settings.table() == GOOD["settings"]


def test_shipped_files_are_valid():
    for path in device_settings.Path(device_settings.__file__).with_name("settings").glob("*.json"):
        device_settings.load(path)


# -- the choice ------------------------------------------------------------------------------------------------------


def chosen(times, margin=0.03, broken=()):
    """What `select` takes of candidates {"n": 0}, {"n": 1}, ... with these times, and the order of its measurements."""
    order = []

    def prepare(candidate):
        return None if candidate["n"] in broken else lambda: candidate["n"]

    def timer(run):
        order.append(run())
        return times[run()]

    tried = [{"n": n} for n in range(len(times))]
    best, ratio = tune.select(tried, prepare, timer, rounds=3, margin=margin)
    return best["n"], ratio, order


def test_the_fastest_wins_in_turn():
    assert chosen([4.0, 3.0, 2.0]) == (2, 0.5, [0, 1, 2] * 3)


def test_a_small_gain_changes_nothing():
    assert chosen([1.0, 0.98])[:2] == (0, 1.0)
    assert chosen([1.0, 0.98], margin=0.01)[:2] == (1, 0.98)


def test_what_does_not_run_is_not_timed():
    assert chosen([4.0, 1.0, 3.0], broken=(1,)) == (2, 0.75, [0, 2] * 3)
    with pytest.raises(RuntimeError, match="default settings"):
        chosen([1.0, 1.0], broken=(0,))


def test_one_slow_measurement_does_not_decide():
    times = iter([1.0, 0.5, 1.0, 9.0, 1.0, 0.5])
    best, _ = tune.select([{"n": 0}, {"n": 1}], lambda c: lambda: c, lambda run: next(times), rounds=3)
    assert best == {"n": 1}


def test_candidates_are_the_choices_that_a_kernel_asked_for():
    tried = tune.candidates({"A": (1, 2), "B": (3, 4), "C": (5,)}, {"A": 2, "B": 3})
    assert tried[0] == {"A": 2, "B": 3} and len(tried) == 4 and all(set(c) == {"A", "B"} for c in tried)


def test_tuning_end_to_end_with_a_fake_timer():
    """A call that asks for two kernels; the second is tuned with the first's winner; wrong results lose."""
    at_work = {}

    def call():
        at_work["star"] = device_settings.tuned("star", "all", BLOCK=1024, warps=4)
        at_work["norm"] = device_settings.tuned("layer_norm2d", "28 channels", elements=4096)
        wrong = at_work["star"]["BLOCK"] == 2048 or at_work["norm"]["elements"] == 1024
        return [torch.ones(3) * (2 if wrong else 1)]

    def timer(run):
        run()
        return at_work["star"]["warps"] + at_work["norm"]["elements"] / 1000 - at_work["star"]["BLOCK"] / 1e4

    reports = []
    found = tune.tune([("both", call)], device_settings, timer, lambda *a: reports.append(a), rounds=3)
    assert found == {
        "star": {"all": {"BLOCK": 1024, "warps": 2}},
        "layer_norm2d": {"28 channels": {"elements": 2048}},
    }
    assert [(kernel, name) for kernel, name, *_ in reports] == [
        ("star", "all"),
        ("layer_norm2d", "28 channels"),
    ]
    assert reports[1][3] < 1
    device_settings.validated({"format": 1, "settings": found}, "what was found")


def test_every_kernel_that_heuristics_ask_for_has_choices():
    with ExitStack() as stack:
        asked = stack.enter_context(device_settings.recorded())
        heuristics.elementwise_block()
        for itemsize in (2, 4):
            for kh, kw in ((1, 11), (11, 1), (7, 7)):
                heuristics.conv_nchw(kh, kw, 1, 320, 180, itemsize, True, 6)
                heuristics.wgrad_nchw(kh, kw, 320, itemsize, True)
            heuristics.pointwise(56, 56, itemsize)
            heuristics.pointwise_wgrad(56, 56, itemsize)
            heuristics.norm_pointwise(56, 56, 28, itemsize)
            heuristics.norm_pointwise(56, 56, 28, itemsize, backward=True)
        heuristics.pointwise_wgrad_planes(56, 56)
        heuristics.conv_nhwc(11, 1, 320, 1, 28, 4, False, 2)
        heuristics.wgrad_nhwc(11, 1, 320, 1, 28, 4, False)
        heuristics.pixels(28)
        heuristics.pixels(28, backward=True)
    assert {kernel for kernel, _ in asked} == set(device_settings.CHOICES)
    for (kernel, _), defaults in asked.items():
        for choice, value in defaults.items():
            assert value in device_settings.CHOICES[kernel][choice], (kernel, choice, value)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would tune")
def test_without_a_gpu_it_says_so(tmp_path):
    result = CliRunner().invoke(app, ["tune", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "needs a GPU" in result.output and "nothing was written" in result.output
    assert not list(tmp_path.iterdir())


def test_an_unknown_op_is_refused():
    result = CliRunner().invoke(app, ["tune", "--op", "stars"])
    assert result.exit_code == 2 and "stars" in result.output
