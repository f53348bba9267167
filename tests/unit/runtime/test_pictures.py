"""Runs that start from a picture file: read and scaled as Pillow does, encoded in tiles, and what is refused."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageOps

import tmd_runtime
from tests.helpers.results import result_latents
from tests.helpers.synthetic_tim import write_tim_bundle
from tests.helpers.watch import Watch
from tmd_engines.cost.sizing import estimate
from tmd_runtime import Pipeline, RuntimeFailure, UsageFailure
from tmd_runtime.autoencoder.picture import fit, read_picture, start_size
from tmd_runtime.command.cli import command
from tmd_runtime.memory import DENOISER

PROMPT = "a red circle moving right"


def drawn(height: int, width: int) -> np.ndarray:
    """Shades, waves and a patch of noise."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 9 + y / 7)]
    picture = np.stack(planes, axis=-1).astype(np.uint8)
    picture[: height // 4, : width // 4] = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3))
    return picture


PICTURE = drawn(60, 90)


def file(kind: str, picture: Image.Image, **how: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **how)
    return stream.getvalue()


# Reading


@pytest.mark.parametrize(
    ("mode", "kind", "how", "off"),
    [
        ("RGB", "PNG", {}, 0),
        ("RGBA", "PNG", {}, 1),
        ("P", "PNG", {}, 0),
        ("L", "PNG", {}, 0),
        ("1", "PNG", {}, 0),
        ("RGB", "BMP", {}, 0),
        ("RGB", "TIFF", {"compression": "tiff_deflate"}, 0),
        ("RGB", "WEBP", {"lossless": True}, 0),
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0}, 4),
        ("L", "JPEG", {"quality": 95}, 1),
    ],
)
def test_a_file_is_read_as_pillow_reads_it(tmp_path: Path, mode: str, kind: str, how: dict[str, Any], off: int) -> None:
    picture = Image.fromarray(PICTURE).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(PICTURE[..., 0]))
    data = file(kind, picture, **how)
    (tmp_path / "picture").write_bytes(data)  # the name says nothing
    found = read_picture(tmp_path / "picture")
    whole = Image.open(io.BytesIO(data)).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - np.asarray(expected)).max() <= off


def test_common_photos_are_read_up_to_their_coarse_colours(tmp_path: Path) -> None:
    """Colours at half the size: Pillow fades between them, FFmpeg does not."""
    smooth = np.asarray(Image.fromarray(PICTURE[30:]).resize((360, 120), Image.Resampling.BICUBIC))
    for kind, how in (("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})):
        data = file(kind, Image.fromarray(smooth), **how)
        (tmp_path / "photo").write_bytes(data)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(read_picture(tmp_path / "photo") - expected).max() <= 8


def test_a_photo_is_read_alike_every_time(tmp_path: Path) -> None:
    """FFmpeg's threads would write over each other's first pixels, in almost every reading of this size."""
    smooth = np.asarray(Image.fromarray(PICTURE[30:]).resize((360, 240), Image.Resampling.BICUBIC))
    data = file("JPEG", Image.fromarray(smooth), quality=95)
    (tmp_path / "photo").write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    for _ in range(50):
        assert np.abs(read_picture(tmp_path / "photo") - expected).max() <= 8


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])  # 2, 4, 5 and 7 are mirrored, as no camera writes
def test_a_photo_is_turned_as_the_camera_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file("JPEG", Image.fromarray(PICTURE), quality=95, subsampling=0, exif=exif.tobytes())
    (tmp_path / "photo.jpg").write_bytes(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    found = read_picture(tmp_path / "photo.jpg")
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 4


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    whole = file("PNG", Image.fromarray(PICTURE))
    claim = b"IHDR" + struct.pack(">II", 1 << 15, 1 << 15) + whole[24:29]  # a gigapixel in a small file
    huge = whole[:12] + claim + struct.pack(">I", zlib.crc32(claim)) + whole[33:]
    for data, message in (
        (b"", "is no picture that can be read here: save it as PNG, JPEG"),
        (b"#EXTM3U\nhttp://127.0.0.1/x.ts\n", "is no picture that can be read here"),
        (whole[:200], "is damaged, or no png picture"),
        (b"\xff\xd8\xff" + bytes(500), "is damaged, or no mjpeg picture"),
        (b"RIFF" + bytes(500), "is damaged, or no webp picture"),
        (huge, "at most .* megapixels, which is what its .* bytes and the free memory allow"),
    ):
        (tmp_path / "x.png").write_bytes(data)
        with pytest.raises(RuntimeFailure, match=message):
            read_picture(tmp_path / "x.png")
    with pytest.raises(RuntimeFailure, match="is no file: name a picture"):
        read_picture(tmp_path)


# Size


@pytest.mark.parametrize("size", [(64, 64), (32, 80), (300, 200), (90, 60), (24, 16)])
def test_the_middle_is_scaled_as_pillow_scales_it(size: tuple[int, int]) -> None:
    picture = drawn(240, 360)
    found = fit(picture, *size)
    side = min(360 / size[0], 240 / size[1])
    wide, tall = (side * part for part in size)
    box = ((360 - wide) / 2, (240 - tall) / 2, (360 + wide) / 2, (240 + tall) / 2)
    expected = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS, box=box)
    off = np.abs(found.astype(int) - np.asarray(expected))
    assert found.shape == (size[1], size[0], 3) and off.mean() < 1
    assert np.array_equal(fit(picture, 360, 240), picture), "a picture of the size stays as it is"


