"""What is being made, what was left of it, and folders of frames that change as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tmd_engines import unfinished
from tmd_engines.device.plan_cache import PlanCache
from tmd_runtime import RuntimeFailure, UsageFailure, open_video, write_video
from tmd_runtime.files.video import check_target


def frames(count: int, shade: int) -> Any:
    return np.full((count, 16, 16, 3), shade, np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shades(folder: Path) -> set[int]:
    """First bytes of the pixels, one for each frame."""
    import av

    found = set()
    for path in folder.glob("frame_*.png"):
        with av.open(str(path)) as file:
            found.add(int(next(file.decode(video=0)).to_ndarray(format="rgb24")[0, 0, 0]))
    return found


@pytest.mark.parametrize("is_folder", [False, True])
def test_only_what_no_process_owns_is_removed(tmp_path: Path, is_folder: bool) -> None:
    mine = unfinished.begin(tmp_path, is_folder)
    script = (
        "import sys, pathlib\n"
        "from tmd_engines import unfinished\n"
        "print(unfinished.begin(pathlib.Path(sys.argv[1]), sys.argv[2] == 'True').name, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(is_folder)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    theirs = process.stdout.readline().strip()
    (tmp_path / ".tmd-of-an-old-version.part").write_bytes(b"x")
    (tmp_path / ".tmd-folder.part").mkdir()
    (tmp_path / ".tmd-folder.part" / "frame_0000.png").write_bytes(b"x")
    for other in ("v.mp4.part", ".tmd-.part", ".tmd-a b.part", "tmd-x.part"):
        (tmp_path / other).write_bytes(b"somebody else's")
    (tmp_path / ".tmd-link.part").symlink_to(tmp_path / "v.mp4.part")
    assert unfinished.sweep(tmp_path) == [".tmd-folder.part", ".tmd-of-an-old-version.part"]
    assert mine.exists() and (tmp_path / theirs).exists() and (tmp_path / "v.mp4.part").exists()
    process.kill()
    process.communicate()
    assert unfinished.sweep(tmp_path) == [theirs]
    unfinished.discard(mine)
    assert not mine.exists()


def test_a_maker_whose_file_was_swept_in_between_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = unfinished._lock
    first: list[Path] = []

    def late(path: Path) -> int | None:
        handle = lock(path)
        if not first:
            first.append(path)
            os.unlink(path)
        return handle

    monkeypatch.setattr(unfinished, "_lock", late)
    path = unfinished.begin(tmp_path)
    assert path.exists() and path != first[0]
    unfinished.discard(path)


def test_a_file_system_without_locks_or_permissions_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    import fcntl

    for where, name in ((fcntl, "flock"), (os, "chmod"), (os, "chown"), (os, "link")):
        monkeypatch.setattr(where, name, refused)
    (tmp_path / ".tmd-old.part").write_bytes(b"x")
    for out in ("v.mp4", "v.png", "frames"):
        write_video(tmp_path / out, frames(3, 9), 8)
        write_video(tmp_path / out, frames(2, 9), 8)
    assert unfinished.sweep(tmp_path) == [], "what cannot be told stays"
    assert names(tmp_path) == [".tmd-old.part", "frames", "v.mp4", "v.png"]


def test_a_cache_entry_in_the_making_counts_and_is_cleaned(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    cache = PlanCache(tmp_path, max_folder=1000)
    cache.store({"a": "1"}, bytes(300))
    left = unfinished.begin(tmp_path, prefix=".new-")
    left.write_bytes(bytes(400))
    cache.store({"a": "2"}, bytes(300))
    assert left.exists() and len(list(tmp_path.glob("*.plan"))) == 1, "another process is writing 400 bytes"
    unfinished.end(left)  # it is gone, and its file is not
    cache.store({"a": "3"}, bytes(300))
    assert not left.exists() and cache.load({"a": "3"}) == bytes(300)


@pytest.mark.parametrize("call", ["stat", "unlink"])
def test_an_entry_that_another_process_removes_meanwhile_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    tmp_path.chmod(0o700)
    cache = PlanCache(tmp_path, max_folder=1000)
    cache.store({"a": "1"}, bytes(500))
    (old,) = tmp_path.glob("*.plan")
    real, is_there = getattr(Path, call), True

    def gone(path: Path, *given: Any, **more: Any) -> Any:
        nonlocal is_there
        if path == old and is_there:
            is_there = False
            os.remove(old)
        return real(path, *given, **more)

    with monkeypatch.context() as race:
        race.setattr(Path, call, gone)
        cache.store({"a": "2"}, bytes(600))
    assert cache.load({"a": "2"}) == bytes(600)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_of_frames_changes_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(unfinished, "exchange", lambda *_: False)
    out = tmp_path / "frames"
    write_video(out, frames(5, 10), 8)
    out.chmod(0o750)
    write_video(out, frames(3, 200), 8)
    assert names(out) == [f"frame_{k:04d}.png" for k in range(3)] and shades(out) == {200}
    assert out.stat().st_mode & 0o777 == 0o750 and names(tmp_path) == ["frames"]


@pytest.mark.parametrize("at", range(1, 12))
def test_no_moment_shows_frames_of_two_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Frame by frame, where folders cannot be exchanged: at each rename, and after one that fails."""
    monkeypatch.setattr(unfinished, "exchange", lambda *_: False)
    out = tmp_path / "frames"
    write_video(out, frames(5, 10), 8)
    replace, count = os.replace, 0

    def watched(source: Any, destination: Any) -> None:
        nonlocal count
        count += 1
        assert len(shades(out)) <= 1
        if count == at:
            raise OSError(28, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", watched)
    if at > 8:
        write_video(out, frames(3, 200), 8)
        assert shades(out) == {200}
        return
    with pytest.raises(RuntimeFailure, match="no space left on device"):
        write_video(out, frames(3, 200), 8)
    assert shades(out) == {10} and len(names(out)) == 5, "the old video is whole"


def test_kill_9_at_any_rename_leaves_one_video(tmp_path: Path) -> None:
    script = (
        "import os, sys, numpy as np, tmd_runtime\n"
        "from tmd_engines import unfinished\n"
        "if sys.argv[3] == 'slow':\n"
        "    unfinished.exchange = lambda *_: False\n"
        "replace, left = os.replace, [int(sys.argv[2])]\n"
        "def killed(*names):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    replace(*names)\n"
        "os.replace = killed\n"
        "tmd_runtime.write_video(sys.argv[1], np.full((3, 16, 16, 3), 200, np.uint8), 8)\n"
    )
    for way in ("slow", "exchange"):
        for at in range(0, 9, 2):
            out = tmp_path / f"{way}{at}"
            write_video(out, frames(5, 10), 8)
            subprocess.run([sys.executable, "-c", script, str(out), str(at), way], timeout=60)
            assert len(shades(out)) <= 1
            unfinished.sweep(out)
            unfinished.sweep(tmp_path)
            assert all(name.startswith("frame_") for name in names(out))


def test_our_own_folder_and_hidden_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "frames"
    write_video(out, frames(2, 10), 8)
    (out / ".gitignore").write_text("*.png")
    write_video(out, frames(2, 20), 8)
    assert (out / ".gitignore").read_text() == "*.png" and shades(out) == {20}
    (out / ".gitignore").unlink()
    monkeypatch.chdir(out)
    before = os.stat(".").st_ino
    write_video(".", frames(2, 30), 8)
    assert os.stat(out).st_ino == before and shades(out) == {30}


@pytest.mark.parametrize("name", ["v.mp4/", "v/", "a.b/"])
def test_a_slash_behind_a_name_makes_a_folder(tmp_path: Path, name: str) -> None:
    write_video(f"{tmp_path}/{name}", frames(2, 10), 8)
    assert names(tmp_path / name) == ["frame_0000.png", "frame_0001.png"]


@pytest.mark.parametrize("name", [".mp4", ".PNG", ".webm", ".gif"])
def test_an_ending_alone_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageFailure, match=r"an ending without a name\. Write video"):
        check_target(tmp_path / name)
    with pytest.raises(UsageFailure), open_video(tmp_path / name, 8):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("ending", [".mp4", ".webm", ".gif", ".png", ""])
def test_names_that_are_not_utf_8_can_be_written(tmp_path: Path, ending: str) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn"))
    folder.mkdir()
    out = Path(os.fsdecode(os.fsencode(folder) + b"/v\xff" + ending.encode()))
    write_video(out, frames(3, 10), 8)
    assert os.listdir(os.fsencode(folder)) == [os.fsencode(out.name)]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_bundles_and_caches_may_lie_under_such_names(
    tmp_path: Path, synthetic_bundle: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tmd_runtime
    from tmd_runtime.files.tensor_files import Latents, load_latents, save_latents

    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    folder.mkdir()
    moved = synthetic_bundle.rename(folder / "bundle")
    monkeypatch.setenv("TMD_CACHE", str(folder / "cache"))
    with tmd_runtime.load(moved, engine=engine) as pipeline:
        settings = pipeline.settings(seed=1, frames=5, size=(32, 32))
        result = pipeline("a red circle", seed=1, frames=5, size=(32, 32))
        assert result.latents is not None
        file = Path(os.fsdecode(os.fsencode(folder) + b"/l\xfe"))
        save_latents(file, Latents.of(settings, result.latents, "m", "x"))
        assert np.array_equal(load_latents(file, pipeline.manifest).latents, result.latents)
