"""Our side of TensorRT's plans: what a key holds, what is said when it does not fit, how far a build is."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.synthetic_tim import write_tim_bundle
from tmd_engines import Bundle, EngineError
from tmd_engines.command.build import run_sizes, write_for_trtexec
from tmd_engines.device.plan_cache import PlanCache
from tmd_engines.engine import BuildStep
from tmd_engines.tensorrt.engine import _cached_plan, plan_key, workspace_limit
from tmd_engines.tensorrt.progress import BuildProgress

SHAPES = {"x": (1, 16, 21, 60, 104)}


class Gpu(NamedTuple):
    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True)
class Settings:
    text: str = "workspace None"

    def flags(self) -> str:
        return self.text


class Library:
    """Counts builds and takes every plan but one: the cache is what is tested, not TensorRT."""

    def __init__(self) -> None:
        self.builds: list[Any] = []
        self.refused = b""

    def build(self, content: bytes, path: str, shapes: Any, settings: Any, timing: bytes | None, told: Any) -> Any:
        self.builds.append(timing)
        return b"plan %d" % len(self.builds), b"timing"

    def Plan(self, content: bytes, shapes: Any) -> bytes:
        if content == self.refused:
            raise EngineError("TensorRT refuses the plan: magic tag does not match.")
        return content


def key(**changed: Any) -> dict[str, str]:
    given = {
        "title": "wan1.3b backbone", "hashes": "ab cd", "model": b"graph", "version": "10.3.0", "device": Gpu(),
        "precision": "bf16", "shapes": SHAPES, "settings": Settings(),
    }  # fmt: skip
    return plan_key(**(given | changed))


@pytest.fixture
def take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TMD_CACHE", str(tmp_path / "cache"))
    library, said = Library(), []

    def take(**changed: Any) -> bytes:
        told = BuildProgress("backbone", lambda step: said.append(step.message))
        plan: bytes = _cached_plan(library, key(**changed), b"", "backbone.onnx", SHAPES, Settings(), told)  # type: ignore[arg-type]
        return plan

    take.library, take.said = library, said  # type: ignore[attr-defined]
    return take


def test_plan_is_built_once_with_the_timing_cache_of_the_one_before(take: Any) -> None:
    assert take() == take() == b"plan 1"
    assert take(hashes="ef") == b"plan 2"
    assert take.library.builds == [None, b"timing"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hashes": "ef"}, "graph: ab cd there, ef here"),
        ({"version": "10.16.1"}, "engine: tensorrt 10.3.0 there, tensorrt 10.16.1 here"),
        ({"device": Gpu("Orin")}, "device: NVIDIA H200 there, Orin here"),
        ({"device": Gpu(capability=(8, 9))}, "compute capability: 9.0 there, 8.9 here"),
        ({"precision": "fp16"}, "precision: bf16 there, fp16 here"),
        ({"settings": Settings("workspace 5")}, "flags: workspace None there, workspace 5 here"),
        ({"model": b"other"}, "lowered: "),
    ],
)
def test_plan_for_something_else_says_which_field_differs_and_is_built_anew(
    take: Any, changed: dict[str, Any], said: str
) -> None:
    take()
    take.said.clear()
    assert take(**changed) == b"plan 2"
    (first, *_) = take.said
    assert said in first and "building anew" in first


def test_another_size_is_no_reason_to_complain(take: Any) -> None:
    take()
    take.said.clear()
    take(shapes={"x": (1, 16, 5, 8, 8)})
    assert not any("something else" in message for message in take.said)


def test_plan_that_tensorrt_refuses_is_built_anew(take: Any) -> None:
    take()
    take.library.refused = b"plan 1"
    assert take() == b"plan 2"
    assert any("does not load" in message and "magic tag" in message for message in take.said)


def test_second_process_waits_for_the_plan_that_the_first_one_makes(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    code = (
        "import sys, pathlib\n"
        "from tmd_engines.device.plan_cache import PlanCache\n"
        "plans = PlanCache(pathlib.Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "with plans.locked({'a': '1'}): print(plans.load({'a': '1'}))\n"
    )
    plans = PlanCache(folder)
    with plans.locked({"a": "1"}), plans.locked({"a": "2"}):
        other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
        plans.store({"a": "1"}, b"made by the first")
    assert other.communicate(timeout=20)[0] == "b'made by the first'\n"


def test_a_transition_model_is_compiled_for_steps_with_guidance_too_and_for_tiles(tmp_path: Path) -> None:
    """Its flow head has one row in the first step, and two in the others; a large still is decoded in tiles."""
    plain, guided = (
        Bundle.open(write_tim_bundle(tmp_path / f"{guidance}", guidance=guidance, pictures=True)) for guidance in (1, 3)
    )
    for bundle, rows in ((plain, [1]), (guided, [1, 2])):
        for graph in ("backbone", "flow_head"):
            assert [sizes["batch"] for sizes in run_sizes(bundle, graph, 2048, 1024, 1)] == rows
        for graph in ("encoder", "decoder_first"):
            (sizes,) = run_sizes(bundle, graph, 2048, 1024, 1)
            assert (sizes["batch"], sizes["height"], sizes["width"]) == (1, 128, 128)
        assert len(run_sizes(bundle, "text_encoder", 2048, 1024, 1)) == 1
    lines = {graph: line for graph, line, _ in write_for_trtexec(guided, tmp_path / "trt", (10, 3), (64, 64, 1))}
    for which, rows in (("min", 1), ("opt", 2), ("max", 2)):
        assert f"--{which}Shapes=x:{rows}x16x1x8x8,t:{rows},r:{rows},guidance:{rows}x{rows}," in lines["flow_head"]


def test_progress_counts_phases_inside_phases_and_never_goes_back() -> None:
    now = [0.0]
    told: list[BuildStep] = []
    progress = BuildProgress("backbone", told.append, lambda: now[0])
    progress.phase_start("all", None, 4)
    for step in range(2):
        progress.phase_start("part", "all", 2)
        now[0] += 5
        progress.step_complete("part", 0)
        progress.phase_finish("part")
        now[0] += 5
        progress.step_complete("all", step)
    assert [step.fraction for step in told] == [0.125, 0.25, 0.375, 0.5]
    assert [step.left for step in told] == pytest.approx([35, 30, 25, 20])
    progress.phase_finish("all")
    progress.phase_start("again", None, 10)
    progress.step_complete("again", 0)
    assert told[-1].fraction == 0.5


def test_callback_that_raises_ends_the_build() -> None:
    def stop(_: BuildStep) -> None:
        raise KeyboardInterrupt

    progress = BuildProgress("backbone", stop)
    progress.phase_start("all", None, 4)
    assert progress.step_complete("all", 0) is False and progress.step_complete("all", 1) is False
    assert isinstance(progress.stopped, KeyboardInterrupt)


@pytest.mark.parametrize("wrong", ["4G", "0", "-1", "²"])
def test_workspace_is_a_number_of_mebibytes(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("TMD_TENSORRT_WORKSPACE", "4096")
    assert workspace_limit() == 4 << 30
    monkeypatch.setenv("TMD_TENSORRT_WORKSPACE", wrong)
    with pytest.raises(EngineError, match=r"TMD_TENSORRT_WORKSPACE is .*whole number of MiB"):
        workspace_limit()


def test_a_process_has_one_gpu_and_only_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules alone: two GPUs that are asked for nothing."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-bindings here")
    from tmd_engines.device import cuda

    monkeypatch.setattr(cuda, "_used", None)
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (runtime.cudaError_t.cudaSuccess, 2))
    with pytest.raises(EngineError, match=r"no cuda:2 here, only cuda:0, cuda:1"):
        cuda.use(2)
    cuda.use(1)
    cuda.use(1)
    with pytest.raises(EngineError, match=r"uses cuda:1, and one process uses one GPU"):
        cuda.use(0)
