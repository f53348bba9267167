"""The C++ library for tests: built once, and asked about its inside through its twin program.

`TMD_CPP_BUILD` names a build folder that is there already (`runtime/cpp/ci.sh` sets it, and then nothing is skipped,
except an engine whose header could not be had).
Without it the programs are built into `build/cpp`; a machine without compiler, CMake or the libraries skips the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tmd_runtime.built_in import BUILT_IN

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "runtime" / "cpp"
PROGRAMS = {"tmd_twin": "tests/tmd_twin", "tmd_generate": "examples/tmd_generate"}


@cache
def program(name: str) -> Path:
    """Path of one of `PROGRAMS`, built if need be. Skips the test that asks if this machine cannot build it."""
    named = os.environ.get("TMD_CPP_BUILD")
    if named:
        found = Path(named) / PROGRAMS[name]
        assert found.exists(), f"TMD_CPP_BUILD is set, and there is no {found}"
        return found
    if shutil.which("cmake") is None or (shutil.which("c++") is None and "CXX" not in os.environ):
        pytest.skip("no C++ toolchain: cmake and a compiler are needed")
    build = ROOT / "build" / "cpp"
    configured = _run("cmake", "-S", SOURCES, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *_openvino())
    if configured.returncode:
        pytest.skip(f"the C++ library cannot be configured here: {configured.stderr.strip()[-300:]}")
    built = _run("cmake", "--build", build, "--target", *PROGRAMS)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return build / PROGRAMS[name]


def ask_rtx() -> Path:
    """The program beside the twin that asks TensorRT for RTX of a plan; there where its headers were."""
    return program("tmd_twin").with_name("tmd_ask_rtx")


def engine_options(engine: str) -> list[str]:
    """Options of `tmd_generate` that choose `engine`, from the library that Python uses. Skips the test without one."""
    built = twin().ask("build_info")["ok"]
    if engine not in built:
        pytest.skip(f"the C++ library was built without the headers of {engine}: {built}")
    pytest.importorskip(engine, reason=f"the library of {engine} comes with its Python package")
    return ["--engine", engine, *(["--engine-library", str(onnxruntime_library())] if engine == "onnxruntime" else [])]


def in_cpp(out: Path, prompt: str, engine: str, *options: object, bundle: Path = BUILT_IN) -> NDArray[np.uint8]:
    """The bytes of the frames that `tmd_generate` writes to `out`, on one thread. Skips the test without `engine`."""
    words = [program("tmd_generate"), bundle, prompt, out, "--threads", 1, *engine_options(engine), *options]
    run = _run(*words)
    assert run.returncode == 0, run.stderr
    return np.fromfile(out, np.uint8)


def onnxruntime_library() -> Path:
    """ONNX Runtime's shared library inside its Python package."""
    import onnxruntime

    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


def _openvino() -> list[str]:
    try:
        import openvino
    except ImportError:
        return []
    return [f"-DOpenVINO_DIR={Path(openvino.__file__).parent / 'cmake'}"]


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


class Twin:
    """`runtime/cpp/tests/twin.cpp` at the other end of two pipes."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [program("tmd_twin")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **environment},
        )
        self.pid = self._process.pid

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """The answer: "ok" and more, or "status" (a tmd_status) and "error"."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **question}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the twin ended with {self._process.wait()} at {do} {question}"
        answer: dict[str, Any] = json.loads(line)
        return answer


@cache
def twin() -> Twin:
    """One twin for all tests of a session."""
    return Twin()


def ask_bundle(do: str, bundle: Path, engine: str, **more: Any) -> dict[str, Any]:
    """A question about a bundle on an engine."""
    library = str(onnxruntime_library()) if engine == "onnxruntime" else ""
    return twin().ask(do, bundle=str(bundle), engine=engine, library=library, **more)


def pixels(hexed: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Frames as the twin writes them."""
    return np.frombuffer(bytes.fromhex(hexed), np.uint8).reshape(shape)


# tmd_status
USAGE, BUNDLE, RUN = 1, 2, 4
