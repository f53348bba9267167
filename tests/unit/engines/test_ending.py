"""A signal ends every command within half a second, whatever it is doing: no traceback, no file, 128 and its number."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, Signals

import pytest

from tests.helpers.processes import SIGNALS, children, is_gone, send, started, wait_for
from tmd_runtime.built_in import BUILT_IN

SLOW = pytest.mark.slow

# The command, in a process that says when it is in the midst of the work.
SCRIPT = """
import sys, threading, time
import tmd_engines.command.verify as verify
from tmd_engines.device import running

def tell():
    while not running.RUNNING:
        time.sleep(0.005)
    print("running", flush=True)

verify._LATENT_CELLS = {"frames": 21, "height": 64, "width": 64}  # minutes
threading.Thread(target=tell, daemon=True).start()
from tmd_engines.command.start import main
main()
"""
COMPILING = """
import sys
from tmd_engines.openvino.engine import OpenVinoEngine
compile_graph = OpenVinoEngine._compile

def compile_again_and_again(*arguments):
    print("running", flush=True)
    while True:
        compile_graph(*arguments)

OpenVinoEngine._compile = compile_again_and_again
from tmd_engines.command.start import main
main()
"""


@contextmanager
def engine_at_work(script: str, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "TMD_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    with started([sys.executable, "-c", script, *arguments, "--threads", "1"], folder, env=environment) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "running\n":
            assert line
        yield process


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "number"),
    [("onnxruntime", SIGINT), ("onnxruntime", SIGTERM), ("openvino", SIGINT), ("openvino", SIGHUP)],
)
def test_verify_ends_in_a_graph(tmp_path: Path, number: Signals, engine: str) -> None:
    with engine_at_work(SCRIPT, tmp_path, "verify", str(BUILT_IN), "--engine", engine) as process:
        send(process, number)
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


@pytest.mark.parametrize("number", SIGNALS)
def test_build_ends_in_a_compilation(tmp_path: Path, number: Signals) -> None:
    with engine_at_work(COMPILING, tmp_path, "build", str(BUILT_IN), "--engine", "openvino") as process:
        send(process, number)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".onnx", ".data")]


@pytest.mark.parametrize("number", SIGNALS)
def test_doctor_ends_while_it_waits_for_a_driver(tmp_path: Path, number: Signals) -> None:
    program = tmp_path / "nvidia-smi"
    # A moment first: a signal while the process is being started would leave it to itself.
    program.write_text(f"#!/bin/sh\nsleep 0.5\ntouch {tmp_path}/asked\nexec sleep 600\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with started([sys.executable, "-m", "tmd_engines", "doctor"], tmp_path, env=environment) as process:
        wait_for((tmp_path / "asked").exists)
        asked = children(process.pid)
        send(process, number)
    wait_for(lambda: all(map(is_gone, asked)))


BENCH = [sys.executable, "-m", "tmd_bench", "--engine", "onnxruntime", "--size", "512x512", "--frames", "81"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_measurement_ends_with_all_its_processes(tmp_path: Path, number: Signals) -> None:
    with started([*BENCH, "--json", "b.json"], tmp_path) as process:
        wait_for(lambda: len(children(process.pid)) == 1)
        measuring = children(process.pid)
        send(process, number)
    wait_for(lambda: all(map(is_gone, measuring)))
    assert not list(tmp_path.iterdir())


def test_a_measurement_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    with started(BENCH, tmp_path) as process:
        wait_for(lambda: len(children(process.pid)) == 1)
        measuring = children(process.pid)
        process.kill()
    wait_for(lambda: all(map(is_gone, measuring)))


def folders_in_the_making(folder: Path) -> list[Path]:
    return list(folder.glob(".tmd-*.part"))


WAN = ["--model", "wan1.3b", "--random-weights", "0"]


@pytest.mark.parametrize("number", [SIGHUP, pytest.param(SIGINT, marks=SLOW), pytest.param(SIGTERM, marks=SLOW)])
def test_an_export_ends_and_leaves_nothing(tmp_path: Path, number: Signals) -> None:
    command = [sys.executable, "-m", "tmd_export", *WAN, "--parts", "backbone", "--out", "bundle"]
    with started(command, tmp_path) as process:
        wait_for(lambda: bool(folders_in_the_making(tmp_path)))
        send(process, number)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_measurement_ends_in_its_export(tmp_path: Path, number: Signals) -> None:
    command = [sys.executable, "-m", "tmd_bench", *WAN, "--keep", "kept"]
    with started(command, tmp_path, env={**os.environ, "TMPDIR": "."}) as process:
        wait_for(lambda: len(folders_in_the_making(tmp_path)) == 2)
        exporting = children(process.pid)
        send(process, number)
    wait_for(lambda: all(map(is_gone, exporting)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["tmd_engines.command", "tmd_bench", "tmd_export"])
def test_no_command_prints_a_traceback_from_its_first_line_on(module: str, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, threading\n"
        f"import {module}.start as start\n"
        "threading.Timer(float(sys.argv.pop(1)), lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "start.main()\n"
    )
    for delay in (0.0, 0.01, 0.1):
        with started([sys.executable, "-c", script, str(delay), "--help"], tmp_path) as process:
            output, errors = process.communicate(timeout=60)
        assert "Traceback" not in output + errors, delay
        assert process.returncode in (0, -SIGINT, 128 + SIGINT), errors
