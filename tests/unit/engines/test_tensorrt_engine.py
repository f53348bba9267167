"""The engines tensorrt and tensorrt-rtx around their plans, on a stand-in for NVIDIA's libraries and GPU.

The calls themselves are held to NVIDIA's bindings by `test_tensorrt_contract.py`. Here it is who makes them, and when:
scratch memory, compiled kernels, recordings, plans made ahead of time, and which card gets which engine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.helpers.built_in import BUILT_IN
from tmd_engines import Bundle, EngineError, load, registry
from tmd_engines.command.plan_folder import build_plans
from tmd_engines.command.sizes import Sizes, run_sizes
from tmd_engines.device.array import DeviceArray
from tmd_engines.engine import BuildStep
from tmd_engines.registry import choose
from tmd_engines.tensorrt import engine as module
from tmd_engines.tensorrt import library
from tmd_engines.tensorrt.folder import PlanFolder
from tmd_engines.tensorrt.plans import GraphPlans, open_cache

SMALL, LARGE = (64, 64, 5), (128, 64, 9)
DECODERS = ("decoder_first", "decoder_step")


class Gpu(NamedTuple):
    name: str = "NVIDIA GeForce RTX 4090"
    capability: tuple[int, int] = (8, 9)
    memory: int = 24 << 30


class Array(DeviceArray):
    """Memory of the stand-in: an address and no more."""

    made = 1 << 20
    free = 1 << 40

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(shape, dtype)
        if self.nbytes > Array.free:
            raise EngineError("out of memory")
        Array.made += self.nbytes + 256
        self._address = Array.made - self.nbytes

    @property
    def address(self) -> int:
        return self._address

    def write(self, values: np.ndarray) -> None: ...

    def read(self) -> np.ndarray:
        return np.zeros(self.shape, self.dtype)

    def copy_from(self, other: DeviceArray) -> None: ...


class Stream:
    handle = 7
    recording = False

    def __init__(self) -> None:
        self.recorded = 0

    def wait(self) -> None: ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recording = True
        try:
            work()
        finally:
            self.recording = False
        self.recorded += 1
        return lambda: None


class World:
    """What happens: plans built, loaded and run, and what was said."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu, self.stream = Gpu(), Stream()
        self.built: list[str] = []
        self.loaded: list[bytes] = []
        self.runs: list[tuple[str, int, int]] = []  # plan, address and size of its scratch memory
        self.kernels: list[bytes | None] = []
        self.said: list[str] = []
        self.not_recordable: str | None = None
        self.no_memory = False  # for another execution context
        monkeypatch.setenv("TMD_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("tmd_engines.tensorrt.library.use", lambda used: None)
        monkeypatch.setattr(module, "use", lambda used: None)
        monkeypatch.setattr(library.TensorRt, "version", lambda self: "11.4.0")
        monkeypatch.setattr(library.TensorRtForRtx, "version", lambda self: "1.7.1")
        for place in (module, registry):
            monkeypatch.setattr(place, "has_gpu", lambda: True)
        monkeypatch.setattr(module.TensorRtEngine, "is_here", classmethod(lambda cls: cls.package in self.installed))
        self.installed = {"tensorrt", "tensorrt_rtx"}
        cuda = SimpleNamespace(
            use=lambda number: None,
            device=lambda: self.gpu,
            stream=lambda: self.stream,
            CudaArray=Array,
            capability_of=lambda number: self.gpu.capability,
        )
        monkeypatch.setattr(module, "import_cuda", lambda: cuda)
        monkeypatch.setattr(GraphPlans, "build", self.build)
        run = ModuleType("tmd_engines.tensorrt.run")
        run.LoadedPlan, run.Plan = self.load_plan, lambda *given: Plan(self, *given)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tmd_engines.tensorrt.run", run)
        module.scratch.cache_clear()

    def build(self, model: bytes, ranges: Any, settings: Any, timing: Any, told: Any, out: Any) -> Any:
        name = f"plan {len(self.built)} {max(np.prod(sizes[2]) for sizes in ranges.values())}"
        self.built.append(name)
        out.write(name.encode())
        return SimpleNamespace(figures={"scratch": int(name.split()[2]), "weights": 5}, timing=None)

    def load_plan(self, content: memoryview) -> str:
        self.loaded.append(bytes(content))
        if b"damaged" in bytes(content):
            raise EngineError("TensorRT refuses the plan: magic tag does not match.")
        return bytes(content).decode()

    def engine(self, graph: str = "update", name: str = "tensorrt-rtx", **more: Any) -> Any:
        told: Callable[[BuildStep], object] = lambda step: self.said.append(step.message or "")  # noqa: E731
        return load(Bundle.open(BUILT_IN), graph, name, progress=told, **more)


class Plan:
    def __init__(self, world: World, loaded: str, shapes: Mapping[str, tuple[int, ...]], kernels: bytes | None) -> None:
        if world.no_memory:
            raise EngineError("TensorRT has no memory for another execution context.")
        self.world, self.loaded = world, loaded
        world.kernels.append(kernels)
        self.scratch = int(max(np.prod(shape) for shape in shapes.values()))
        self.at = (0, 0)

    def use_scratch(self, address: int, size: int) -> None:
        self.at = (address, size)

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        assert stream == Stream.handle and self.at[1] >= self.scratch
        self.world.runs.append((self.loaded, *self.at))

    def kernels(self) -> bytes | None:
        return b"kernels of " + self.loaded.encode()

    def not_recordable(self, stream: int) -> str | None:
        return self.world.not_recordable


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def bound(engine: Any, size: tuple[int, int, int]) -> Callable[[], None]:
    run = run_sizes(Bundle.open(BUILT_IN), engine.graph, *size)[0]
    sides = engine.inputs, engine.outputs
    step: Callable[[], None] = engine.bind(*({each: engine.empty(each, **run) for each in side} for side in sides))
    return step


def test_scratch_memory_is_one_piece_for_all_plans_as_large_as_the_largest_asks_for(world: World) -> None:
    engine = world.engine()
    small = bound(engine, SMALL)
    small()
    large = bound(engine, LARGE)
    large()
    small()
    (_, _, first), (_, at, second), (_, again, third) = world.runs
    assert first < second == third and at == again


@pytest.mark.parametrize("other", [0, 1], ids=["memory for the piece as it was", "for none"])
def test_what_ran_goes_on_when_somebody_wants_more_scratch_memory_than_there_is(
    world: World, monkeypatch: pytest.MonkeyPatch, other: int
) -> None:
    small = bound(world.engine(), SMALL)
    small()
    (_, _, size) = world.runs[-1]
    with monkeypatch.context() as full:
        full.setattr(Array, "free", size - other)
        with pytest.raises(EngineError, match="out of memory"):
            module.scratch().reserve(size + 1)
    small()
    assert world.runs[-1][1:] == (module.scratch().address, size)


def test_what_was_compiled_at_the_first_run_is_there_for_the_next_process(world: World) -> None:
    step = bound(world.engine(), SMALL)
    step()
    step()
    bound(world.engine(), SMALL)
    world.gpu = Gpu("NVIDIA GeForce RTX 5090", (12, 0))
    bound(world.engine(), SMALL)
    assert world.kernels == [None, b"kernels of " + world.built[0].encode(), None] and len(world.built) == 1


def test_an_outer_step_is_recorded_once_and_again_when_the_scratch_memory_has_moved(world: World) -> None:
    engine = world.engine()
    step = bound(engine, SMALL)
    step()
    recorded = engine.record(step)
    for _ in range(3):
        recorded()
    assert world.stream.recorded == 1
    bound(engine, LARGE)
    recorded()
    recorded()
    assert world.stream.recorded == 2 and world.runs[-1][2] > world.runs[0][2]


def test_what_cannot_be_recorded_runs_step_by_step_and_says_why(world: World) -> None:
    world.not_recordable = "it branches on the host"
    engine = world.engine()
    step = bound(engine, SMALL)
    step()
    recorded = engine.record(step)
    recorded()
    recorded()
    assert len(world.runs) == 3 and world.stream.recorded == 0
    assert [said for said in world.said if "one by one" in said] == [
        "steps are launched one by one, not as one CUDA graph: it branches on the host"
    ]


def plans(world: World, out: Path, sizes: Sizes | None = None, targets: tuple[str, ...] = ()) -> Path:
    made = list(build_plans(Bundle.open(BUILT_IN), "tensorrt-rtx", sizes or Sizes(SMALL, SMALL, SMALL), targets, out))
    assert [each.graph for each in made] == list(Bundle.open(BUILT_IN).manifest.graphs)
    world.built.clear()
    return out


def test_plans_made_ahead_of_time_are_used_on_every_card_that_they_are_for(world: World, tmp_path: Path) -> None:
    folder = plans(world, tmp_path / "plans", targets=("8.9", "12.0"))
    entries = PlanFolder(folder).entries
    assert all(entry.key["compute capability"] == "8.9,12.0" for entry in entries)
    for gpu in (Gpu(), Gpu("NVIDIA GeForce RTX 5090", (12, 0))):
        world.gpu = gpu
        bound(world.engine(plans=folder), SMALL)()
    assert world.built == [] and len(world.loaded) == 2
    # Scratch memory is as large as the largest of the folder from the beginning, so that nothing moves later.
    assert {size for _, _, size in world.runs} == {max(entry.figures["scratch"] for entry in entries)}


@pytest.mark.parametrize(
    ("field", "there", "said"),
    [
        ("compute capability", "12.0", "compute capability: 12.0 there, 8.9 here"),
        ("engine", "tensorrt-rtx 1.8.0", "engine: tensorrt-rtx 1.8.0 there, tensorrt-rtx 1.7.1 here"),
        ("graph", "ab cd", "graph: ab cd there"),
        ("flags", "workspace 5", "flags: workspace 5 there"),
        ("lowered", "00", "lowered: 00 there"),
    ],
)
def test_plan_for_something_else_is_not_used_and_the_field_is_named(
    world: World, tmp_path: Path, field: str, there: str, said: str
) -> None:
    folder = plans(world, tmp_path / "plans")
    document = json.loads((folder / "manifest.json").read_text())
    for entry in document["plans"]:
        entry["key"][field] = there
    (folder / "manifest.json").write_text(json.dumps(document))
    bound(world.engine(plans=folder), SMALL)
    assert any(said in each and str(folder) in each for each in world.said) and len(world.built) == 1


def test_plan_that_is_not_for_this_size_or_damaged_is_built_here(world: World, tmp_path: Path) -> None:
    folder = plans(world, tmp_path / "plans")
    bound(world.engine(plans=folder), LARGE)
    assert "has no plan of tiny update for" in world.said[0] and len(world.built) == 1
    (folder / "update.plan").write_bytes((folder / "update.plan").read_bytes().replace(b"plan", b"nalp"))
    bound(world.engine(plans=folder), SMALL)
    assert any("is not what its manifest says (sha256)" in said for said in world.said) and len(world.built) == 2
    (folder / "update.plan").write_bytes(b"short")
    bound(world.engine(plans=folder), SMALL)
    assert any("the copy is incomplete" in said for said in world.said)


def test_one_plan_serves_a_range_and_is_loaded_once(world: World, tmp_path: Path) -> None:
    folder = plans(world, tmp_path / "plans", Sizes(SMALL, SMALL, LARGE))
    engine = world.engine(plans=folder)
    for size in (SMALL, LARGE, (96, 64, 5), SMALL):
        bound(engine, size)()
    assert world.built == [] and len(world.loaded) == 1
    engine = world.engine()
    bound(engine, (160, 160, 17))
    engine.compile_range(*({name: shape for name, shape in each.items()} for each in shapes_of("update")))
    world.built.clear()
    for size in (SMALL, (96, 64, 5)):
        bound(engine, size)
    assert world.built == []


def shapes_of(graph: str) -> tuple[dict[str, tuple[int, ...]], ...]:
    from tmd_engines.command.sizes import plan_shapes

    return plan_shapes(Bundle.open(BUILT_IN), graph, Sizes(SMALL, SMALL, LARGE))[0]


def test_folder_of_plans_is_complete_or_not_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, sizes = Bundle.open(BUILT_IN), Sizes(SMALL, SMALL, SMALL)
    making = build_plans(bundle, "tensorrt-rtx", sizes, (), tmp_path / "plans")
    assert isinstance(making, Generator)
    next(making)
    making.close()
    assert list(tmp_path.glob("*plans*")) == []
    plans(world, tmp_path / "plans")
    with pytest.raises(EngineError, match="exists already"):
        next(build_plans(bundle, "tensorrt-rtx", sizes, (), tmp_path / "plans"))
    with pytest.raises(EngineError, match="not by tensorrt: add --engine tensorrt-rtx"):
        next(build_plans(bundle, "tensorrt", sizes, (), tmp_path / "more"))
    with pytest.raises(EngineError, match=r"Graph text_encoder cannot be built for 7.5: .*Turing"):
        next(build_plans(bundle, "tensorrt-rtx", sizes, ("7.5",), tmp_path / "more"))
    with pytest.raises(EngineError, match="is not a folder of plans"):
        world.engine(plans=tmp_path)


def test_a_plan_whose_context_failed_is_looked_for_anew(world: World) -> None:
    """The next time another plan may lie there under the same key."""
    engine = world.engine()
    world.no_memory = True
    with pytest.raises(EngineError, match="no memory"):
        bound(engine, SMALL)
    world.no_memory = False
    (key,) = open_cache().known()
    open_cache().store(key, b"another plan")
    bound(engine, SMALL)()
    assert world.loaded == [world.built[0].encode(), b"another plan"] and world.runs[0][0] == "another plan"


def test_an_engine_without_plans_says_so() -> None:
    with pytest.raises(EngineError, match="takes no plans"):
        load(Bundle.open(BUILT_IN), "update", "onnxruntime", plans="somewhere")


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((8, 6), "tensorrt tensorrt_rtx", "tensorrt-rtx"),
        ((8, 9), "tensorrt tensorrt_rtx", "tensorrt-rtx"),
        ((12, 0), "tensorrt_rtx", "tensorrt-rtx"),
        ((8, 0), "tensorrt tensorrt_rtx", "tensorrt"),
        ((8, 0), "tensorrt_rtx", "tensorrt-rtx"),
        ((9, 0), "tensorrt tensorrt_rtx", "tensorrt"),
        ((7, 5), "tensorrt tensorrt_rtx", "tensorrt"),
        ((8, 9), "tensorrt", "tensorrt"),
    ],
)
def test_auto_takes_the_library_that_is_made_for_the_card(
    world: World, capability: tuple[int, int], installed: str, chosen: str
) -> None:
    world.gpu, world.installed = Gpu("it", capability), set(installed.split())
    assert choose(Bundle.open(BUILT_IN), "backbone") == (chosen, "cuda")


