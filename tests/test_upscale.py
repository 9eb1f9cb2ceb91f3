"""`sdan-fast upscale`: tiles against the whole picture, every kind of picture file, and what can go wrong."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")

from PIL import ImageCms, ImageOps  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from sdan_fast.cli import app  # noqa: E402
from sdan_fast.commands import pictures  # noqa: E402
from sdan_fast.commands.upscale import DEFAULT_OVERLAP, enlarge, windows  # noqa: E402
from sdan_fast.models import SDAN  # noqa: E402
from sdan_fast.models.fitted import fit_upsampler, seeded_sdan  # noqa: E402

HALF_STEP = 0.5 / 255


def upscale(*arguments: object) -> object:
    return CliRunner().invoke(app, ["upscale", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def fitted() -> SDAN:
    """x2 with one block, fitted to a photograph: its results look like their input, so their values mean something."""
    model = seeded_sdan(2, 16, 1, 2, seed=3)
    high = pictures.cover(pictures.photograph("coffee"), 128, 160)
    fit_upsampler(model, pictures.resize(high, 64, 80), high)
    return model


@pytest.fixture(scope="module")
def weights(fitted: SDAN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "x2.safetensors"
    fitted.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return pictures.cover(pictures.photograph("astronaut"), 26, 34)


def as_image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int64)


def expected(model: SDAN, image: Image.Image) -> np.ndarray:
    """What the model makes of an RGB image, in 8 bits, computed here."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        return (model(x)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.int64)


# --- tiles -------------------------------------------------------------------------------------------------------


def assemble(model: SDAN, x: Tensor, tile: int, overlap: int) -> Tensor:
    s = model.scale
    whole = torch.full((1, 3, x.shape[2] * s, x.shape[3] * s), torch.nan)
    with torch.no_grad():
        for top, left, piece in enlarge(model, x, tile=tile, overlap=overlap):
            region = whole[:, :, top : top + piece.shape[2], left : left + piece.shape[3]]
            assert torch.isnan(region).all(), "tiles overlap in the result"
            region.copy_(piece)
    assert not torch.isnan(whole).any(), "tiles leave a gap"
    return whole


def difference(model: SDAN, x: Tensor, tile: int, overlap: int) -> float:
    with torch.no_grad():
        whole = model(x)
    return float((assemble(model, x, tile, overlap) - whole).abs().max())


@pytest.mark.parametrize("size", [(8, 240), (240, 8), (60, 70)])
def test_with_the_receptive_field_tiles_equal_the_whole(size: tuple[int, int]) -> None:
    model = seeded_sdan(2, 12, 2, 2)
    fit_upsampler(model, torch.rand(1, 3, 24, 24), torch.rand(1, 3, 48, 48))
    assert model.receptive_radius == 81
    x = pictures.cover(pictures.photograph("astronaut"), *size)
    assert difference(model, x, 31, model.receptive_radius) < 1e-5
    assert difference(model, x, 31, 4) > 1e-3  # so the test can tell


@pytest.mark.parametrize(("size", "seed"), [((12, 300), 0), ((300, 12), 1)])
def test_the_default_overlap_is_within_half_an_8_bit_step(size: tuple[int, int], seed: int) -> None:
    """The whole model with seeded weights, its last layer fitted so that its output spans a picture's range."""
    model = seeded_sdan(4, 56, 8, 2, seed=seed)
    high = pictures.cover(pictures.photograph("coffee"), 192, 256)
    fit_upsampler(model, pictures.resize(high, 48, 64), high)
    x = pictures.cover(pictures.photograph("chelsea"), *size)
    assert model.receptive_radius == 315
    assert difference(model, x, 150, DEFAULT_OVERLAP) < HALF_STEP
    assert difference(model, x, 150, 8) > HALF_STEP  # so the test can tell


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "cut"),
    [
        (10, 0, 3, [(0, 10, 0, 10)]),
        (10, 10, 3, [(0, 10, 0, 10)]),
        (10, 4, 3, [(0, 4, 0, 7), (4, 8, 1, 10), (8, 10, 5, 10)]),
        (9, 4, 0, [(0, 4, 0, 4), (4, 8, 4, 8), (8, 9, 8, 9)]),
        (1, 1, 5, [(0, 1, 0, 1)]),
    ],
)
def test_windows(length: int, tile: int, overlap: int, cut: list[tuple[int, int, int, int]]) -> None:
    assert windows(length, tile, overlap) == cut


