"""What the C++ library makes of the machine around it: its language, its quota of processors, its limits; as Python."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cpp_tools import Twin, engine_options, onnxruntime_library, program, twin
from tmd_engines.device.cpu import cores, cpu_quota, resolve_threads
from tmd_runtime.built_in import BUILT_IN

ENGINES = ["onnxruntime", "openvino"]
STILLS = BUILT_IN.parent / "tim-tiny"
LOAD, TEXT, DECODE, ENCODE = 0, 1, 5, 6  # tmd_stage


def library(engine: str) -> str:
    engine_options(engine)
    return str(onnxruntime_library()) if engine == "onnxruntime" else ""


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    """A host whose numbers have a decimal comma."""
    if shutil.which("localedef") is None:
        pytest.skip("no localedef to make a language with a decimal comma")
    folder = tmp_path_factory.mktemp("locales")
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.UTF-8"], capture_output=True)
    if not (folder / "de_DE.UTF-8").is_dir():
        pytest.skip(f"localedef cannot make de_DE here: {made.stderr.decode()[:200]}")
    host = Twin(LOCPATH=str(folder))
    assert host.ask("locale", name="de_DE.UTF-8")["ok"] == ","
    yield host
    host._process.kill()


@pytest.mark.parametrize("bundle", [BUILT_IN, STILLS], ids=["tmd", "tim"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_decimal_comma_changes_no_frame(german: Twin, engine: str, bundle: Path) -> None:
    question = {"bundle": str(bundle), "engine": engine, "library": library(engine), "prompt": "a red circle"}
    expected, found = (each.ask("run", **question, wishes={"seed": 1}) for each in (twin(), german))
    assert found["ok"] == expected["ok"] and found["times"] == expected["times"]


def test_a_decimal_comma_changes_no_text(german: Twin, tmp_path: Path) -> None:
    shutil.copytree(BUILT_IN, tmp_path / "b")
    (tmp_path / "b" / "backbone.onnx.data").write_bytes(bytes(1_234_567))
    expected, found = (each.ask("bundle", path=str(tmp_path / "b")) for each in (twin(), german))
    assert found == expected and "is 1.2 MB, the manifest says" in found["error"]


def test_compilation_counts_as_loading() -> None:
    """OpenVINO compiles for longer than it reads, and to run takes a hundredth of that."""
    for bundle, picture in ((BUILT_IN, False), (STILLS, True)):
        question = {"bundle": str(bundle), "engine": "openvino", "library": library("openvino"), "picture": picture}
        seconds = twin().ask("cold", **question)["ok"]
        assert seconds["encode"][TEXT] < seconds["encode"][LOAD] / 2, seconds
        assert seconds["decode"][DECODE] < seconds["decode"][LOAD] / 6, seconds
        if picture:
            assert seconds["encode_image"][ENCODE] < seconds["encode_image"][LOAD] / 2, seconds


V2 = {"proc/self/cgroup": "0::/jobs/one\n", "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n"}
V1 = {
    "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n1:memory:/docker/abc\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}
GROUPS: list[dict[str, str]] = [
    {},
    V2,
    V2 | {"sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n"},
    V2 | {"sys/fs/cgroup/jobs/one/cpu.max": "20000 100000\n"},
    V2 | {"sys/fs/cgroup/cpu.max": "9000000 100000\n"},
    V2 | {"sys/fs/cgroup/jobs/cpu.max": "broken\n"},
    V2 | {"sys/fs/cgroup/jobs/cpu.max": "1 0\n"},
    V2 | {"sys/fs/cgroup/jobs/cpu.max": "+150000 100000\n"},
    V2 | {"proc/self/cgroup": "0::/\n1:name=systemd:/jobs\n"},
    V1,
    V1 | {"proc/self/cgroup": "3:cpuacct,cpu:/docker/abc\n"},
    V1 | {"proc/self/cgroup": "3:cpuset:/docker/abc\n"},
    V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"},
    V1 | {"sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "1\n"},
    V1 | {"sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.max": "1000 100000\n"},
]


class Sized:
    """What `resolve_threads` sees of a bundle."""

    def __init__(self, size: int) -> None:
        self.manifest, self.files, self.size = self, {"weights": self}, size


@pytest.mark.parametrize("files", GROUPS)
def test_quota_and_threads_are_those_of_python(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for size in (64 << 20, (64 << 20) + 1):
        for wish in (None, 1, 2, 1024):
            bundle: Any = Sized(size)
            count, note = resolve_threads(bundle, wish, tmp_path)
            answer = twin().ask("threads", root=str(tmp_path), bytes=size, wish=-1 if wish is None else wish)
            assert answer["ok"] == [-1 if count is None else count, note or ""]
            assert answer["quota"] == cpu_quota(tmp_path) and answer["cores"] == cores(tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_limited_address_space_ends_in_a_sentence(tmp_path: Path, engine: str) -> None:
    """A few sizes; docs/reliability.md says which were tried by hand."""
    options = engine_options(engine)
    for megabytes in (45, 70, 110, 250, 700):

        def limit(bytes_: int = megabytes * 1_000_000) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        words = [program("tmd_generate"), BUILT_IN, "x", tmp_path / "v.rgb", "--frames", 1, "--size", "32x32", *options]
        run = subprocess.run([str(word) for word in words], capture_output=True, text=True, preexec_fn=limit)
        if run.returncode == 0 or "cannot allocate memory for thread-local data" in run.stderr:
            continue  # the latter is the C library's own end, in a thread that an engine starts
        assert run.returncode == 1, (megabytes, run.returncode, run.stderr[-500:])
        (sentence,) = [line for line in run.stderr.splitlines() if line.startswith("TMD_ERROR_")]
        assert f"The address space of this process is limited to {megabytes} MB (ulimit -v)" in sentence
