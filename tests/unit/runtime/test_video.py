"""What is written is what was given, read back with PyAV. Nothing appears before it is complete, nothing stays."""

from __future__ import annotations

import _thread
import os
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tmd_runtime import RuntimeFailure, UsageFailure, open_video, write_video
from tmd_runtime.files.encoders import contact_sheet, sheet_size
from tmd_runtime.files.video import check_form, check_target

FPS, FRAMES = 8, 17
NAMES = ["v.mp4", "v.webm", "v.gif", "v.png", "frames"]
# Saturated colours, as the built-in model paints them: wrong matrices or ranges would move them visibly.
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 128), (255, 165, 0), (255, 255, 255), (0, 0, 0)]


def clip(height: int = 64, width: int = 64, frames: int = FRAMES) -> np.ndarray:
    """Large patches of colour, and a white bar that moves right one pixel per frame."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for k, colour in enumerate(COLOURS):
        video[:, k % 2 * height // 2 : (k % 2 + 1) * height // 2, k // 2 * width // 4 : (k // 2 + 1) * width // 4] = (
            colour
        )
    for f in range(frames):
        video[f, height // 2 - 4 : height // 2 + 4, f : f + 8] = 255
    return video


def read(path: Path) -> tuple[np.ndarray, Fraction, float | None]:
    """Frames as RGB, frames per second, and the duration in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, duration = stream.average_rate, container.duration
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert rate is not None
    return np.stack(frames), rate, duration and duration / av.time_base


@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.gif", "V.MP4"])
def test_video_reads_back(tmp_path: Path, name: str) -> None:
    video = clip()
    write_video(tmp_path / name, video, FPS)
    frames, rate, duration = read(tmp_path / name)
    assert frames.shape == video.shape
    # GIF counts hundredths of a second: 1/8 s becomes 0.12 or 0.13.
    assert float(rate) == pytest.approx(FPS, rel=0.05 if name.endswith("gif") else 1e-6)
    assert duration == pytest.approx(FRAMES / FPS, abs=0.07)
    error = np.abs(frames.astype(int) - video)
    # Colour has half the resolution in 4:2:0, so edges differ; the insides of the patches must not.
    assert error.mean() < (1 if name.endswith("gif") else 6)
    for k, colour in enumerate(COLOURS):
        y, x = (16 if k % 2 == 0 else 52), k // 2 * 16 + 8
        assert np.abs(frames[:, y, x].astype(int) - colour).max() <= 6, f"{colour} in {name}"


@pytest.mark.parametrize("name", ["v.mp4", "v.webm"])
def test_colours_are_tagged_and_every_player_can_decode(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, clip(), FPS)
    with av.open(str(tmp_path / name)) as container:
        context = container.streams.video[0].codec_context
        assert context.name == ("h264" if name == "v.mp4" else "vp9")
        assert context.pix_fmt == "yuv420p"
        assert (context.colorspace, context.color_range) == (1, 1), "BT.709, limited range"