def test_the_tile_bounds_what_the_model_sees(fitted: SDAN) -> None:
    seen: list[tuple[int, ...]] = []
    hook = fitted.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try:
        assemble(fitted, torch.rand(1, 3, 70, 50), 16, 5)
    finally:
        hook.remove()
    assert len(seen) == 5 * 4
    assert max(max(shape[2:]) for shape in seen) == 16 + 2 * 5


# --- kinds of pictures -------------------------------------------------------------------------------------------


def test_rgb(tmp_path: Path, weights: Path, fitted: SDAN, photo: Tensor) -> None:
    image = as_image(photo)
    image.save(tmp_path / "in.png")
    result = upscale(tmp_path / "in.png", tmp_path / "out.png", "-w", weights)
    assert result.exit_code == 0, result.output
    assert "68 x 52" in result.output
    out = Image.open(tmp_path / "out.png")
    assert (out.mode, out.size) == ("RGB", (68, 52))
    assert (
        np.abs(array(out) - expected(fitted, image)).max() <= 1
    )  # the backend's rounding may fall on the other side
    assert (
        np.abs(array(out.resize(image.size, Image.Resampling.BOX)) - array(image)).mean() < 12
    )  # it is that picture


def test_tiles_of_the_command_make_the_same_file(tmp_path: Path, weights: Path, photo: Tensor) -> None:
    as_image(photo).save(tmp_path / "in.png")
    for name, *options in (("whole.png", "--tile", 0), ("tiled.png", "--tile", 9, "--overlap", "exact")):
        assert upscale(tmp_path / "in.png", tmp_path / name, "-w", weights, *options).exit_code == 0
    whole, tiled = (array(Image.open(tmp_path / name)) for name in ("whole.png", "tiled.png"))
    assert np.abs(whole - tiled).max() <= 1


def test_alpha_is_kept(tmp_path: Path, weights: Path, fitted: SDAN, photo: Tensor) -> None:
    image = as_image(photo)
    alpha = Image.linear_gradient("L").resize(image.size)
    with_alpha = image.copy()
    with_alpha.putalpha(alpha)
    with_alpha.save(tmp_path / "in.png")
    assert upscale(tmp_path / "in.png", tmp_path / "out.png", "-w", weights).exit_code == 0
    out = Image.open(tmp_path / "out.png")
    assert out.mode == "RGBA"
    assert np.abs(array(out.convert("RGB")) - expected(fitted, image)).max() <= 1
    assert np.array_equal(array(out.getchannel("A")), array(alpha.resize(out.size, Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    ("mode", "out_mode"), [("L", "L"), ("LA", "LA"), ("1", "L"), ("P", "RGB"), ("CMYK", "RGB")]
)
def test_other_modes(tmp_path: Path, weights: Path, photo: Tensor, mode: str, out_mode: str) -> None:
    image = as_image(photo).convert(mode)
    source = tmp_path / ("in.tif" if mode == "CMYK" else "in.png")
    image.save(source)
    assert upscale(source, tmp_path / "out.png", "-w", weights).exit_code == 0
    out = Image.open(tmp_path / "out.png")
    assert (out.mode, out.size) == (out_mode, (68, 52))
    same = out.convert("L").resize(image.size, Image.Resampling.BOX)
    assert np.abs(array(same) - array(image.convert("RGB").convert("L"))).mean() < (60 if mode == "1" else 12)


def test_palette_transparency(tmp_path: Path, weights: Path) -> None:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.paste(0, (0, 0, 4, 6))
    image.save(tmp_path / "in.png", transparency=0)
    assert upscale(tmp_path / "in.png", tmp_path / "out.png", "-w", weights).exit_code == 0
    out = Image.open(tmp_path / "out.png")
    assert out.mode == "RGBA"
    assert out.getpixel((0, 5))[3] == 0
    assert out.getpixel((15, 5))[3] == 255


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grayscale_keeps_its_depth(tmp_path: Path, weights: Path, fitted: SDAN, suffix: str) -> None:
    gray = (
        (pictures.cover(pictures.photograph("chelsea"), 20, 24)[0, 1] * 65535)
        .round()
        .numpy()
        .astype(np.uint16)
    )
    Image.fromarray(gray).save(tmp_path / f"in{suffix}")
    assert upscale(tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", "-w", weights).exit_code == 0
    out = array(Image.open(tmp_path / f"out{suffix}"))
    x = torch.from_numpy(gray.astype(np.float32) / 65535).expand(1, 3, -1, -1)
    with torch.no_grad():
        y = (fitted(x)[0] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).clamp(0, 1).numpy()
    assert out.shape == (40, 48)
    assert len(np.unique(out)) > 500  # more than 8 bits could hold
    assert np.abs(out - np.round(y * 65535)).max() <= 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 5])
def test_exif_rotation_is_applied_and_the_rest_kept(
    tmp_path: Path, weights: Path, fitted: SDAN, photo: Tensor, orientation: int
) -> None:
    image = as_image(photo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    image.save(tmp_path / "in.png", exif=exif)
    assert upscale(tmp_path / "in.png", tmp_path / "out.png", "-w", weights).exit_code == 0
    out = Image.open(tmp_path / "out.png")
    assert out.getexif().get(0x0112, 1) == 1
    assert out.getexif()[0x010F] == "Maker"
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "in.png"))
    assert np.abs(array(out) - expected(fitted, upright)).max() <= 1


