"""NVIDIA's real TensorRT for RTX, called through the C++ library: that of the Python package, without a GPU.

It takes the library's headers when the C++ library is built, and the package `tensorrt_rtx`. Without a driver it can
say no to every plan; why, it says through C++ in the same words as through Python.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.helpers.cpp_tools import ask_rtx, onnxruntime_library, program, twin
from tmd_engines import Bundle, EngineError
from tmd_engines.command.sizes import Sizes, plan_shapes
from tmd_engines.tensorrt.folder import PlanFolderWriter
from tmd_engines.tensorrt.library import FOR_RTX
from tmd_engines.tensorrt.plans import GraphPlans
from tmd_engines.tensorrt.profile import between, largest
from tmd_engines.tensorrt.progress import BuildProgress
from tmd_engines.tensorrt.settings import BuildSettings
from tmd_runtime.built_in import BUILT_IN

GRAPH, SMALL = "update", (32, 32, 1)


def is_built_in() -> bool:
    return "tensorrt-rtx" in twin().ask("build_info")["ok"]


@pytest.fixture(scope="module")
def library() -> Path:
    """The shared library inside the Python package."""
    if not is_built_in():
        pytest.skip("the C++ library was built without the headers of TensorRT for RTX (TMD_TENSORRT_RTX_INCLUDE)")
    pytest.importorskip("tensorrt_rtx", reason="pip install '.[rtx]' brings the library")
    package = pytest.importorskip("tensorrt_rtx_libs", reason="this package of TensorRT for RTX has no libraries")
    return next(Path(package.__file__).parent.glob("libtensorrt_rtx.so.*"))


@pytest.fixture(scope="module")
def folder(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plan of one small graph, built by NVIDIA's builder as `tmd-engine build --out` does it."""
    bundle, path = Bundle.open(BUILT_IN), tmp_path_factory.mktemp("rtx") / "plans"
    plans, settings = GraphPlans(bundle, GRAPH, FOR_RTX), BuildSettings()
    ranges = between(*plan_shapes(bundle, GRAPH, Sizes(SMALL, SMALL, SMALL))[0])

    def build(out: BinaryIO) -> tuple[dict[str, str], dict[str, int]]:
        model = plans.lowered(largest(ranges))
        built = plans.build(model, ranges, settings, None, BuildProgress(GRAPH, None), out)
        return plans.key(model, ranges, ("any", ""), settings), built.figures

    with PlanFolderWriter(path) as writer:
        writer.add(f"{GRAPH}.plan", build)
    return path


def ask(library: Path, plan: Path) -> tuple[str, str]:
    """The library's version, and what it says of the plan through C++."""
    run = subprocess.run([ask_rtx(), library, plan], capture_output=True, text=True, check=True)
    version, answer = run.stdout.splitlines()
    return version, answer


def ask_python(plan: Path) -> str:
    from tmd_engines.tensorrt.run import LoadedPlan

    try:
        LoadedPlan(plan.read_bytes())
    except EngineError as error:
        return str(error)
    return "taken"


def test_the_library_tells_cpp_what_it_tells_python(library: Path, folder: Path) -> None:
    version, answer = ask(library, folder / f"{GRAPH}.plan")
    assert version == FOR_RTX.version()
    assert answer == ask_python(folder / f"{GRAPH}.plan")
    assert answer == "taken" or answer.startswith(f"TensorRT for RTX {version} refuses the plan: ")


def test_a_plan_that_is_none_is_refused_with_the_reason(library: Path, folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.plan"
    content = (folder / f"{GRAPH}.plan").read_bytes()
    for wrong in (content[::-1], b"\0" * len(content), content[:100][::-1] + content[100:]):
        damaged.write_bytes(wrong)
        version, answer = ask(library, damaged)
        assert answer == ask_python(damaged) == f"TensorRT for RTX {version} refuses the plan: it is damaged."


def test_the_key_that_cpp_wants_is_that_of_the_plan_that_was_built(library: Path, folder: Path) -> None:
    version, _ = ask(library, folder / f"{GRAPH}.plan")
    shapes = plan_shapes(Bundle.open(BUILT_IN), GRAPH, Sizes(SMALL, SMALL, SMALL))[0][0]
    wanted = twin().ask(
        "plan_key",
        bundle=str(BUILT_IN),
        graph=GRAPH,
        shapes=shapes,
        engine="tensorrt-rtx",
        version=version,
        device="any",
        capability="rtx",
        streaming=False,
    )["ok"]
    found = twin().ask("plan_in_folder", folder=str(folder), key=wanted, gpu=[8, 9])
    assert {name: value for name, value in found["key"].items() if name != "lowered"} == wanted
    turing = twin().ask("plan_in_folder", folder=str(folder), key=wanted, gpu=[7, 5])
    assert "(compute capability: rtx there, 7.5 here)" in turing["error"]


def generate(tmp_path: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [program("tmd_generate"), BUILT_IN, "a red circle", tmp_path / "out.rgb", "--seed", "1", *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def test_opening_the_engine_says_what_is_missing_here(library: Path, folder: Path, tmp_path: Path) -> None:
    run = generate(tmp_path, "--engine", "tensorrt-rtx", "--engine-library", library, "--plans", tmp_path)
    assert run.returncode == 1 and f"{tmp_path} is not a folder of plans (" in run.stderr
    run = generate(
        tmp_path, "--engine", "tensorrt-rtx", "--engine-library", library, "--plans", folder, "--plan-cache", tmp_path
    )
    assert run.returncode == 1
    # Without CUDA, without a driver, and with both: the plans of the other graphs.
    reasons = (
        "The CUDA runtime cannot be loaded (",
        "CUDA finds no GPU: ",
        f"{folder} has no plan of tiny text_encoder",
    )
    assert any(reason in run.stderr for reason in reasons), run.stderr


def test_an_engine_without_plans_says_so(tmp_path: Path) -> None:
    if "onnxruntime" not in twin().ask("build_info")["ok"]:
        pytest.skip("the C++ library was built without ONNX Runtime's header")
    run = generate(tmp_path, "--engine", "onnxruntime", "--engine-library", onnxruntime_library(), "--plans", tmp_path)
    assert run.returncode == 2 and "the engine onnxruntime takes no plans: leave them out" in run.stderr
