"""A video file holds what made it, as a PNG does, and is shown as fast as somebody asks."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tmd_runtime import UsageFailure, open_video, write_video
from tmd_runtime.command.cli import command
from tmd_runtime.files.png import describe

TEXTS = {
    "model": "tiny",
    "prompt": "a cat, ein Kätzchen, 猫 \N{CAT FACE}\n= ; \\ # line\0two",
    "seed": "7",
    "steps": "2",
}
VIDEOS = ["v.mp4", "v.webm"]


def clip(frames: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 32, 48, 3), np.uint8)


def read_tags(path: Path) -> dict[str, str]:
    """The tags of a container, whose names Matroska writes in capitals."""
    with av.open(str(path)) as container:
        return {name.lower(): text for name, text in container.metadata.items()}


def gif_comments(path: Path) -> list[str]:
    """As Pillow reads them, which joins the sub-blocks."""
    with Image.open(path) as image:
        comment: Any = image.info.get("comment")
    return [] if comment is None else [comment.decode("ascii")]


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def rate(path: Path) -> float:
    with av.open(str(path)) as container:
        found = container.streams.video[0].average_rate
    assert found is not None
    return float(found)


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_holds_what_made_it(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, clip(), 8, TEXTS)
    found = read_tags(tmp_path / name)
    assert json.loads(found["comment"]) == TEXTS
    assert found["description"] == TEXTS["prompt"].replace("\0", "")


def test_a_gif_holds_what_made_it_and_shows_the_same(tmp_path: Path) -> None:
    write_video(tmp_path / "v.gif", clip(), 8, TEXTS)
    write_video(tmp_path / "plain.gif", clip(), 8)
    (comment,) = gif_comments(tmp_path / "v.gif")
    assert json.loads(comment) == TEXTS and gif_comments(tmp_path / "plain.gif") == []
    words, plain = (frames(tmp_path / name) for name in ("v.gif", "plain.gif"))
    assert len(plain) == 3 and np.array_equal(words, plain)


@pytest.mark.parametrize("name", [*VIDEOS, "v.gif"])
def test_the_longest_prompt_fits(tmp_path: Path, name: str) -> None:
    texts = {"prompt": "ü" * 65_536}
    write_video(tmp_path / name, clip(1), 8, texts)
    comment = gif_comments(tmp_path / name)[0] if name == "v.gif" else read_tags(tmp_path / name)["comment"]
    assert json.loads(comment) == texts


@pytest.mark.parametrize("name", [*VIDEOS, "v.gif"])
def test_the_same_words_give_the_same_bytes_and_no_words_none(tmp_path: Path, name: str) -> None:
    files = []
    for texts in (TEXTS, TEXTS, {}):
        write_video(tmp_path / name, clip(), 8, texts)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] != files[2]
    if name in VIDEOS:
        assert not {"comment", "description"} & set(read_tags(tmp_path / name))


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed")
@pytest.mark.parametrize("name", VIDEOS)
def test_ffprobe_shows_them(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, clip(), 8, {"prompt": "a cat", "seed": "7"})
    words = ["ffprobe", "-v", "error", "-show_entries", "format_tags", "-of", "json", str(tmp_path / name)]
    found = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["format"]["tags"]
    found = {key.lower(): value for key, value in found.items()}
    assert json.loads(found["comment"])["seed"] == "7" and found["description"] == "a cat"


def run(bundle: Path, *arguments: object) -> Result:
    words = ["--bundle", bundle, "--frames", 5, "--size", "32x32", "--json", *arguments]
    return CliRunner().invoke(command, [str(word) for word in words])


def test_a_run_writes_the_same_words_into_every_format(
    synthetic_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("v.mp4", "v.webm", "v.gif", "v.png"):
        ran = run(synthetic_bundle, "--prompt", "a cat", "--seed", 7, "--steps", 3, "--out", name)
        assert ran.exit_code == 0, ran.output
    wanted = {"model": "synthetic", "prompt": "a cat", "seed": "7", "steps": "3", "inner_steps": "2"}
    with Image.open("v.png") as image:
        assert dict(image.text) == wanted  # type: ignore[attr-defined]
    assert json.loads(read_tags(Path("v.mp4"))["comment"]) == wanted
    assert json.loads(read_tags(Path("v.webm"))["comment"]) == wanted
    assert json.loads(gif_comments(Path("v.gif"))[0]) == wanted


def test_fps_changes_the_speed_and_no_frame(
    synthetic_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = ("--prompt", "a cat", "--seed", 7)
    for fps in (8, 24):
        ran = run(synthetic_bundle, *prompt, "--fps", fps, "--out", f"{fps}.mp4", "--save-latents", "l.safetensors")
        assert ran.exit_code == 0 and json.loads(ran.stdout)["fps"] == fps
        assert rate(Path(f"{fps}.mp4")) == fps
        run(synthetic_bundle, *prompt, "--fps", fps, "--out", f"frames-{fps}")
    for k in range(5):
        slow, fast = (Path(f"frames-{fps}", f"frame_{k:04d}.png").read_bytes() for fps in (8, 24))
        assert slow == fast
    words = ["--bundle", str(synthetic_bundle), "--latents", "l.safetensors", "--fps", "12", "--out", "again.webm"]
    decoded = CliRunner().invoke(command, words)
    assert decoded.exit_code == 0, decoded.output
    assert rate(Path("again.webm")) == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fps", "0"], "0 is out of range: give a whole number, from 1 to 1000"),
        (["--fps", "23.976"], "'23.976' is no whole number"),
        (["--fps", "60", "--out", "v.gif"], "a GIF of 60 frames per second cannot be written"),
        (["--bundle", "builtin:tim-tiny", "--fps", "8"], "this model makes stills"),
    ],
)
def test_a_speed_that_cannot_be_is_refused_before_the_run(
    synthetic_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(command, ["--prompt", "a cat", "--bundle", str(synthetic_bundle), *words])
    assert ran.exit_code == 2 and message in ran.output, ran.output
    assert [path for path in tmp_path.iterdir() if path != synthetic_bundle] == []


@pytest.mark.parametrize("fps", [0, 1001, 7.5])
def test_a_file_refuses_it_too(tmp_path: Path, fps: Any) -> None:
    with pytest.raises(UsageFailure, match="whole number from 1 to 1000"):
        open_video(tmp_path / "v.mp4", fps)
    assert list(tmp_path.iterdir()) == []


def test_the_negative_prompt_stays_out_as_in_a_png() -> None:
    from tmd_runtime import load

    pipeline = load("builtin:tim-tiny")
    settings = pipeline.settings(seed=1, guidance=3.0, negative_prompt="a secret")
    assert "secret" not in json.dumps(describe(settings, "tiny", "a cat"))