def test_mp4_can_start_before_it_is_whole(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", clip(), FPS)
    content = (tmp_path / "v.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(33, 47), (1, 1), (16, 17)])
def test_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    video = np.full((3, height, width, 3), (200, 40, 90), np.uint8)
    for name in NAMES:
        write_video(tmp_path / name, video, FPS)
    for name in ("v.mp4", "v.webm"):
        frames = read(tmp_path / name)[0]
        assert frames.shape == (3, height + height % 2, width + width % 2, 3)
        assert np.abs(frames.astype(int) - (200, 40, 90)).max() <= 6
    assert read(tmp_path / "v.gif")[0].shape == video.shape
    assert read(tmp_path / "frames" / "frame_0002.png")[0].shape == (1, height, width, 3)


def test_contact_sheet_shows_all_frames_in_reading_order(tmp_path: Path) -> None:
    video = clip(frames=7)
    write_video(tmp_path / "v.png", video, FPS)
    (sheet,) = read(tmp_path / "v.png")[0]
    assert sheet.shape == (3 * 66 + 2, 3 * 66 + 2, 3), "three columns, gaps of two pixels"
    assert np.array_equal(sheet, contact_sheet(video))
    for k, frame in enumerate(video):
        top, left = 2 + k // 3 * 66, 2 + k % 3 * 66
        assert np.array_equal(sheet[top : top + 64, left : left + 64], frame)
    assert (sheet[:2] == 255).all()


def test_folder_holds_exact_frames(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (3, 48, 32, 3), np.uint8)
    write_video(tmp_path / "frames", video, FPS)
    assert sorted(os.listdir(tmp_path / "frames")) == ["frame_0000.png", "frame_0001.png", "frame_0002.png"]
    for k, frame in enumerate(video):
        assert np.array_equal(read(tmp_path / "frames" / f"frame_{k:04d}.png")[0][0], frame)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_make_the_same_file_as_the_whole(tmp_path: Path, name: str) -> None:
    video = clip()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write_video(tmp_path / "a" / name, video, FPS)
    with open_video(tmp_path / "b" / name, FPS) as writer:
        for piece in np.split(video, [1, 5, 9, 13]):
            writer.write(piece)
    if name == "frames":
        a, b = (np.concatenate([read(p)[0] for p in sorted((tmp_path / f / name).iterdir())]) for f in "ab")
    else:
        a, b = (read(tmp_path / folder / name)[0] for folder in "ab")
    assert np.array_equal(a, b)
    assert writer.seconds > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_half_file_and_keeps_the_old_one(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    def interrupted() -> None:
        with open_video(tmp_path / name, FPS) as writer:
            writer.write(clip())
            assert (tmp_path / name).exists() == exists, "nothing under the name before the end"
            raise error

    exists = False
    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []

    write_video(tmp_path / name, clip(), FPS)
    before = content(tmp_path)
    exists = True
    with pytest.raises(error):
        interrupted()
    assert content(tmp_path) == before


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_complete_file_replaces_the_old_one(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, clip(), FPS)
    write_video(tmp_path / name, clip(32, 32, 3), FPS)
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    if name == "frames":
        assert sorted(names) == [f"frames/frame_000{k}.png" for k in range(3)], "no frame of the longer video stays"
    else:
        assert names == [name]
        assert len(read(tmp_path / name)[0]) == (1 if name == "v.png" else 3)


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_video(tmp_path / "v.gif", clip(), FPS)
        write_video(tmp_path / "frames", clip(), FPS)
    finally:
        os.umask(mask)
    assert (tmp_path / "v.gif").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "frames").stat().st_mode & 0o777 == 0o755


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_video(tmp_path / ("猫" * 83 + ".gif"), clip(frames=1), FPS)  # 253 bytes of at most 255


def test_a_link_keeps_pointing_at_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "v.gif").write_bytes(b"old")
    (tmp_path / "v.gif").symlink_to(tmp_path / "real" / "v.gif")
    write_video(tmp_path / "v.gif", clip(), FPS)
    assert (tmp_path / "v.gif").is_symlink()
    assert (tmp_path / "real" / "v.gif").read_bytes().startswith(b"GIF8")


@pytest.mark.parametrize("name", ["v.avi", "v.jpg", "v.mp4x"])
def test_unknown_endings_are_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    for attempt in (lambda: check_target(tmp_path / name), lambda: open_video(tmp_path / name, FPS)):
        with pytest.raises(UsageFailure, match=r"ending '\..*' is unknown\. Choose \.mp4, \.webm, \.gif, \.png"):
            attempt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"the folder .*nowhere does not exist"):
        check_target(tmp_path / "nowhere" / name)


