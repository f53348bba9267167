"""A signal ends a run within half a second, whatever it is doing, and leaves no file behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.helpers.processes import PROGRAM, with_default_signals
from tmd_engines import EngineError
from tmd_engines.device.running import RUNNING, interruptible, stop_step

LONG = ["--prompt", "x", "--size", "512x512", "--frames", "81", "--seed", "1", "--memory", "all"]
HALF = 0.5
SLACK = 1.0  # of a machine that does other things as well


class Endless:
    """A step that stops when it is told to, as engines do."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def __call__(self) -> None:
        RUNNING[threading.get_ident()] = self
        try:
            if self._stop.wait(20):
                raise EngineError("stopped")
        finally:
            del RUNNING[threading.get_ident()]

    def stop(self) -> None:
        self._stop.set()


def big_session(engine: str):  # a step of either engine over one graph
    side = 1536
    nodes, last = [], "x"
    for k in range(60):
        nodes += [helper.make_node("MatMul", [last, "w"], [f"a{k}"]), helper.make_node("Tanh", [f"a{k}"], [f"b{k}"])]
        last = f"b{k}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in "xwy"]
    graph = helper.make_graph(nodes, "g", info[:2], info[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    arrays = {name: np.full((side, side), 1e-3, np.float32) for name in "xwy"}
    if engine == "onnxruntime":
        import onnxruntime

        from tmd_engines.onnxruntime.engine import _BoundStep

        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name in "xw":
            binding.bind_input(name, "cpu", 0, np.float32, [side, side], arrays[name].ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, [side, side], arrays["y"].ctypes.data)
        return _BoundStep("g", session, binding, onnxruntime.RunOptions(), (arrays, session))
    import openvino

    from tmd_engines.openvino.engine import _BoundStep as OpenVinoStep

    compiled = openvino.Core().compile_model(openvino.Core().read_model(model.SerializeToString()), "CPU")
    request = compiled.create_infer_request()
    for name in "xwy":
        request.set_tensor(name, openvino.Tensor(arrays[name], shared_memory=True))
    return OpenVinoStep("g", request, (arrays, compiled))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_another_thread_stops_a_running_graph_and_it_runs_again(engine: str) -> None:
    step = big_session(engine)
    start = time.perf_counter()
    step()
    whole = time.perf_counter() - start
    me = threading.get_ident()
    timer = threading.Timer(whole / 8, lambda: stop_step(me))
    timer.start()
    start = time.perf_counter()
    with pytest.raises(EngineError, match="Graph g was stopped"):
        step()
    assert time.perf_counter() - start < whole / 2
    step()  # a stop that is over stops nothing
    stop_step(me)
    step()


def test_ctrl_c_in_a_program_of_ones_own_stops_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        start = time.perf_counter()
        with pytest.raises((KeyboardInterrupt, EngineError)), interruptible():
            big_session("onnxruntime")()
            Endless()()
        assert time.perf_counter() - start < 15
        assert signal.set_wakeup_fd(-1) == -1, "the descriptor was given back"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_host_with_its_own_handling_of_signals_keeps_it() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with interruptible():
            assert signal.set_wakeup_fd(writer) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def start_long(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`tmd-run` in the midst of minutes of work."""
    process = subprocess.Popen(
        [*PROGRAM, *LONG, "--out", "v.mp4", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=with_default_signals,
    )  # fmt: skip
    assert process.stderr is not None
    while not process.stderr.readline().startswith("tmd-run: text"):
        assert process.poll() is None
    time.sleep(1.0)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_signal_ends_a_process_in_a_graph(tmp_path: Path, number: signal.Signals, engine: str) -> None:
    process = start_long(tmp_path, "--engine", engine)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    start = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < HALF + SLACK
    assert process.returncode == 128 + number and list(tmp_path.iterdir()) == []
    assert "Traceback" not in output + errors


def test_json_says_that_a_run_was_stopped(tmp_path: Path) -> None:
    process = start_long(tmp_path, "--json")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and '"error": "stopped."' in output


def test_a_second_ctrl_c_ends_a_process_that_does_not_unwind(tmp_path: Path) -> None:
    script = (
        "import time, sys\n"
        "from tmd_engines.command.signals import Ending\n"
        "ending = Ending()\n"
        "ending.patient = True\n"
        "word = 'ready'\n"
        "while True:\n"
        "    try:\n"
        "        print(word, flush=True)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        word = 'again'\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, preexec_fn=with_default_signals
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "again\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_what_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    script = (
        "import signal\n"
        "from tmd_engines.command.signals import Ending\n"
        "Ending()\n"
        "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)\n"
    )

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=nohup)
    assert done.stdout == "True\n"


def test_after_kill_9_the_next_run_removes_what_was_left_and_says_so(tmp_path: Path) -> None:
    process = start_long(tmp_path)
    process.kill()
    process.communicate()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".tmd-")
    arguments = ["--prompt", "x", "--out", "w.png", "--frames", "1", "--size", "32x32"]
    done = subprocess.run([*PROGRAM, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "a run that was killed had left unfinished: " + left[0] in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.png"]


def test_the_start_of_the_program_prints_no_traceback() -> None:
    """From the first line of ours on; what comes before is Python's own start."""
    script = (
        "import os, signal, sys, time, threading\n"
        "import tmd_runtime.command.start as start\n"
        "threading.Timer(float(sys.argv.pop(1)), lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "start.main()\n"
    )
    for delay in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2):
        done = subprocess.run(
            [sys.executable, "-c", script, str(delay), "--prompt", "x", "--out", "/nowhere/v.mp4"],
            capture_output=True, text=True, timeout=60, preexec_fn=with_default_signals,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, delay
        assert done.returncode in (-signal.SIGINT, 130, 1)
