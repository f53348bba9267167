"""NVIDIA's own builder takes every graph that we make: a graph that does not build fails here, and nothing is retried.

Built are all graphs of the built-in models in fp32, fp16 and bf16, and backbone and flow head of small models of every
family in int8 and fp8, as tmd-export writes them; in both lowerings, for one size and for a range of sizes. Of these
four combinations the built-in models are built in two per precision, the small ones in all. One small model is built in
nvfp4, in the lowering that has it.
Full sizes, and the memory that shows whether attention is fused, are left to `test_tensorrt_full_size.py` (slow).

A query and a key that are the same tensor end the builder of 1.7.1 with a segmentation fault. No model has that, but
the synthetic bundle of other tests.
"""

from __future__ import annotations

import atexit
import io
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from tests.helpers.built_in import BUNDLES
from tests.helpers.export_tools import TEXT, VAE, WAN
from tests.helpers.nvidia_builder import CANONICAL, PRIMITIVES, build_graph, figures_of, nvidia_builder, refusal
from tests.helpers.quantized_tools import quantized
from tmd_engines import Bundle, EngineError
from tmd_engines.command.cli import main
from tmd_engines.tensorrt.folder import PlanFolder
from tmd_engines.tensorrt.fusion import is_fused
from tmd_engines.tensorrt.progress import BuildProgress
from tmd_engines.tensorrt.settings import BuildSettings
from tmd_export import RandomSource, export_bundle
from tmd_export.sources.tim import RandomTiM
from tmd_ref.tim.model import TiMConfig

pytest.importorskip("tensorrt_rtx", reason="pip install '.[rtx]'")

SIZES = {"tiny": ((64, 64, 1), (64, 64, 5), (128, 96, 9)), "tim-tiny": ((64, 64, 1), (64, 64, 1), (128, 128, 1))}
SMALL = ((16, 16, 1), (32, 16, 3), (64, 32, 5))
STILLS = tuple((*size[:2], 1) for size in SMALL)
FIXED, RANGE = "one size", "a range"
FORMS = [(PRIMITIVES, FIXED), (PRIMITIVES, RANGE), (CANONICAL, FIXED), (CANONICAL, RANGE)]
RUNS = [
    ("fp16", FORMS[0]),
    ("fp16", FORMS[3]),
    ("fp32", FORMS[1]),
    ("fp32", FORMS[2]),
    ("bf16", FORMS[0]),
    ("bf16", FORMS[3]),
]
TIM = TiMConfig(
    dim=48, num_heads=2, num_layers=1, in_channels=16, modulation_dim=16, freq_dim=12, patch=1, text_dim=20, text_len=8
)


@pytest.fixture(scope="module", autouse=True)
def _builder() -> Iterator[None]:
    with nvidia_builder():
        yield


_done: set[bytes] = set()  # graphs that are the same in several precisions are built once


def check(bundle: Bundle, graph: str, form: tuple[tuple[int, int], str], sizes: tuple, low: str | None = None) -> None:
    version, kind = form
    model, ranges = build_graph(bundle, graph, version, sizes if kind == RANGE else sizes[1:2], low)
    seen = model.SerializeToString(deterministic=True) + str(ranges).encode()
    if seen not in _done:
        _done.add(seen)
        assert figures_of(model, ranges, str(bundle.graph_path(graph)))["plan"] > 1000


@pytest.mark.parametrize(("low", "form"), RUNS, ids=[f"{low}-{version[0]}-{kind}" for low, (version, kind) in RUNS])
@pytest.mark.parametrize("name", SIZES)
def test_every_graph_of_the_built_in_models_builds(name: str, low: str, form: tuple[tuple[int, int], str]) -> None:
    bundle = Bundle.open(BUNDLES / name)
    for graph in bundle.manifest.graphs:
        check(bundle, graph, form, SIZES[name], low)


def folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="tmd-test-")
    atexit.register(made.cleanup)
    return Path(made.name) / "bundle"


