"""`sdan-fast train`: patches, the loop, going on after a break, several processes, and what can go wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")

from typer.testing import CliRunner, Result  # noqa: E402

from sdan_fast.cli import app  # noqa: E402
from sdan_fast.commands import pictures  # noqa: E402
from sdan_fast.models import SDAN  # noqa: E402
from sdan_fast.train import (  # noqa: E402
    DivergedError,
    Patches,
    Progress,
    Settings,
    TrainingError,
    downscale,
    psnr_y,
    train,
)

TINY = Settings(
    scale=2, channels=8, blocks=1, groups=2, patch=16, batch=2, steps=6, learning_rate=2e-3, ema=0.5
)
OPTIONS = [
    *("--scale", "2", "--channels", "8", "--blocks", "1", "--patch", "16"),
    *("--batch", "2", "--steps", "6", "--every", "3", "--ema", "0.5"),
]


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    names = ("astronaut", "coffee")
    return [(pictures.cover(pictures.photograph(n), 72, 90) * 255).round().to(torch.uint8) for n in names]


@pytest.fixture(scope="module")
def folder(photos: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    for i, photo in enumerate(photos):
        Image.fromarray(photo[0].permute(1, 2, 0).numpy()).save(path / f"{i}.png")
    (path / "notes.txt").write_text("no picture")
    return path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)], catch_exceptions=False)


def weights_of(path: Path) -> dict[str, Tensor]:
    return SDAN.from_checkpoint(path / "model.safetensors").state_dict()


def test_downscale_cuts_and_rounds(photos: list[Tensor]) -> None:
    low, high = downscale(photos[0][..., :71, :], 4)
    assert low.shape == (1, 3, 17, 22) and high.shape == (1, 3, 68, 88)
    assert low.dtype == high.dtype == torch.uint8
    assert torch.equal(high, photos[0][..., :68, :88])
    for result, channel in zip(low[0], high[0], strict=True):
        image = Image.fromarray(channel.float().numpy(), mode="F").resize((22, 17), Image.Resampling.BICUBIC)
        exact = torch.tensor(list(image.getdata())).reshape(17, 22).clamp(0, 255)
        assert (result - exact).abs().max() < 0.501
    flat = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(downscale(flat, 2)[0], flat[..., :4, :4])


def test_patches_lie_on_each_other(photos: list[Tensor]) -> None:
    """A picture whose pixels say where they are: the pieces must be the same place, turned alike."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(60), indexing="ij")
    place = torch.stack([4 * (y // 2), 4 * (x // 2), torch.zeros_like(x)])[None].to(torch.uint8)
    patches = Patches([place], scale=2, patch=9)
    patches.pairs = [(place[..., ::2, ::2], place)]
    seen = set()
    for number in range(12):
        low, high = patches.batch(number, 3)
        assert low.shape == (3, 3, 9, 9) and high.shape == (3, 3, 18, 18)
        assert torch.equal(high[..., ::2, ::2], low)
        steps = (low[:, :2, 1, 0] - low[:, :2, 0, 0]) * 255 / 4
        seen |= {tuple(step.round().int().tolist()) for step in steps}
    assert seen == {(1, 0), (-1, 0), (0, 1), (0, -1)}


def test_patches_depend_on_seed_and_number_alone(photos: list[Tensor]) -> None:
    a, b, c = (Patches(photos, scale=2, patch=16, seed=seed) for seed in (5, 5, 6))
    a.batch(0, 4)
    assert all(map(torch.equal, a.batch(7, 4), b.batch(7, 4)))
    assert not torch.equal(a.batch(7, 4)[0], c.batch(7, 4)[0])
    assert not torch.equal(a.batch(7, 4)[0], a.batch(8, 4)[0])


def test_psnr_by_hand() -> None:
    original = torch.zeros(1, 3, 12, 12)
    assert psnr_y(original, original, 2) == math.inf
    wrong = original.clone()
    wrong[..., :2, :] = 1.0  # within the border
    assert psnr_y(wrong, original, 2) == math.inf
    gray = torch.full_like(original, 10 / 255)
    assert psnr_y(gray, original, 2) == pytest.approx(20 * math.log10(255 / (10 * 219 / 255)), abs=1e-9)
    assert psnr_y(original - 3.0, original, 2) == math.inf
    assert psnr_y(original + 0.4 / 255, original, 2) == math.inf
    with pytest.raises(ValueError, match="none within a border of 6"):
        psnr_y(original, original, 6)
    with pytest.raises(ValueError, match="one shape"):
        psnr_y(original, original[..., 1:], 2)


def test_it_learns(photos: list[Tensor], tmp_path: Path) -> None:
    seen: list[Progress] = []
    settings = replace(TINY, steps=160, learning_rate=5e-3, ema=0.9)
    model = train(settings, photos, tmp_path, validation=photos, every=80, on_step=seen.append)
    assert [p.step for p in seen] == list(range(1, 161))
    assert [p.step for p in seen if p.saved] == [80, 160]
    first, last = seen[79].psnr, seen[159].psnr
    assert first is not None and last is not None and last > first - 1
    assert sum(p.loss for p in seen[-10:]) < 0.6 * sum(p.loss for p in seen[:10])
    assert all(map(torch.equal, model.state_dict().values(), weights_of(tmp_path).values()))


def test_going_on_is_as_if_there_had_been_no_break(photos: list[Tensor], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 5:  # two steps after what was saved
            raise Stop

    train(TINY, photos, tmp_path / "whole", every=3)
    with pytest.raises(Stop):
        train(TINY, photos, tmp_path / "parts", every=3, on_step=stop)
    seen: list[Progress] = []
    train(TINY, photos, tmp_path / "parts", every=3, resume=True, on_step=seen.append)
    assert [p.step for p in seen] == [4, 5, 6]
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(parts[key], value) for key, value in whole.items())
    again = train(TINY, photos, tmp_path / "parts", resume=True, on_step=seen.append)
    assert len(seen) == 3 and torch.equal(again.up.weight, whole["up.weight"])


def test_averaged_weights_are_not_the_last_ones(photos: list[Tensor], tmp_path: Path) -> None:
    train(TINY, photos, tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert not torch.equal(state["model"]["up.weight"], state["ema"]["module.up.weight"])
    assert torch.equal(state["ema"]["module.up.weight"], weights_of(tmp_path)["up.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, and it is 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"ema": 1.0}, r"ema in \[0, 1\)"),
        ({"channels": 7}, "channels must be even"),
        ({"patch": 40}, "at least 80 rows and columns for patches of 40 x 2, and one has 72 x 90"),
    ],
)
def test_refuses_settings(
    changes: dict[str, float], message: str, photos: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(TINY, **changes), photos, tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_refuses_other_runs(photos: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no run to resume"):
        train(TINY, photos, tmp_path, resume=True)
    with pytest.raises(ValueError, match="at least one picture"):
        train(TINY, [], tmp_path)
    with pytest.raises(
        ValueError, match=r"start must be an SDAN of .* \(2, 8, 1, 2\), and it is of \(2, 10, 1, 2\)"
    ):
        train(TINY, photos, tmp_path, start=SDAN(2, 10, 1))
    train(replace(TINY, steps=1), photos, tmp_path)
    with pytest.raises(TrainingError, match="already holds a run"):
        train(TINY, photos, tmp_path)
    with pytest.raises(TrainingError, match="of a run with steps 1 and not 6"):
        train(TINY, photos, tmp_path, resume=True)
    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="is not the state of a run, or damaged"):
        train(TINY, photos, tmp_path, resume=True)


def test_stops_where_the_loss_is_no_number(photos: list[Tensor], tmp_path: Path) -> None:
    start = SDAN(2, 8, 1)
    with torch.no_grad():
        start.up.bias[0] = math.nan
    with pytest.raises(DivergedError, match="the loss of step 1 is nan"):
        train(TINY, photos, tmp_path, start=start)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("option", ["autocast", pytest.param("compile", marks=pytest.mark.slow)])
def test_options_reach_the_network(option: str, photos: list[Tensor], tmp_path: Path) -> None:
    plain, other = (
        train(replace(TINY, steps=2, **{option: on}), photos, tmp_path / str(on)).up.weight
        for on in (False, True)
    )  # type: ignore[arg-type]
    torch.testing.assert_close(plain, other, rtol=0, atol=5e-3)


def test_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = command(folder, "--out", out, "--validate", folder / "0.png", *OPTIONS)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"2 pictures, 1 to measure by, on cpu: {out}"
    assert [line.split(":")[0] for line in lines[1:]] == ["step 3 of 6", "step 6 of 6"]
    assert all(", PSNR " in line and " patches/s" in line for line in lines[1:])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [3, 6]
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "model.safetensors", "state.pt"]

    result = command(folder, "--out", out, *OPTIONS)
    assert result.exit_code == 2 and "already holds a run" in result.output
    result = command(folder, "--out", out, "--resume", *OPTIONS)
    assert result.exit_code == 0
    enlarged = CliRunner().invoke(
        app,
        [
            "upscale",
            str(folder / "0.png"),
            str(tmp_path / "x2.png"),
            "--weights",
            str(out / "model.safetensors"),
        ],
    )
    assert enlarged.exit_code == 0, enlarged.output
    result = command(folder, "--out", tmp_path / "lost", *OPTIONS, "--learning-rate", "1e30")
    assert result.exit_code == 1 and "try a lower learning rate" in result.output
    result = command(folder, "--out", tmp_path / "tuned", "--weights", out / "model.safetensors", *OPTIONS)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "there is no file missing.png"),
        (["{empty}"], "holds no pictures"),
        (["{folder}", "--weights", "missing.safetensors"], "there is no file missing.safetensors"),
        (["{folder}", "--backend", "fastest"], "fastest"),
        (["{folder}", "--device", "tpu"], "must be auto, cpu or cuda"),
        (["{folder}", "--patch", "64"], "at least 256 rows and columns"),
        (["{folder}/notes.txt"], "is not a picture that Pillow reads"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    filled = [text.format(folder=folder, empty=tmp_path / "empty") for text in arguments]
    result = command(*filled, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    """Their gradients are averaged, so both end with the same weights, which one process without the other does not."""
    arguments = ["-m", "sdan_fast", "train", str(folder), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
        ("one", []),
    ):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, *launcher, *arguments, "--out", str(out)],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 6 of 6") == 1
    two, one = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    assert not torch.equal(two["up.weight"], one["up.weight"])
