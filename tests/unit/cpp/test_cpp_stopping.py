"""A run of the C++ library ends when it is told to, in the middle of a graph, and leaves no file behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.cpp_tools import Twin, engine_options, onnxruntime_library, program, twin
from tests.helpers.processes import with_default_signals
from tmd_engines import unfinished
from tmd_runtime.built_in import BUILT_IN

ENGINES = ["onnxruntime", "openvino"]
CANCELLED = 8  # tmd_status
SIDE = 32  # latents of 32x32: a graph of the decoder takes half a second, and many on a busy machine
HALF, SLACK = 0.5, 1.5  # of a machine that does other things as well


@pytest.mark.parametrize("by_signal", [False, True], ids=["a thread", "a handler"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_running_graph_is_stopped_and_the_context_goes_on(engine: str, by_signal: bool) -> None:
    """Asked an eighth into a graph: whole, it would run seven eighths more. A stop that is over stops nothing."""
    engine_options(engine)
    library = str(onnxruntime_library()) if engine == "onnxruntime" else ""
    question = {"bundle": str(BUILT_IN), "engine": engine, "library": library, "height": SIDE, "width": SIDE}
    answer = twin().ask("stop", **question, by_signal=by_signal)
    assert answer.get("ok") == CANCELLED, answer
    assert answer["said"] == "the run was stopped by tmd_cancel."
    assert answer["waited"] < answer["whole"] * 5 / 8, answer


def start_long(folder: Path, engine: str) -> subprocess.Popen[bytes]:
    """`tmd_generate` in the midst of minutes of work."""
    words = [program("tmd_generate"), BUILT_IN, "x", "v.y4m", "--size", "512x512", "--frames", "81", "--memory", "all"]
    process = subprocess.Popen(
        [str(word) for word in [*words, "--seed", "1", *engine_options(engine)]],
        cwd=folder, stderr=subprocess.PIPE, preexec_fn=with_default_signals,
    )  # fmt: skip
    assert process.stderr is not None
    seen = b""
    while b"% text" not in seen:
        word = os.read(process.stderr.fileno(), 4096)
        assert word, seen
        seen += word
    time.sleep(1.0)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_ends_the_example(tmp_path: Path, number: signal.Signals, engine: str) -> None:
    (tmp_path / "v.y4m").write_bytes(b"an older video")
    process = start_long(tmp_path, engine)
    start = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert time.monotonic() - start < HALF + SLACK
    assert process.returncode == 128 + number
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an older video"]


def test_what_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    def nohup() -> None:
        with_default_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    engine_options("onnxruntime")
    words = [program("tmd_generate"), BUILT_IN, "x", "v.y4m", *engine_options("onnxruntime"), "--frames", "5"]
    process = subprocess.Popen([str(word) for word in words], cwd=tmp_path, preexec_fn=nohup)
    for _ in range(20):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.02)
    assert process.wait(120) == 0 and (tmp_path / "v.y4m").stat().st_size > 1000


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """The folder that OpenVINO reads graphs from; folders of living processes, of either host, stay."""
    engine_options("openvino")
    killed, alive = Twin(TMPDIR=str(tmp_path)), Twin(TMPDIR=str(tmp_path))
    left, used = (Path(each.ask("hold_folder")["ok"]).parent for each in (killed, alive))
    mine = unfinished.begin(tmp_path, is_folder=True)
    (tmp_path / ".tmd-of-somebody-else").mkdir()
    assert unfinished.sweep(tmp_path) == [], "Python sees the locks of C++"
    killed._process.kill()
    killed._process.wait()
    wishes = {"seed": 1, "frames": 1, "width": 32, "height": 32}
    answer = Twin(TMPDIR=str(tmp_path)).ask(
        "run", bundle=str(BUILT_IN), engine="openvino", prompt="a red circle", wishes=wishes
    )
    assert "ok" in answer, answer
    assert not left.exists() and (used / "graph.onnx").exists() and mine.exists()
    assert sorted(tmp_path.iterdir()) == sorted([used, mine, tmp_path / ".tmd-of-somebody-else"])
    unfinished.end(mine)  # it is gone, and its folder is not
    assert "ok" in twin().ask("sweep_folders", folder=str(tmp_path)) and not mine.exists()