@cache
def small(name: str) -> Bundle:
    """Backbone and flow head of a small model, exported once. Of two precisions each graph has one."""
    family, first, second = name.split()
    precision = f"backbone={first},flow_head={second}"
    if family == "tmd":
        return quantized(precision).bundle
    source = (
        RandomTiM("small", 3, TIM)
        if family == "tim"
        else RandomSource("small", 0, fusion=None, wan=WAN, head_blocks=1, vae=VAE, text=TEXT)
    )
    given: dict[str, Any] = {"calibration": ["one"]} if {first, second} & {"int8", "fp8"} else {}
    return export_bundle(source, folder(), ("backbone", "flow_head"), precision=precision, **given).bundle


SMALL_MODELS = ("tmd fp8 int8", "tim int8 fp8", "tim bf16 int8", "wan fp16 bf16", "wan int8 fp8")


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_models_build_in_8_bits_and_of_every_family(name: str) -> None:
    bundle = small(name)
    for form in FORMS:
        for graph in bundle.manifest.graphs:
            check(bundle, graph, form, STILLS if bundle.manifest.family.makes_stills else SMALL)


def four_bits() -> Bundle:
    return small("tmd nvfp4 nvfp4")


@pytest.mark.parametrize("kind", [FIXED, RANGE])
def test_small_models_build_in_4_bits_for_blackwell(kind: str) -> None:
    bundle = four_bits()
    for graph in bundle.manifest.graphs:
        model, ranges = build_graph(bundle, graph, CANONICAL, SMALL if kind == RANGE else SMALL[1:2])
        quantizing = sum(node.op_type == "TRT_FP4DynamicQuantize" for node in model.graph.node)
        assert bool(quantizing) == (graph != "update")
        assert not any(node.op_type == "ReduceMax" for node in model.graph.node)  # scales are that operator's
        assert figures_of(model, ranges, str(bundle.graph_path(graph)), ("12.0",))["plan"] > 1000


def test_4_bits_are_refused_in_one_sentence_where_they_are_not_computed(tmp_path: Path) -> None:
    bundle = four_bits()
    with pytest.raises(EngineError, match=r"is nvfp4, which takes TensorRT 11 or .*, and this is TensorRT 10\.3"):
        build_graph(bundle, "backbone", PRIMITIVES, SMALL[1:2])
    model, ranges = build_graph(bundle, "backbone", CANONICAL, SMALL[1:2])
    with pytest.raises(EngineError, match="fp4_e2m1"):  # what the builder itself says, and for no target does not
        figures_of(model, ranges, str(bundle.graph_path("backbone")), ("8.9",))
    for targets in ("8.9", "rtx", "8.9,12.0"):
        words = ["build", str(bundle.folder), "--engine", "tensorrt-rtx", "--out", str(tmp_path / "plans")]
        refused = CliRunner().invoke(main, [*words, "--for", targets, "--size", "16x16", "--frames", "1"])
        assert refused.exit_code == 1 and not (tmp_path / "plans").exists()
        assert "it is nvfp4, which GPUs compute from compute capability 12.0 on" in refused.stderr
        assert "build with --for 12.0, or export one with --precision fp8" in refused.stderr


Asked = tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]