@pytest.mark.parametrize("sides", [(1, 1), (7, 2000), (4000, 40), (4000, 4000)])
def test_one_colour_stays_that_at_any_scale(sides: tuple[int, int]) -> None:
    found = fit(np.full((*sides, 3), (10, 200, 77), np.uint8), 32, 16)
    assert found.shape == (16, 32, 3) and np.abs(found.astype(int) - (10, 200, 77)).max() <= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tim_bundle(tmp_path_factory.mktemp("pictures") / "b", guidance=3.0, pictures=True)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return tmd_runtime.load(folder, threads=1)


def test_a_picture_keeps_its_shape_at_the_size_of_the_model(pipeline: Pipeline) -> None:
    manifest = pipeline.manifest  # 64x64 in multiples of 16
    for (height, width), size in (
        ((64, 64), (64, 64)),
        ((3000, 4000), (80, 48)),
        ((50, 4000), (576, 16)),
        ((7, 7), (64, 64)),
        ((60, 90), (80, 48)),
    ):
        assert start_size(manifest, None, np.zeros((height, width, 3), np.uint8)) == size
    assert start_size(manifest, (32, 32), PICTURE) == (32, 32)
    assert start_size(manifest, None, None, np.zeros((1, 16, 1, 4, 6))) == (48, 32)
    assert start_size(manifest, None) is None


# Runs


def latents_of(picture: np.ndarray, pipeline: Pipeline) -> np.ndarray:
    """Of the synthetic encoder, which makes each latent of its own 8 x 8 pixels, the part at (top, left) alone."""
    return pipeline.encode_image(picture, (picture.shape[1], picture.shape[0]))


def test_a_run_from_a_picture_is_one_from_its_latents(pipeline: Pipeline) -> None:
    wishes: dict[str, Any] = {"seed": 2, "strength": 0.5, "steps": 2}
    found = pipeline(PROMPT, image=PICTURE, **wishes)
    assert found.times == (0.5, 0.25, 0.0) and found.frames.shape == (1, 48, 80, 3)
    latents = pipeline.encode_image(PICTURE)
    assert latents.shape == (1, 16, 1, 6, 10) and latents.std() > 0.1
    assert np.array_equal(result_latents(found), result_latents(pipeline(PROMPT, init_latents=latents, **wishes)))
    assert not np.array_equal(
        result_latents(found), result_latents(pipeline(PROMPT, init_latents=0 * latents, **wishes))
    )
    assert found.stage_seconds["encode"] > 0 and "encode" not in pipeline(PROMPT, seed=1).stage_seconds
    small = pipeline(PROMPT, image=PICTURE, size=(32, 48), **wishes)
    assert np.array_equal(
        pipeline.encode_image(fit(PICTURE, 32, 48), (32, 48)), pipeline.encode_image(PICTURE, (32, 48))
    )
    assert small.frames.shape == (1, 48, 32, 3)