def test_a_tiff_does_not_pass_its_strip_table_on(tmp_path: Path, weights: Path, photo: Tensor) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    as_image(photo).save(tmp_path / "in.tif", exif=exif, compression="tiff_lzw")
    for name in ("out.tif", "out.png", "out.jpg"):
        assert upscale(tmp_path / "in.tif", tmp_path / name, "-w", weights).exit_code == 0
        out = Image.open(tmp_path / name)
        out.load()
        assert out.size == (68, 52)
        assert out.getexif()[0x010F] == "Maker"


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp", "out.tif"])
def test_the_colour_profile_is_kept(tmp_path: Path, weights: Path, photo: Tensor, name: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    as_image(photo).save(tmp_path / "in.png", icc_profile=profile)
    assert upscale(tmp_path / "in.png", tmp_path / name, "-w", weights).exit_code == 0
    assert Image.open(tmp_path / name).info["icc_profile"] == profile


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3)])
def test_tiny_pictures(tmp_path: Path, weights: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (200, 30, 90)).save(tmp_path / "in.bmp")
    assert upscale(tmp_path / "in.bmp", tmp_path / "out.png", "-w", weights).exit_code == 0
    assert Image.open(tmp_path / "out.png").size == (2 * size[0], 2 * size[1])


def test_only_the_first_frame_and_it_says_so(tmp_path: Path, weights: Path) -> None:
    frames = [Image.new("RGB", (6, 5), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:])
    result = upscale(tmp_path / "in.gif", tmp_path / "out.png", "-w", weights)
    assert result.exit_code == 0
    assert "has 2 frames, and only the first was enlarged" in result.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(tmp_path: Path, weights: Path, fitted: SDAN, photo: Tensor, dtype: str) -> None:
    as_image(photo).save(tmp_path / "in.png")
    assert upscale(tmp_path / "in.png", tmp_path / "out.png", "-w", weights, "--dtype", dtype).exit_code == 0
    error = np.abs(array(Image.open(tmp_path / "out.png")) - expected(fitted, as_image(photo)))
    assert error.mean() < {"bfloat16": 8, "float16": 1, "float64": 0.01}[dtype]


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_folder(tmp_path: Path, weights: Path, photo: Tensor) -> None:
    source = tmp_path / "in"
    source.mkdir()
    as_image(photo).save(source / "a.jpg")
    as_image(photo).convert("L").save(source / "b.png")
    (source / "notes.txt").write_text("not a picture")
    result = upscale(source, tmp_path / "out" / "deep", "-w", weights)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(tmp_path / "out" / "deep")) == ["a.png", "b.png"]

    before = (tmp_path / "out" / "deep" / "a.png").stat().st_mtime_ns
    (tmp_path / "out" / "deep" / "b.png").unlink()
    result = upscale(source, tmp_path / "out" / "deep", "-w", weights, "--skip-existing", "--quiet")
    assert result.exit_code == 0
    assert result.output == ""
    assert (tmp_path / "out" / "deep" / "a.png").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "deep" / "b.png").exists()