def attention(low: int, heads: int, width: int, rows: int, keys: int, marked: bool = False) -> Asked:
    shapes: dict[str, tuple[int, ...]] = {
        "q": (1, heads, rows, width),
        "k": (1, heads, keys, width),
        "v": (1, heads, keys, width),
    }
    node = helper.make_node("Attention", list(shapes), ["o"])
    if marked:
        node.attribute.append(helper.make_attribute("TRT_decomposable", 1))
    inputs = [helper.make_tensor_value_info(name, low, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("o", low, shapes["q"])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), shapes


LOW = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
ASKED = [(heads, width, 256, 77) for heads in (2, 1) for width in (8, 9, 12, 16, 64, 72, 128, 256, 257, 320)]
ASKED += [(1, 128, 4096, 4096), (1, 128, 4096, 4095), (1, 64, 32768, 512), (1, 64, 32767, 512)]


@pytest.mark.parametrize("target", ["8.0", "8.9", "12.0"])
@pytest.mark.parametrize("precision", LOW)
def test_the_table_of_fused_attentions_is_what_the_builder_says(precision: str, target: str) -> None:
    for heads, width, rows, keys in ASKED:
        model, shapes = attention(LOW[precision], heads, width, rows, keys)
        said = refusal(model, shapes, (target,))
        expected = is_fused(LOW[precision], shapes["q"], shapes["k"])
        assert (said is None) == expected, (heads, width, rows, keys, said)
        assert said is None or "not supported by a dedicated kernel" in said


def test_a_mark_takes_nothing_from_an_attention_that_has_a_kernel() -> None:
    """Unfused, the scores of 12 heads and 32,760 tokens would be 25.8 GB."""
    model, shapes = attention(TensorProto.FLOAT16, 12, 128, 32760, 32760, marked=True)
    assert figures_of(model, {name: (shape,) * 3 for name, shape in shapes.items()})["scratch"] < 1 << 30


def test_the_builder_can_say_no() -> None:
    model, shapes = attention(TensorProto.FLOAT16, 2, 64, 16, 16)
    model.graph.node[0].attribute.append(helper.make_attribute("softmax_precision", 1))
    assert "Setting softmax precision is not supported" in (refusal(model, shapes) or "")


def test_command_makes_a_folder_of_plans_for_other_machines(tmp_path: Path) -> None:
    bundle, out = small("tmd fp8 int8"), tmp_path / "plans"

    def build(*options: str) -> Result:
        return CliRunner().invoke(main, ["build", str(bundle.folder), "--engine", "tensorrt-rtx", *options])

    made = build("--out", str(out), "--for", "8.9,12.0", "--size", "16x16..64x32", "--frames", "1..5")
    assert made.exit_code == 0, made.output
    assert "for compute capability 8.9, 12.0" in made.stdout and "on the GPU" in made.stdout
    entries = PlanFolder(out).entries
    assert {entry.file for entry in entries} == {f"{graph}.plan" for graph in bundle.manifest.graphs}
    for entry in entries:
        assert len(PlanFolder(out).read(entry)) == entry.size and entry.key["compute capability"] == "8.9,12.0"
        assert ".." in entry.key["shapes"] and entry.figures["scratch"] > 0
    for targets, said in (("7.5", "Turing"), ("rtx", "build with --for 8.9,12.0")):
        refused = build("--out", str(tmp_path / "more"), "--for", targets)
        assert refused.exit_code == 1 and said in refused.stderr and not (tmp_path / "more").exists()
    for wrong in (("--for", "rtx"), ("--out", "x", "--trtexec", "y"), ("--out", "x", "--size", "128x96..64x64")):
        assert build(*wrong).exit_code == 2


def test_a_disk_that_is_full_ends_the_build_with_its_own_error() -> None:
    """The builder does not look at what becomes of the plan that it hands over."""
    from tmd_engines.tensorrt.build import build

    class Full(io.BytesIO):
        def write(self, piece: Any) -> int:
            raise OSError(28, "No space left on device")

    model, shapes = attention(TensorProto.FLOAT16, 2, 64, 16, 16)
    ranges = {name: (shape,) * 3 for name, shape in shapes.items()}
    with pytest.raises(OSError, match="No space left"):
        build(model.SerializeToString(), "it", ranges, BuildSettings(), None, BuildProgress("it", None), Full())


def test_weights_beyond_the_end_of_their_file_are_said_in_one_sentence(synthetic_bundle: Path) -> None:
    bundle = Bundle.open(synthetic_bundle)
    path = bundle.graph_path("backbone").with_suffix(".onnx.data")
    model, ranges = build_graph(bundle, "backbone", CANONICAL, SMALL[:1])
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(EngineError, match=r"lies beyond the end of backbone.onnx.data: copy the bundle again"):
        figures_of(model, ranges, str(bundle.graph_path("backbone")))
