"""What the C++ library thinks of memory: free as Python reads it, needed about as Python counts, and what follows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import tmd_runtime
from tests.helpers.built_in import BUNDLES
from tests.helpers.bundle_tools import edit_graph
from tests.helpers.cpp_tools import BUNDLE, ask_bundle, twin
from tests.helpers.resident import resident_file_bytes, widen_backbone
from tests.helpers.synthetic import velocity_sampler, write_synthetic_bundle
from tests.helpers.synthetic_quantized import write_quantized_bundle
from tests.helpers.synthetic_tim import write_plain_bundle, write_tim_bundle
from tests.helpers.system_files import FREE_MEMORY
from tmd_engines import Bundle, BundleError
from tmd_engines.bundle.graph_file import parse_graph
from tmd_engines.cost.operations import peak_activation_bytes
from tmd_engines.cost.shapes import infer_shapes
from tmd_engines.cost.sizing import estimate
from tmd_engines.holding import ONNXRUNTIME, OPENVINO
from tmd_runtime import RuntimeFailure
from tmd_runtime.built_in import BUILT_IN

MEMORY, ALL, AUTO = 5, 0, 2  # a tmd_status, and two of tmd_memory


def put(root: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return str(root)


def latent_size(width: int, height: int, frames: int) -> list[int]:
    return [(frames - 1) // 4 + 1, height // 8, width // 8]


@pytest.mark.parametrize(("files", "expected"), FREE_MEMORY)
def test_free_memory_is_read_as_in_python(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert twin().ask("available", root=put(tmp_path, files))["ok"] == expected


def test_free_memory_of_this_machine_is_read() -> None:
    assert twin().ask("available", root="")["ok"] > 1e6


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("width", "height", "frames"), [(64, 64, 17), (256, 256, 1), (512, 512, 33), (832, 480, 81)])
def test_need_is_within_a_factor_of_two_of_what_python_counts(
    width: int, height: int, frames: int, engine: str
) -> None:
    """Python goes through the graphs node by node, and was compared with real runs (docs/speed.md)."""
    pytest.importorskip(engine)
    counted = estimate(Bundle.open(BUILT_IN), width=width, height=height, frames=frames, engine=engine)
    size = latent_size(width, height, frames)
    guessed = twin().ask("need", bundle=str(BUILT_IN), size=size, engine=engine)["ok"]
    for mode, bytes_ in zip(("all", "low"), guessed, strict=True):
        assert 0.5 < bytes_ / counted.peak(mode) < 2  # type: ignore[arg-type]


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "tmd": write_synthetic_bundle,
    "wan": lambda folder: write_synthetic_bundle(folder, sampler=velocity_sampler()),
    "tim": lambda folder: write_tim_bundle(folder, pictures=True),
    "classes": lambda folder: write_tim_bundle(folder, classes=True),
    "plain": write_plain_bundle,
    "tiny": lambda folder: BUNDLES / "tiny",
    "tim-tiny": lambda folder: BUNDLES / "tim-tiny",
    "8 bits": lambda folder: write_quantized_bundle(folder, {"backbone": "fp8", "flow_head": "int8"}),
    "4 bits": lambda folder: write_quantized_bundle(folder, {"backbone": "nvfp4", "flow_head": "nvfp4"}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_have_the_shapes_and_the_peak_that_python_finds(tmp_path: Path, name: str) -> None:
    bundle = Bundle.open(FAMILIES[name](tmp_path / "bundle"))
    for graph, info in bundle.manifest.graphs.items():
        for sizes in ((1, 3, 8, 12), (2, 1, 16, 4)):
            dims = dict(zip(("batch", "frames", "height", "width"), sizes, strict=True))
            dims |= {"tokens": sizes[1] * sizes[2] * sizes[3] // 4, "text": bundle.manifest.text.max_length}
            shapes = {spec.name: spec.resolve(**dims) for spec in info.inputs}
            found = infer_shapes(parse_graph(bundle.read_graph(graph), graph), shapes, graph)
            for engine, holding in (("onnxruntime", ONNXRUNTIME), ("openvino", OPENVINO)):
                question = {"bundle": str(bundle.folder), "graph": graph, "shapes": shapes, "engine": engine}
                answer = twin().ask("graph_memory", **question)
                assert answer["ok"] == {key: list(tensor.shape) for key, tensor in found.tensors.items()}, graph
                assert answer["peak"] == peak_activation_bytes(found, holding), graph


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/smaps is Linux's")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_packed_weights_are_in_memory_once(synthetic_bundle: Path, engine: str) -> None:
    """While the graph is loaded; Python's twin is tests/unit/engines/test_resident_pages.py."""
    pytest.importorskip(engine)
    data = widen_backbone(synthetic_bundle)
    wishes = {"seed": 1, "frames": 1, "steps": 1, "inner_steps": 1}
    assert "ok" in ask_bundle("run", synthetic_bundle, engine, prompt="a red circle", wishes=wishes, memory=ALL)
    assert resident_file_bytes("backbone.onnx.data", twin().pid) < data / 20