def test_weights_are_streamed_where_those_of_a_stage_do_not_fit(world: World) -> None:
    """A text encoder that is larger than the model must not void the plans of the model."""
    files = Bundle.open(BUILT_IN).manifest.files
    sizes = {
        graph: files[f"{graph}.onnx"].size + files[f"{graph}.onnx.data"].size for graph in ("backbone", "flow_head")
    }
    for room, streams in ((1.3, False), (1.1, True)):
        world.gpu = Gpu(memory=int(room * (sum(sizes.values()) + files["update.onnx"].size)))
        assert world.engine("backbone").settings().weight_streaming == streams
        assert world.engine("backbone", "tensorrt").settings().weight_streaming
        assert not world.engine("text_encoder").settings().weight_streaming
    decoders = [files[f"{graph}.onnx"].size + files[f"{graph}.onnx.data"].size for graph in DECODERS]
    for room, streams in ((1.3, False), (1.1, True)):
        world.gpu = Gpu(memory=int(room * sum(decoders)))
        assert [world.engine(graph).settings().weight_streaming for graph in DECODERS] == [streams, streams]


def test_turing_is_refused_before_anything_is_built(world: World) -> None:
    world.gpu = Gpu("NVIDIA GeForce RTX 2080", (7, 5))
    with pytest.raises(EngineError, match=r"Graph backbone does not run on NVIDIA GeForce RTX 2080: .*Turing"):
        world.engine("backbone")