@pytest.mark.parametrize("name", NAMES)
def test_an_unwritable_folder_is_found_before_the_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by chmod: tests may run as root, who may write anywhere.
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tmd_engines.unfinished.begin", denied)
    with pytest.raises(RuntimeFailure, match=r"cannot write .*: permission denied. Choose another place"):
        check_target(tmp_path / name)


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RuntimeFailure, match="taken by something that is no folder"):
        check_target(tmp_path / "file")
    os.mkfifo(tmp_path / "v.mp4")
    with pytest.raises(RuntimeFailure, match="taken by something that is no file"):
        check_target(tmp_path / "v.mp4")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RuntimeFailure, match=r"holds other files, such as 'thesis\.txt'"):
        check_target(tmp_path)
    assert content(tmp_path) == {"thesis.txt": b"years of work"}


def test_an_existing_folder_is_filled_in_place(tmp_path: Path) -> None:
    # It may be a mount, or the working directory: it must stay the same folder.
    inode = tmp_path.stat().st_ino
    write_video(tmp_path, clip(frames=2), FPS)
    assert sorted(os.listdir(tmp_path)) == ["frame_0000.png", "frame_0001.png"] and tmp_path.stat().st_ino == inode


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tmd_runtime.files import encoders

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoders.ENCODERS["" if name == "frames" else Path(name).suffix], "add", full)
    with (
        pytest.raises(RuntimeFailure, match=r"cannot write .*: no space left on device"),
        open_video(tmp_path / name, FPS) as writer,
    ):
        for _ in range(50):  # more than the queue holds: a dead encoder must not block the caller
            writer.write(clip(frames=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_video_without_frames_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(RuntimeFailure, match="not one frame"), open_video(tmp_path / name, FPS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_thread_stays_behind(tmp_path: Path) -> None:
    write_video(tmp_path / "v.gif", clip(), FPS)
    with pytest.raises(ZeroDivisionError), open_video(tmp_path / "w.gif", FPS):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name == "video-file"]


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.float32),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 4), np.uint8),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="frames must be uint8"):
        write_video(tmp_path / "v.gif", frames, FPS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["while it waits for room", "while the encoder ends"])
def test_ctrl_c_while_a_video_is_closed_ends_it_and_leaves_nothing(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes where `__exit__` waits; a thread that nobody has told of the end would wait for ever."""
    from tmd_runtime.files import encoders

    encoding = threading.Event()

    def slow(*_: object) -> None:
        encoding.set()
        time.sleep(0.5)

    monkeypatch.setattr(encoders.ENCODERS[".png"], "add", slow)
    pieces = 4 if when == "while it waits for room" else 1
    signal = threading.Timer(0.2, _thread.interrupt_main)

    def close() -> None:
        with open_video(tmp_path / "v.png", FPS) as writer:
            for number in range(pieces):
                writer.write(clip(frames=1))
                if number == 0:
                    encoding.wait()
            signal.start()

    closing_began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        close()
    assert time.perf_counter() - closing_began < 30  # it hung for ever
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "video-file"]


@pytest.mark.parametrize(
    ("name", "form", "what"),
    [
        ("v.png", (8, 293, 1280, 704), "a contact sheet of 293 frames of 1280x704"),
        ("v.gif", (60, 5, 64, 64), "a GIF of 60 frames per second"),
        ("v.mp4", (0, 5, 64, 64), "0 frames per second"),
    ],
)
def test_a_form_that_a_format_does_not_have_is_refused_beforehand(name: str, form: tuple, what: str) -> None:
    with pytest.raises(UsageFailure, match=what):
        check_form(name, *form)
    check_form("v.png", 8, 161, 1280, 704)
    check_form("frames", 8, 10_000, 1280, 704)


def test_a_contact_sheet_is_refused_where_ffmpeg_refuses_it() -> None:
    largest = max(frames for frames in range(1, 400) if fits(frames, 1280, 704))
    for frames in (largest, largest + 1):
        codec = av.CodecContext.create("png", "w")
        codec.width, codec.height = sheet_size(frames, 1280, 704)
        codec.pix_fmt = "rgb24"
        if frames == largest:
            codec.open()
        else:
            with pytest.raises(av.FFmpegError):
                codec.open()


def fits(frames: int, width: int, height: int) -> bool:
    try:
        check_form("v.png", FPS, frames, width, height)
    except UsageFailure:
        return False
    return True
