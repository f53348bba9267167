"""The TensorRT backend against NVIDIA's own bindings: of TensorRT in three versions, of TensorRT for RTX, and of CUDA.

What this proves: every name exists, every call fits its signature, and a library that does not start is one sentence.
That graphs build is shown by `test_tensorrt_builds.py`; that they compute the right thing, only by a GPU.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tensorrt_bindings import WHEELS, environment, prepare, prepare_rtx
from tmd_engines.device.gpu import has_gpu

ROOT = Path(__file__).parents[3]
ENGINES = ROOT / "engines"
BACKEND = ENGINES / "tmd_engines/tensorrt"
MODULES = ("library", "log", "build", "run", "streaming")  # those that call a library
STREAMING_SINCE = (11, 0)
CUDA = ENGINES / "tmd_engines/device/cuda.py"
QUICK = ("10.3.0", "11.4.0.106")
RTX = "rtx"


def folder_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = getattr(request.config, "cache", None)
    return Path(cache.mkdir("tensorrt-bindings-2") if cache is not None else tmp_path_factory.mktemp("bindings"))


@pytest.fixture(
    scope="module", params=[pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in WHEELS]
)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(request.param, folder_of(request, tmp_path_factory))


@pytest.fixture(
    scope="module",
    params=[*(pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in WHEELS), RTX],
)
def typed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A folder with type stubs, and the modules that must fit them."""
    folder = folder_of(request, tmp_path_factory)
    if request.param == RTX:
        return prepare_rtx(folder), MODULES
    major, minor = (int(part) for part in request.param.split(".")[:2])
    return prepare(request.param, folder), MODULES if (major, minor) >= STREAMING_SINCE else MODULES[:-1]


def names_below(root: str, file: Path) -> set[str]:
    """Every `root.a.b` that a module says, without the root, found in its syntax tree."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id == root:
            found.add(".".join(reversed(parts)))
    return found


def run(bindings: Path, code: str) -> str:
    """What a process with the bindings prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(bindings, ENGINES), timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_of_the_backend_is_in_the_bindings(bindings: Path) -> None:
    old = bindings.name.split("-")[3].startswith("10")
    files = [BACKEND / f"{name}.py" for name in MODULES if not (old and name == "streaming")]
    names = set[str]().union(*(names_below("trt", file) for file in files))
    assert {"Builder", "OnnxParser", "BuilderFlag.TF32", "Runtime"} <= names and len(names) > 12
    code = (
        "import operator, tensorrt\n"
        f"for name in {sorted(names - {'IStreamWriter'} if old else names)!r}:\n"
        "    try: operator.attrgetter(name)(tensorrt)\n"
        "    except AttributeError as error: print(error)\n"
    )
    said = run(bindings, code)
    assert said == "" or (old and "load_initializer" in said)


def test_every_name_that_is_asked_of_tensorrt_for_rtx_is_there() -> None:
    rtx = importlib.import_module("tensorrt_rtx")
    names = set[str]().union(*(names_below("trt", BACKEND / f"{name}.py") for name in MODULES))
    ours = names_below("rtx", BACKEND / "library.py")
    assert {"BuilderFlag.REQUIRE_USER_ALLOCATION", "ComputeCapability"} <= ours
    for name in names | ours:
        found: Any = rtx
        for part in name.split("."):
            found = getattr(found, part)


def test_backend_runs_as_far_as_it_can_without_the_library(bindings: Path) -> None:
    """The real classes take our subclasses, and a library that gives nothing is an error in one sentence."""
    code = """
from tmd_engines import EngineError
from tmd_engines.tensorrt.library import FOR_RTX, TENSORRT, use
from tmd_engines.tensorrt.progress import BuildProgress
use(TENSORRT)
from tmd_engines.tensorrt import build, run
from tmd_engines.tensorrt.log import Log
import tensorrt as trt
print(TENSORRT.operators(), TENSORRT.version())
log = Log()
log.log(trt.ILogger.Severity.INFO, "Max Scratch Memory: 12 bytes")
log.log(trt.ILogger.Severity.ERROR, "no\\n  driver")
print(log.reason(), "|", log.reason(), "|", log.figures)
told = []
monitor = build._Monitor(BuildProgress("backbone", told.append))
monitor.phase_start("all", "", 2)
print(monitor.step_complete("all", 0), told[0].fraction)
for call in (lambda: build.new_builder(log), lambda: run.LoadedPlan(b""), lambda: use(FOR_RTX)):
    try: call()
    except EngineError as error: print("ERROR", error)
print(trt.Dims([1, 2, 3])[2], 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) > 0)
"""
    first, said, step, *errors, last = run(bindings, code).splitlines()
    version = bindings.name.split("-")[3]
    major, minor = version.split(".")[:2]
    assert first == f"({major}, {minor}) {version}"
    assert said == "no driver | it gave no reason | {'scratch': 12}" and step == "True 0.5" and last == "3 True"
    assert len(errors) == 3 and all(f"TensorRT {version} does not start" in error for error in errors[:2])
    assert "one process uses one TensorRT" in errors[2]