def test_a_large_picture_is_encoded_in_tiles(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = drawn(96, 176)
    whole = latents_of(picture, pipeline)
    monkeypatch.setattr("tmd_engines.cost.tiling.TILE_PIXELS", 64)
    monkeypatch.setattr("tmd_engines.cost.tiling.OVERLAP_PIXELS", 16)
    # An encoder that sees nothing beyond its 8 x 8 pixels: tiles must put each where it belongs, fading or not.
    np.testing.assert_allclose(latents_of(picture, pipeline), whole, rtol=0, atol=1e-5)


def test_with_low_memory_the_encoder_is_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    pipeline = tmd_runtime.load(folder, threads=1, memory="low")
    pipeline(PROMPT, image=PICTURE, strength=0.5, steps=2, seed=1)
    stages = [{"encoder"}, {"text_encoder"}, {"backbone"}, {"backbone", "flow_head"}, {*DENOISER}, {"decoder_first"}]
    assert watch.together == stages and not watch.loaded
    plain, more = (estimate(pipeline.bundle, width=64, height=64, frames=1, from_picture=yes) for yes in (False, True))
    assert set(more.stages) - set(plain.stages) == {"encoder"} and more.peak("all") > plain.peak("all")
    assert more.stages["encoder"].flops == 2 * 3 * 64 * 64 * 16


def test_one_picture_of_bytes_and_a_strength(pipeline: Pipeline, folder: Path, tmp_path: Path) -> None:
    latents = pipeline.encode_image(PICTURE)
    for given, message in (
        ({"image": PICTURE}, "choose a strength"),
        ({"image": PICTURE, "init_latents": latents, "strength": 0.5}, "give the image or its latents, not both"),
        ({"image": PICTURE / 255, "strength": 0.5}, r"must be uint8 \[height, width, 3\], not float64 \[60, 90, 3\]"),
        ({"image": PICTURE[..., 0], "strength": 0.5}, r"not uint8 \[60, 90\]"),
        ({"image": PICTURE, "strength": 0.5, "size": (50, 64)}, "a width of 50 pixels cannot be made"),
    ):
        with pytest.raises(UsageFailure, match=message):
            pipeline(PROMPT, **given)
    with pytest.raises(UsageFailure, match="a picture of 50x64 cannot be encoded: choose multiples of 8"):
        pipeline.encode_image(PICTURE, (50, 64))
    without = tmd_runtime.load(write_tim_bundle(tmp_path / "b"), threads=1)
    with pytest.raises(RuntimeFailure, match=r"no graph encoder, so it cannot start from a picture.*--init-latents"):
        without(PROMPT, image=PICTURE, strength=0.5)


# On the command line


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("in.png")
    return lambda *words: CliRunner().invoke(
        command, ["--prompt", "x", "--seed", "1", *words] if "--bundle" in words
        else ["--bundle", str(folder), "--prompt", "x", "--seed", "1", *words], catch_exceptions=False
    )  # fmt: skip


def test_the_command_line_starts_from_a_file(run: Callable[..., Result], pipeline: Pipeline) -> None:
    done = run("--image", "in.png", "--strength", "0.3", "--steps", "2", "--out", "out.png", "--json")
    document = json.loads(done.stdout)
    assert (document["width"], document["height"], document["times"]) == (80, 48, [0.3, 0.15, 0.0])
    assert document["stage_seconds"]["encode"] > 0
    with Image.open("out.png") as made:
        assert made.text == {  # type: ignore[attr-defined]
            "model": "synthetic", "prompt": "x", "seed": "1", "steps": "2", "guidance": "3", "strength": "0.3",
        }  # fmt: skip
        expected = pipeline("x", seed=1, image=PICTURE, strength=0.3, steps=2).frames[0]
        assert np.array_equal(np.asarray(made), expected)
    assert "picture" in run("--image", "in.png", "--strength", "0.3", "--out", "out.png").stdout


def test_mistakes_are_one_message(run: Callable[..., Result], tmp_path: Path) -> None:
    Path("text.png").write_text("hello")
    built_in = ("--bundle", str(tmd_runtime.load().bundle.folder))
    for words, code, message in (
        (("--image", "in.png"), 2, "to start from a picture, choose a strength"),
        (("--image", "in.png", "--init-latents", "l", "--strength", "1"), 2, "two pictures to start from"),
        (("--image", "no.png", "--strength", "1"), 1, "no.png does not exist: name a picture"),
        (("--image", "text.png", "--strength", "1"), 1, "text.png is no picture that can be read here"),
        (("--image", "in.png", "--strength", "0.5", "--size", "50x64"), 2, "a width of 50 pixels"),
        ((*built_in, "--image", "in.png", "--strength", "0.5"), 2, "start from a picture is for Transition Models"),
    ):
        done = run(*words)
        assert (done.exit_code, done.stdout) == (code, ""), done.output
        assert message in " ".join(done.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "text.png"]


@pytest.mark.parametrize("name", ["slow.webp", "wide.png", "claims.bmp", "claims.tiff"])
def test_a_small_file_that_claims_to_be_large_is_refused_by_its_header(tmp_path: Path, name: str) -> None:
    """Before memory for the picture is taken: the peak of a process of its own, and its time."""
    side = 15_000
    if name == "slow.webp":  # VP8 says its size in the ten bytes of its frame's header
        frame = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", side, side) + bytes(300)
        data = b"RIFF" + struct.pack("<I", len(frame) + 12) + b"WEBPVP8 " + struct.pack("<I", len(frame)) + frame
    elif name == "wide.png":
        whole = file("PNG", Image.fromarray(PICTURE))
        claim = b"IHDR" + struct.pack(">II", side, side) + whole[24:29]
        data = whole[:12] + claim + struct.pack(">I", zlib.crc32(claim)) + whole[33:]
    elif name == "claims.bmp":
        data = (
            b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, *[0] * 6)
        )
        data += bytes(946)
    else:
        tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 100)]
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(400)
    (tmp_path / name).write_bytes(data)
    script = (
        "import sys, time\n"
        "from tmd_runtime.autoencoder.picture import read_picture\n"
        "start = time.monotonic()\n"
        "try:\n"
        "    read_picture(sys.argv[1])\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(peak.split()[1], time.monotonic() - start)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / name)]
    kind, figures = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert kind == "RuntimeFailure"
    assert int(figures.split()[0]) < 150_000 and float(figures.split()[1]) < 3


def test_a_large_transparent_picture_takes_no_more_than_a_few_copies(tmp_path: Path) -> None:
    Image.new("RGBA", (6000, 6000), (10, 20, 30, 128)).save(tmp_path / "x.png")
    script = (
        "import sys\n"
        "from tmd_runtime.autoencoder.picture import read_picture\n"
        "picture = read_picture(sys.argv[1])\n"
        "assert picture.shape == (6000, 6000, 3) and (picture == [132, 137, 142]).all()\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 60_000_000 + 4 * 4 * 6000 * 6000


def test_a_picture_larger_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(drawn(600, 600)).save(tmp_path / "x.png")
    monkeypatch.setattr("tmd_runtime.autoencoder.picture.available_bytes", lambda: 24 * 1000)
    with pytest.raises(RuntimeFailure, match=r"at most 0.001 megapixels.*free memory allow"):
        read_picture(tmp_path / "x.png")
