"""Checkpoints: safetensors that rebuild their model, the converter from the first author's layout, hostile files."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdan_fast.models import SDAN, CheckpointError, convert
from sdan_fast.models.convert import convert_state_dict, from_basicsr
from sdan_fast.models.files import replacing

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small(groups: int = 2) -> SDAN:
    return SDAN(2, 12, 2, groups)


@pytest.mark.parametrize(
    "config", [(4, 56, 8, 2), (2, 48, 3, 2), (3, 12, 1, 1), (1, 12, 2, 3), (4, 8, 12, 4), (2, 6, 1, 3)]
)
def test_a_checkpoint_alone_rebuilds_its_model(tmp_path: Path, config: tuple[int, int, int, int]) -> None:
    model = SDAN(*config)
    path = tmp_path / "model.safetensors"
    model.save_checkpoint(path)
    again = SDAN.from_checkpoint(path)
    assert (again.scale, again.channels, len(again.blocks), again.groups) == config
    assert list(again.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())
    if config[0] < 4:
        x = torch.rand(1, 3, 6, 5)
        assert torch.equal(again(x), model(x))


def test_metadata_is_not_needed(tmp_path: Path) -> None:
    model = small(4)
    path = tmp_path / "bare.safetensors"
    safetensors_torch.save_file(model.state_dict(), path)
    assert SDAN.from_checkpoint(path).groups == 4


def test_lying_metadata_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "liar.safetensors"
    safetensors_torch.save_file(
        small(3).state_dict(), path, metadata={"scale": "4", "groups": "1", "blocks": "99"}
    )
    again = SDAN.from_checkpoint(path)
    assert (again.scale, len(again.blocks), again.groups) == (2, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    small().to(dtype).save_checkpoint(path)
    assert {p.dtype for p in SDAN.from_checkpoint(path).parameters()} == {dtype}
    assert {p.dtype for p in SDAN.from_checkpoint(path, dtype=torch.float32).parameters()} == {torch.float32}


def test_a_channels_last_model_is_saved_whole(tmp_path: Path) -> None:
    model = small().to(memory_format=torch.channels_last)
    model.save_checkpoint(tmp_path / "m.safetensors")
    again = SDAN.from_checkpoint(tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_saving_replaces_or_leaves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    small().save_checkpoint(path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk is full"), replacing(path) as temporary:
        temporary.write_bytes(b"half of a")
        raise OSError("disk is full")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]
    small().save_checkpoint(path)
    assert path.read_bytes() != before  # other random weights
    assert os.listdir(tmp_path) == ["m.safetensors"]


# --- wrong and hostile files -------------------------------------------------------------------------------------


def refuse(path: Path, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        SDAN.from_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def saved(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "case.safetensors"
    safetensors_torch.save_file(state, path)
    return path


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.safetensors"):
        SDAN.from_checkpoint(tmp_path / "nowhere.safetensors")


def test_a_folder(tmp_path: Path) -> None:
    refuse(tmp_path, "is not a file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 64,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 9) + b'{"a": [[]' + b"\0" * 32,
    ],
)
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refuse(path, "is not a readable safetensors file")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    small().save_checkpoint(path)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 8):
        path.write_bytes(whole[:length])
        refuse(path, "is not a readable safetensors file")


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(marker),))

    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps({"params": Bomb()}))
    refuse(path, r"is not a readable safetensors file .*; a BasicSR-style \.pth is read by")
    torch.save({"params": Bomb()}, path)
    with pytest.raises(CheckpointError, match="cannot be read as a plain PyTorch checkpoint"):
        from_basicsr(path)
    assert not marker.exists()


def test_foreign_state_dicts(tmp_path: Path) -> None:
    refuse(
        saved(tmp_path, {"conv.weight": torch.zeros(3)}),
        "is not an SDAN checkpoint: it has no tensor 'head.pw.weight'",
    )
    refuse(saved(tmp_path, {}), "is not an SDAN checkpoint")
    refuse(saved(tmp_path, torch.nn.Linear(2, 2).state_dict()), "is not an SDAN checkpoint")


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """A whole state dict with these entries replaced, or dropped where None; a key's dots are written as __."""
    state = {key: value.clone() for key, value in small().state_dict().items()}
    for name, value in tensors.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head__dw__bias": None}, "missing 'head.dw.bias'$"),
        ({"extra__weight": torch.zeros(1)}, "unknown 'extra.weight'$"),
        ({"blocks__1__proj__bias": None, "a": torch.zeros(1)}, "missing 'blocks.1.proj.bias'; unknown 'a'"),
        ({"blocks__7__proj__bias": torch.zeros(12)}, r"its blocks are not numbered 0, 1, 2"),
        ({"blocks__99999999999__proj__bias": torch.zeros(12)}, "unknown 'blocks.99999999999.proj.bias'"),
        (
            {"up__weight": torch.zeros(13, 12, 3, 3)},
            r"'up.weight' must have 3\*scale\^2 outputs, and it has 13",
        ),
        (
            {"up__weight": torch.zeros(6, 12, 3, 3)},
            r"'up.weight' must have 3\*scale\^2 outputs, and it has 6",
        ),
        (
            {"up__weight": torch.zeros(27, 12, 3, 3)},
            r"'up.bias' must have the shape \(27,\), and it has \(12,\)",
        ),
        ({"up__weight": torch.zeros(3 * 10**12, 0, 3, 3)}, "'up.weight' must have the shape"),
        ({"up__weight": torch.zeros(0, 12, 3, 3)}, "outputs, and it has 0"),
        ({"up__weight": torch.zeros(12)}, "it has no 4-D tensor 'up.weight'"),
        ({"head__pw__weight": torch.zeros(14, 12, 1, 1)}, "must have the shape"),
        ({"head__pw__weight": torch.zeros(13, 12, 1, 1)}, "channels must be even, and it is 13"),
        ({"head__pw__weight": torch.zeros(10**9, 0, 1, 1)}, "'head.pw.weight' must have the shape"),
        (
            {"blocks__0__attn__branches__0__0__weight": torch.zeros(6, 1, 5, 5)},
            r"must have the shape \(6, 1, 7, 7\)",
        ),
        (
            {"blocks__1__proj__bias": torch.full((12,), torch.nan)},
            "'blocks.1.proj.bias' holds NaN or infinite",
        ),
        (
            {"blocks__1__proj__bias": torch.full((12,), torch.inf)},
            "'blocks.1.proj.bias' holds NaN or infinite",
        ),
        (
            {"blocks__1__proj__bias": torch.zeros(12, dtype=torch.int32)},
            "one floating dtype.* float32, int32",
        ),
        ({"blocks__1__proj__bias": torch.zeros(12).double()}, "one floating dtype.* float32, float64"),
    ],
)
def test_damaged_state_dicts(tmp_path: Path, change: dict[str, Tensor | None], sentence: str) -> None:
    refuse(saved(tmp_path, changed(**change)), sentence)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    refuse(
        saved(tmp_path, {k: v.to(torch.int8) for k, v in small().state_dict().items()}), "one floating dtype"
    )