def test_tensorrt_for_rtx_says_why_it_cannot_run_a_plan_here() -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    code = """
from tmd_engines import EngineError
from tmd_engines.tensorrt.library import FOR_RTX, use
use(FOR_RTX)
from tmd_engines.tensorrt.run import LoadedPlan
try: LoadedPlan(b"no plan")
except EngineError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"TensorRT for RTX 1\.\S+ refuses the plan: .*\n", done.stdout), done.stdout


# module -> what a backend must not say, and for which bindings it is wrong
PLANTED: dict[str, dict[str, list[tuple[str, tuple[str, ...]]]]] = {
    "build": {
        "config.clear_flag(trt.BuilderFlag.TF32)": [
            ("config.set_flag(trt.BuilderFlag.FP16)", ("11", RTX)),
            ("config.int8_calibrator = 1", ("10", "11", RTX)),
            ("config.max_workspace_size = 1", ("10", "11", RTX)),
            ("config.set_flag('fp16')", ("10", "11", RTX)),
        ],
    },
    "run": {
        "self._context.execute_async_v3(stream)": [
            ("self._context.execute_async_v2(stream)", ("10", "11", RTX)),
            ("self._context.execute_async_v3()", ("10", "11", RTX)),
        ],
        "self._context.set_device_memory(address, size)": [
            ("self._context.set_device_memory(address)", ("10", "11", RTX))
        ],
    },
    "library": {
        "made.is_stream_capturable(stream)": [("made.is_stream_capturable()", ("10", "11", RTX))],
        "configuration.num_compute_capabilities = len": [
            ("configuration.compute_capabilities = len", ("10", "11", RTX))
        ],
        "rtx.CudaGraphStrategy.DISABLED": [("rtx.CudaGraphStrategy.OFF", ("10", "11", RTX))],
    },
}


def types(stubs: Path, cache: Path, folder: Path) -> str:
    """What mypy says in strict mode of the modules in `folder`, with the types of these bindings."""
    config = folder / "mypy.ini"
    config.write_text(
        f"[mypy]\nstrict = True\nmypy_path = {stubs}:{ENGINES}\nfollow_imports = silent\n"
        f"cache_dir = {cache}\n"
        "[mypy-tensorrt.*,tensorrt_rtx.*]\nignore_errors = True\n"
        "[mypy-numpy.*,onnx.*,pydantic.*]\nfollow_imports = skip\n"  # half of the time, and nothing to do with this
    )
    files = [str(path) for path in sorted(folder.glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", config, *files], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode in (0, 1) and not done.stderr, done.stdout + done.stderr
    return done.stdout


def test_backend_fits_the_types_of_the_bindings_and_what_is_planted_does_not(
    typed: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    folder, modules = typed
    which = RTX if folder.name.startswith(RTX) else folder.name.split("-")[3].partition(".")[0]
    wrong: set[str] = set()
    for module in modules:
        source = (BACKEND / f"{module}.py").read_text()
        source = re.sub(r"^( *)from \.(?!\.)", r"\1from tmd_engines.tensorrt.", source, flags=re.M)
        source = re.sub(r"^( *)from \.\.", r"\1from tmd_engines.", source, flags=re.M)
        (tmp_path / f"as_it_is_{module}.py").write_text(source)
        for place, changes in PLANTED.get(module, {}).items():
            assert place in source
            for number, (change, where) in enumerate(changes):
                name = f"planted_{module}_{len(wrong)}_{number}.py"
                (tmp_path / name).write_text(source.replace(place, change))
                if which in where:
                    wrong.add(name)
    said = types(folder / "stubs", folder / "mypy", tmp_path)
    found = {line.partition(":")[0] for line in said.splitlines() if ": error:" in line}
    assert found == wrong, said


def test_code_from_a_plan_is_never_allowed() -> None:
    for file in (ENGINES / "tmd_engines").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr == "engine_host_code_allowed"), file
            assert not (isinstance(node, ast.Attribute) and node.attr == "VERSION_COMPATIBLE"), file


# CUDA's bindings are compiled code as well, and import without a driver.


def cudart() -> Any:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed: pip install cuda-bindings")
    return importlib.import_module("cuda.bindings.runtime")


def test_every_cuda_name_is_in_the_bindings() -> None:
    names = names_below("cudart", CUDA)
    assert {"cudaMalloc", "cudaGraphInstantiate", "cudaError_t.cudaSuccess"} <= names
    for name in names:
        found: Any = cudart()
        for part in name.split("."):
            found = getattr(found, part)


def test_every_cuda_call_has_as_many_arguments_as_the_function() -> None:
    """The bindings state their signatures in the first line of each docstring."""
    checked = 0
    for node in ast.walk(ast.parse(CUDA.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "cudart":
            signature = getattr(cudart(), node.func.attr).__doc__.strip().splitlines()[0]
            wanted = re.fullmatch(r"\w+\((.*)\)", signature)
            assert wanted, signature
            assert len(node.args) == len([part for part in wanted[1].split(",") if part.strip()]), signature
            checked += 1
    assert checked > 10


def test_machine_without_a_gpu_is_one_sentence() -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    cudart()
    from tmd_engines import EngineError
    from tmd_engines.device import cuda

    with pytest.raises(EngineError, match=r"CUDA failed: .*\(cudaError.*doctor") as caught:
        cuda.device()
    assert "\n" not in str(caught.value)