def test_one_bad_picture_of_a_folder_does_not_stop_the_others(
    tmp_path: Path, weights: Path, photo: Tensor
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    as_image(photo).save(source / "b.png")
    result = upscale(source, tmp_path / "out", "-w", weights)
    assert result.exit_code == 1
    assert "a.png" in result.stderr
    assert "1 of 2 pictures failed" in result.stderr
    assert os.listdir(tmp_path / "out") == ["b.png"]


# --- what can go wrong -------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path, photo: Tensor) -> Path:
    as_image(photo).save(tmp_path / "in.png")
    return tmp_path / "in.png"


def refused(result: object, code: int, sentence: str) -> None:
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert sentence in lines[0]


def test_missing_and_wrong_arguments(tmp_path: Path, weights: Path, picture: Path) -> None:
    out = tmp_path / "out.png"
    refused(upscale(tmp_path / "no.png", out, "-w", weights), 2, "there is no file or folder")
    refused(upscale(picture, out, "-w", tmp_path / "no.safetensors"), 2, "there is no file")
    refused(upscale(picture, out, "-w", picture), 2, "is not a readable safetensors file")
    refused(
        upscale(picture, tmp_path / "out.xyz", "-w", weights),
        2,
        "no picture format that Pillow writes has the suffix .xyz",
    )
    refused(upscale(picture, tmp_path / "out", "-w", weights), 2, "has the suffix a name without one")
    refused(upscale(picture, tmp_path / "no" / "out.png", "-w", weights), 2, "there is no folder")
    refused(upscale(picture, picture, "-w", weights), 2, "would overwrite the picture that it is made of")
    refused(upscale(tmp_path, picture, "-w", weights), 2, "must be one too, and it is a file")
    refused(upscale(tmp_path, tmp_path, "-w", weights), 2, "would overwrite")
    (tmp_path / "empty").mkdir()
    refused(
        upscale(tmp_path / "empty", tmp_path / "out", "-w", weights), 2, "there are no pictures in the folder"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--tile", "-1"),
        ("--overlap", "-3"),
        ("--overlap", "all"),
        ("--dtype", "int8"),
        ("--backend", "gpu"),
        ("--device", "toaster"),
    ],
)
def test_wrong_options(tmp_path: Path, weights: Path, picture: Path, options: tuple[str, str]) -> None:
    result = upscale(picture, tmp_path / "out.png", "-w", weights, *options)
    assert result.exit_code == 2
    assert result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out.png").exists()


def test_two_pictures_that_would_become_one(
    tmp_path: Path, weights: Path, picture: Path, photo: Tensor
) -> None:
    as_image(photo).save(tmp_path / "in.jpg")
    refused(
        upscale(tmp_path, tmp_path / "out", "-w", weights), 2, "in.jpg and in.png would both become in.png"
    )


@pytest.mark.parametrize("cut", [0, 8, 40, 200, -10])
def test_damaged_pictures(tmp_path: Path, weights: Path, picture: Path, cut: int) -> None:
    (tmp_path / "bad.png").write_bytes(picture.read_bytes()[:cut])
    result = upscale(tmp_path / "bad.png", tmp_path / "out.png", "-w", weights)
    if (
        cut == -10
    ):  # only the last chunk is missing: Pillow may mind or not, but the result is whole or absent
        assert result.exit_code in (0, 1)
        assert (tmp_path / "out.png").exists() == (result.exit_code == 0)
        return
    refused(result, 1, "bad.png")
    assert sorted(os.listdir(tmp_path)) == ["bad.png", "in.png"]


def test_a_text_file_is_no_picture(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "in.png").write_text("hello")
    refused(
        upscale(tmp_path / "in.png", tmp_path / "out.png", "-w", weights),
        1,
        "is not a picture that Pillow reads",
    )


def test_what_a_format_cannot_hold_is_refused_before_the_work(tmp_path: Path, weights: Path) -> None:
    Image.new("RGBA", (5, 5)).save(tmp_path / "a.png")
    refused(upscale(tmp_path / "a.png", tmp_path / "a.jpg", "-w", weights), 1, "JPEG holds no transparency")
    Image.fromarray(np.zeros((5, 5), dtype=np.uint16)).save(tmp_path / "b.png")
    refused(
        upscale(tmp_path / "b.png", tmp_path / "b.jpg", "-w", weights),
        1,
        "JPEG does not hold 16-bit grayscale",
    )
    Image.fromarray(np.zeros((5, 5), dtype=np.float32)).save(tmp_path / "c.tif")
    refused(upscale(tmp_path / "c.tif", tmp_path / "c.png", "-w", weights), 1, "32-bit floating values")