def test_overlapping_offsets_are_refused(tmp_path: Path) -> None:
    """A header may not let two tensors share bytes, or point outside of the file."""
    path = tmp_path / "x.safetensors"
    header = {
        "head.pw.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "up.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    refuse(path, "is not a readable safetensors file")


# --- the first author's layout -----------------------------------------------------------------------------------

STAR = {"norm": "pixel_norm", "pw1": "pw1", "dw": "dw1.0", "pw2": "pw2"}


def first_authors(model: SDAN) -> dict[str, Tensor]:
    """The state dict under the names of the first author's development code, written out independently."""
    names: dict[str, str] = {
        "head.pw.weight": "fea_conv.pw.weight",
        "head.dw.weight": "fea_conv.dw.weight",
        "head.dw.bias": "fea_conv.dw.bias",
        "fuse.weight": "c1.weight",
        "fuse.bias": "c1.bias",
        "tail.pw.weight": "c2.pw.weight",
        "tail.dw.weight": "c2.dw.weight",
        "tail.dw.bias": "c2.dw.bias",
        "up.weight": "upsampler.0.weight",
        "up.bias": "upsampler.0.bias",
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", f"B{i + 1}"
        for leaf in ("weight", "bias"):
            for j in range(3):
                names[f"{ours}.sdm.distill.{j}.{leaf}"] = f"{theirs}.c{j + 1}_d.{leaf}"
            for j, star in enumerate(("c1_r", "c2_r", "c3_r", "c4")):
                for a, b in STAR.items():
                    names[f"{ours}.sdm.star.{j}.{a}.{leaf}"] = f"{theirs}.{star}.{b}.{leaf}"
            names[f"{ours}.sdm.fuse.{leaf}"] = f"{theirs}.c5.{leaf}"
            names[f"{ours}.attn.proj.{leaf}"] = f"{theirs}.atten.pointwise.{leaf}"
            for j in range(2):
                names[f"{ours}.attn.branches.0.{j}.{leaf}"] = f"{theirs}.atten.LSK1.{j}.{leaf}"
            for j in range(4):
                names[f"{ours}.attn.branches.1.{j}.{leaf}"] = f"{theirs}.atten.LSK2.{j}.{leaf}"
            names[f"{ours}.proj.{leaf}"] = f"{theirs}.c6.{leaf}"
            names[f"{ours}.norm.{leaf}"] = f"{theirs}.pixel_norm.{leaf}"
    return {names[key]: value for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "wrap"),
    [
        *(((3, 8, 1), wrap) for wrap in ("flat", "params", "params_ema", "both", "module")),
        ((4, 56, 8), "params"),
        ((2, 12, 12), "params"),
    ],
)
def test_converter_round_trip(tmp_path: Path, config: tuple[int, int, int], wrap: str) -> None:
    model = SDAN(*config, 2)
    theirs = first_authors(model)
    other = {key: torch.zeros_like(value) for key, value in theirs.items()}
    contents = {
        "flat": theirs,
        "params": {"params": theirs},
        "params_ema": {"params_ema": theirs},
        "both": {"params": other, "params_ema": theirs},
        "module": {"params": {f"module.{key}": value for key, value in theirs.items()}},
    }[wrap]
    path = tmp_path / "net_g.pth"
    torch.save(contents, path)
    again = from_basicsr(path)
    assert (again.scale, again.channels, len(again.blocks), again.groups) == (*config, 2)
    assert list(again.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("wrap", ["flat", "params", "params_ema", "both", "module", "flat module"])
def test_our_own_layout_loads_too(tmp_path: Path, groups: int, wrap: str) -> None:
    """What someone who trains this package's SDAN saves, under BasicSR or without it."""
    model = small(groups)
    state = model.state_dict()
    prefixed = {f"module.{key}": value for key, value in state.items()}
    contents = {
        "flat": state,
        "params": {"params": state},
        "params_ema": {"params_ema": state},
        "both": {"params": small(groups).state_dict(), "params_ema": state},
        "module": {"params": prefixed},
        "flat module": prefixed,
    }[wrap]
    torch.save(contents, tmp_path / "net_g.pth")
    again = from_basicsr(tmp_path / "net_g.pth")
    assert (again.scale, again.channels, len(again.blocks), again.groups) == (2, 12, 2, groups)
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())
    target = tmp_path / "out.safetensors"
    assert convert.main([str(tmp_path / "net_g.pth"), str(target)]) == 0
    assert SDAN.from_checkpoint(target).groups == groups


def test_what_is_wrong_in_our_own_layout_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for wrong, sentence in (
        ({"epoch": 3}, r"x\.pth has keys that this package's SDAN layout does not: 'epoch'$"),
        ({"head.pw.weight": "text"}, r"this package's SDAN layout does not: 'head\.pw\.weight'$"),
        ({"B1.c5.weight": torch.zeros(1)}, r"this package's SDAN layout does not: 'B1\.c5\.weight'$"),
        ({"up.scale.weight": torch.zeros(1)}, r"x\.pth does not hold an SDAN.*unknown 'up\.scale\.weight'$"),
        ({"up.bias": torch.zeros(5)}, r"x\.pth: 'up\.bias' must have the shape \(12,\), and it has \(5,\)$"),
    ):
        torch.save({**small().state_dict(), **wrong}, path)
        with pytest.raises(CheckpointError, match=sentence):
            from_basicsr(path)
    state = small().state_dict()
    del state["blocks.1.proj.bias"]
    torch.save({"params": state}, path)
    with pytest.raises(CheckpointError, match=r"x\.pth does not hold.*missing 'blocks\.1\.proj\.bias'$"):
        from_basicsr(path)


def test_converter_names_what_it_does_not_know() -> None:
    theirs = first_authors(small())
    for key in (
        "B0.c5.weight",
        "B1.c7.weight",
        "B1.c1_r.dw1.1.weight",
        "B1.atten.LSK3.0.weight",
        "c1.running_mean",
        "B1.c4_r.pw1.weight",
    ):
        with pytest.raises(CheckpointError, match="layout does not: '" + key.replace(".", r"\.") + "'"):
            convert_state_dict({**theirs, key: torch.zeros(1)})
    with pytest.raises(CheckpointError, match="layout does not: 'epoch'"):
        convert_state_dict({**theirs, "epoch": 3})


def test_converter_names_what_is_missing(tmp_path: Path) -> None:
    theirs = first_authors(small())
    del theirs["B2.c6.bias"]
    torch.save({"params": theirs}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth \(renamed\).*missing 'blocks\.1\.proj\.bias'$"):
        from_basicsr(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"PK\x03\x04 but no archive", pickle.dumps([1, 2], protocol=2)]
)
def test_converter_refuses_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pth (cannot be read|must hold a dict)"):
        from_basicsr(path)
    with pytest.raises(FileNotFoundError):
        from_basicsr(tmp_path / "none.pth")


def test_converter_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    torch.save({"params_ema": first_authors(model)}, tmp_path / "in.pth")
    target = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "sdan_fast.models.convert", str(tmp_path / "in.pth"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "scale=2, channels=12, blocks=2, groups=2" in done.stdout
    again = SDAN.from_checkpoint(target)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))

    assert convert.main([str(tmp_path / "none.pth"), str(target)]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert convert.main(["one"]) == 2
    assert "usage" in capsys.readouterr().err