def huge_text_encoder(folder: Path, depends_on_data: bool) -> Path:
    """A bundle whose text encoder makes 2^44 numbers of one, by a shape of its own or one that follows from the ids."""

    def edit(model: onnx.ModelProto) -> None:
        shape = numpy_helper.from_array(np.array([1 << 22, 1 << 22], np.int64), "it.shape")
        model.graph.initializer.append(shape)
        if depends_on_data:
            model.graph.node.append(helper.make_node("ReduceMax", ["input_ids"], ["it.id"], name="id", keepdims=0))
            model.graph.node.append(helper.make_node("Mul", ["it.shape", "it.id"], ["it.sizes"], name="sizes"))
        last = next(node for node in model.graph.node if "prompt_embeds" in node.output)
        last.output[:] = ["it.before"]
        one = numpy_helper.from_array(np.ones(1, np.float32), "it.one")
        model.graph.initializer.append(one)
        wide = "it.sizes" if depends_on_data else "it.shape"
        model.graph.node.append(helper.make_node("Expand", ["it.one", wide], ["it.huge"], name="huge"))
        model.graph.node.append(helper.make_node("ReduceMean", ["it.huge"], ["it.mean"], name="mean", keepdims=0))
        model.graph.node.append(helper.make_node("Mul", ["it.before", "it.mean"], ["prompt_embeds"], name="last"))

    bundle = write_synthetic_bundle(folder)
    edit_graph(bundle, edit, "text_encoder")
    return bundle


@pytest.mark.parametrize(("depends_on_data", "status"), [(False, MEMORY), (True, BUNDLE)])
def test_what_no_memory_holds_is_refused_before_it_runs(tmp_path: Path, depends_on_data: bool, status: int) -> None:
    folder = huge_text_encoder(tmp_path / "bundle", depends_on_data)
    wishes = {"seed": 1, "frames": 1}
    question = {
        "bundle": str(folder),
        "engine": "openvino",
        "library": "",
        "prompt": "a red circle",
        "wishes": wishes,
        "memory": AUTO,
    }
    assert twin().ask("run", **question).get("status") == status
    said = twin().ask("stages", **question)
    assert said.get("status") == status and ("not enough memory" in said["error"] or "be sized" in said["error"]), said
    with tmd_runtime.load(folder) as pipeline, pytest.raises((RuntimeFailure, BundleError)) as caught:
        pipeline("a red circle", seed=1, frames=1)
    assert "not enough memory" in str(caught.value) or "be sized" in str(caught.value)


def test_stages_follow_each_other_where_all_of_them_do_not_fit(tmp_path: Path) -> None:
    size, small = latent_size(832, 480, 81), latent_size(64, 64, 17)
    every, low = twin().ask("need", bundle=str(BUILT_IN), size=size)["ok"]
    assert low < every

    def with_free(free: int, *sizes: list[int]) -> tuple[list[bool], str]:
        root = put(tmp_path, {"proc/meminfo": f"MemAvailable: {free // 1024 + 1} kB\n"})
        answer = twin().ask("memory_mode", bundle=str(BUILT_IN), root=root, sizes=sizes)
        return answer["ok"], answer["warnings"]

    assert with_free(every, size) == ([False], "")
    assert with_free((every + low) // 2, size, small, size) == ([True, False, True], "")
    modes, warnings = with_free(low - 50_000_000, size)  # less than the process takes without any graph
    assert modes == [True] and "even with one stage after the other" in warnings
    assert twin().ask("memory_mode", bundle=str(BUILT_IN), root="/nowhere", sizes=[size])["ok"] == [False]
    root = put(tmp_path, {"proc/meminfo": f"MemAvailable: {low // 4096} kB\n"})
    refused = twin().ask("memory_mode", bundle=str(BUILT_IN), root=root, sizes=[size])
    assert refused["status"] == MEMORY and "takes at least" in refused["error"]