def test_an_older_result_survives_a_failure(
    tmp_path: Path, weights: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"older")

    def save(self: object, fp: Path, **kwargs: object) -> None:
        Path(fp).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    refused(upscale(picture, out, "-w", weights), 1, "cannot be written: No space left on device")
    assert out.read_bytes() == b"older"
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, weights: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    picture.rename(tmp_path / "in" / "a.png")
    (tmp_path / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: access(path, mode) and (mode != os.W_OK or Path(path).name != "locked"),
    )
    sentence = "locked cannot be written to"
    refused(upscale(tmp_path / "in" / "a.png", tmp_path / "locked" / "b.png", "-w", weights), 2, sentence)
    refused(upscale(tmp_path / "in", tmp_path / "locked", "-w", weights), 2, sentence)
    assert not os.listdir(tmp_path / "locked")


def test_a_very_large_picture_is_a_warning_and_a_bomb_an_error(
    tmp_path: Path, weights: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # the photograph has 26 x 34 = 884
    result = upscale(picture, tmp_path / "out.png", "-w", weights)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"warning: {picture}: Image size (884 pixels) exceeds limit of 600 pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    refused(upscale(picture, tmp_path / "bomb.png", "-w", weights), 1, "cannot be read: Image size")
    assert not (tmp_path / "bomb.png").exists()


def test_links_to_the_picture_are_the_picture(tmp_path: Path, weights: Path, picture: Path) -> None:
    (tmp_path / "soft.png").symlink_to(picture)
    os.link(picture, tmp_path / "hard.png")
    before = picture.read_bytes()
    for name in ("soft.png", "hard.png"):
        refused(upscale(picture, tmp_path / name, "-w", weights), 2, "would overwrite")
        refused(upscale(tmp_path / name, picture, "-w", weights), 2, "would overwrite")
    assert picture.read_bytes() == before


def test_a_name_that_is_too_long_for_the_system(tmp_path: Path, weights: Path, picture: Path) -> None:
    refused(upscale(picture, tmp_path / f"{'n' * 251}.png", "-w", weights), 1, "cannot be written: ")
    assert os.listdir(tmp_path) == ["in.png"]


def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, weights: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: object, fp: Path, **kwargs: object) -> None:
        Path(fp).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save)
    assert upscale(picture, tmp_path / "out.png", "-w", weights).exit_code == 130
    assert os.listdir(tmp_path) == ["in.png"]


def test_16_bits_in_either_byte_order_and_turned(tmp_path: Path, weights: Path) -> None:
    values = (np.arange(30).reshape(6, 5) * 2000).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(values, -1).copy()).save(tmp_path / "upright.png")
    big = Image.frombytes("I;16B", (5, 6), values.astype(">u2").tobytes())
    big.save(tmp_path / "big.tif")
    assert Image.open(tmp_path / "big.tif").mode == "I;16B"
    Image.fromarray(values).save(tmp_path / "little.png")
    for one, other in (("turned.png", "upright.png"), ("big.tif", "little.png")):
        results = []
        for name in (one, other):
            assert upscale(tmp_path / name, tmp_path / f"out_{name}", "-w", weights).exit_code == 0
            results.append(array(Image.open(tmp_path / f"out_{name}")))
        assert np.array_equal(*results)


def test_the_result_has_ordinary_rights(tmp_path: Path, weights: Path, picture: Path) -> None:
    old = os.umask(0o022)
    try:
        assert upscale(picture, tmp_path / "out.png", "-w", weights).exit_code == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out.png").stat().st_mode) == 0o644


def test_a_model_that_overflows_is_no_black_picture(tmp_path: Path, fitted: SDAN, picture: Path) -> None:
    huge = SDAN.from_state_dict({key: value.clone() for key, value in fitted.state_dict().items()})
    with torch.no_grad():
        huge.up.weight.mul_(1e38)
    huge.save_checkpoint(tmp_path / "huge.safetensors")
    result = upscale(picture, tmp_path / "out.png", "-w", tmp_path / "huge.safetensors")
    refused(result, 1, "produced NaN or infinite values")
    assert not (tmp_path / "out.png").exists()


def test_a_backend_that_cannot_run_says_why(tmp_path: Path, weights: Path, picture: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    refused(
        upscale(picture, tmp_path / "out.png", "-w", weights, "--backend", "cuda"),
        2,
        "the backend 'cuda' cannot run here: ",
    )
    refused(upscale(picture, tmp_path / "out.png", "-w", weights, "--device", "cuda"), 2, "")
