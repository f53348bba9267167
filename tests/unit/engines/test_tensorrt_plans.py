"""Our side of TensorRT's plans: what a key holds, what is said when it does not fit, how far a build is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.built_in import BUILT_IN
from tests.helpers.synthetic_tim import write_tim_bundle
from tmd_engines import Bundle, EngineError
from tmd_engines.command.build import write_for_trtexec
from tmd_engines.command.sizes import input_shapes, run_sizes
from tmd_engines.device.plan_cache import PlanCache
from tmd_engines.engine import BuildStep
from tmd_engines.tensorrt import library, targets
from tmd_engines.tensorrt.plans import GraphPlans
from tmd_engines.tensorrt.profile import between, contains, exactly, from_text, largest, to_text
from tmd_engines.tensorrt.progress import BuildProgress
from tmd_engines.tensorrt.settings import BuildSettings, workspace_limit

GPU = ("NVIDIA H200", "9.0")


class Library(library.TensorRt):
    """A TensorRT of which nothing is asked but its version: the cache is what is tested."""

    said = "10.3.0"

    def version(self) -> str:
        return self.said


class Rtx(library.TensorRtForRtx):
    def version(self) -> str:
        return "1.7.1.116"


class Taker:
    """Takes plans of the graph `update` of the built-in model from a cache of its own, and counts what is built."""

    def __init__(self, used: library.TensorRt) -> None:
        self.plans = GraphPlans(Bundle.open(BUILT_IN), "update", used)
        self.builds: list[Any] = []
        self.said: list[str] = []
        self.told = BuildProgress("update", lambda step: self.said.append(step.message or ""))

    def __call__(self, size: Any = (64, 64, 5), device: Any = GPU, **settings: Any) -> bytes:
        found = self.plans.in_cache(self.shapes(*size), device, BuildSettings(**settings), self.told)
        return bytes(found.content)

    def shapes(self, *size: int) -> dict[str, tuple[int, ...]]:
        bundle = Bundle.open(BUILT_IN)
        return input_shapes(bundle, "update", run_sizes(bundle, "update", *size)[0])


@pytest.fixture(params=[Library, Rtx])
def take(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Taker:
    monkeypatch.setenv("TMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tmd_engines.tensorrt.library.use", lambda used: None)
    taker = Taker(request.param())
    timing_cache = b"timing" if request.param is Library else None

    def build(model: bytes, ranges: Any, settings: Any, timing: Any, told: Any, out: Any) -> Any:
        taker.builds.append(timing)
        out.write(b"plan %d" % len(taker.builds))
        return SimpleNamespace(figures={"scratch": 5 << 20}, timing=timing_cache)

    monkeypatch.setattr(taker.plans, "build", build)
    return taker


def test_plan_is_built_once_with_the_timing_cache_of_the_one_before(take: Taker) -> None:
    assert take() == take() == b"plan 1"
    assert take((64, 64, 9)) == b"plan 2"
    assert take.builds == [None, b"timing" if isinstance(take.plans.library, Library) else None]
    assert any("5.2 MB" in said and "scratch" in said for said in take.said)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"_hashes": "ef"}, "graph: "),
        ({"precision": "fp16"}, "precision: fp32 there, fp16 here"),
        ({"settings": {"workspace": 5}}, "flags: workspace None"),
        ({"said": "10.16.1"}, "engine: tensorrt 10.3.0 there, tensorrt 10.16.1 here"),
        ({"device": ("Orin", "9.0")}, "device: NVIDIA H200 there, Orin here"),
        ({"device": ("NVIDIA H200", "8.9")}, "compute capability: 9.0 there, 8.9 here"),
    ],
)
def test_plan_for_something_else_says_which_field_differs_and_is_built_anew(
    take: Taker, changed: dict[str, Any], said: str
) -> None:
    if isinstance(take.plans.library, Rtx) and changed.keys() & {"said", "device"}:
        pytest.skip("plans of TensorRT for RTX are for every card")
    take()
    take.said.clear()
    for name in changed.keys() & {"_hashes", "precision"}:
        setattr(take.plans, name, changed[name])
    if "said" in changed:
        take.plans.library.said = changed["said"]  # type: ignore[attr-defined]
    assert take(device=changed.get("device", GPU), **changed.get("settings", {})) == b"plan 2"
    (first, *_) = take.said
    assert said in first and "building anew" in first


def test_plan_for_rtx_cards_serves_every_one_of_them(take: Taker) -> None:
    if isinstance(take.plans.library, Library):
        pytest.skip("TensorRT builds for the GPU here")
    assert take() == take(device=("NVIDIA GeForce RTX 5090", "12.0")) == b"plan 1"
    assert take(targets=("8.9", "12.0")) == b"plan 2"


def test_another_size_is_no_reason_to_complain(take: Taker) -> None:
    take()
    take.said.clear()
    take((64, 64, 9))
    assert not any("something else" in message for message in take.said)


def test_plan_for_a_range_serves_the_sizes_in_it_and_no_others(take: Taker) -> None:
    sizes = [take.shapes(*size) for size in ((64, 64, 5), (96, 64, 9), (128, 128, 17))]
    take.plans.make(between(*sizes), GPU, BuildSettings(), take.told)
    assert take((64, 64, 5)) == take((128, 96, 13)) == take((128, 128, 17)) == b"plan 1"
    assert take((160, 64, 5)) == b"plan 2"
    assert take((64, 64, 1)) == b"plan 3"


def test_ranges_are_written_and_read() -> None:
    ranges = between({"x": (1, 4), "t": ()}, {"x": (2, 4), "t": ()}, {"x": (3, 4), "t": ()})
    assert to_text(ranges) == "t , x 1x4..2x4..3x4" and from_text(to_text(ranges)) == ranges
    assert largest(ranges) == {"x": (3, 4), "t": ()}
    assert contains(ranges, {"x": (2, 4), "t": ()}) and not contains(ranges, {"x": (2, 5), "t": ()})
    assert not contains(ranges, {"x": (2, 4)}) and not contains(ranges, {"x": (2, 4, 1), "t": ()})
    with pytest.raises(ValueError):
        from_text("x 1..2")
    assert to_text(exactly({"x": (1, 4)})) == "x 1x4"


@pytest.mark.parametrize(
    ("precision", "wanted", "said"),
    [
        ("bf16", "rtx", None),
        ("fp8", "8.9,12.0", None),
        ("fp8", "rtx", "from compute capability 8.9 on: build with --for 8.9,12.0"),
        ("fp8", "8.6", "--for 8.9,12.0"),
        (
            "nvfp4",
            "8.9,12.0",
            "from compute capability 12.0 on: build with --for 12.0, or export .* fp8 .from 8.9 on. or bf16",
        ),
        ("nvfp4", "rtx", "build with --for 12.0"),
        ("nvfp4", "12.0", None),
        ("bf16", "7.5", "Turing.*no bfloat16.*in fp16"),
        ("fp16", "7.5", "Turing.*products and 3-D convolutions in float32"),
    ],
)
def test_what_a_card_cannot_compute_is_said_before_a_build(precision: str, wanted: str, said: str | None) -> None:
    import re

    reason = targets.refusal(precision, targets.parse_targets(wanted))
    assert reason is None if said is None else reason is not None and re.search(said, reason)


def test_targets_are_known_compute_capabilities() -> None:
    assert targets.parse_targets("rtx") == () and targets.to_text(()) == "rtx"
    assert targets.parse_targets("12.0, 8.9,8.9") == ("8.9", "12.0")
    with pytest.raises(EngineError, match=r"'9.0' is no compute capability .* rtx for every card from 8.0 on"):
        targets.parse_targets("8.9,9.0")
    on = {
        capability: targets.runs_on((), capability) for capability in ((7, 5), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
    }
    assert [capability for capability, runs in on.items() if not runs] == [(7, 5), (9, 0)]
    assert targets.runs_on(("8.9",), (8, 9)) and not targets.runs_on(("8.9",), (12, 0))


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
    for which, n in (("min", 1), ("opt", 2), ("max", 2)):
        assert f"--{which}Shapes=x:{n}x16x1x8x8,t:{n},r:{n},guidance:{n}x{n}," in lines["flow_head"]


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
