"""NVIDIA's own builder takes every graph that we make: a graph that does not build fails here, and nothing is retried.

Built are all graphs of the built-in models in fp32, fp16 and bf16, their backbones and flow heads in int8, fp8 and
nvfp4, and the same of a small model of kind wan; in both lowerings, for one size and for a range of sizes. Of these
four combinations the small model is built in all (nvfp4 in the two that there are), and the built-in ones in one or two
per precision, the rest by hand (slow), with a small Wan2.2-TI2V-5B and its encoder of pictures. Graphs are
those that tmd-export writes. Ranges of activations are made up, and one layer of each graph is kept from its precision.
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

from tests.helpers import synthetic_checkpoints as made
from tests.helpers.built_in import BUNDLES
from tests.helpers.export_tools import TEXT, VAE, WAN
from tests.helpers.nvidia_builder import CANONICAL, PRIMITIVES, build_graph, figures_of, nvidia_builder, refusal
from tests.helpers.shipped_graphs import quantized_from
from tmd_engines import Bundle, EngineError
from tmd_engines.command.cli import main
from tmd_engines.tensorrt.folder import PlanFolder
from tmd_engines.tensorrt.fusion import is_fused
from tmd_engines.tensorrt.progress import BuildProgress
from tmd_engines.tensorrt.settings import BuildSettings
from tmd_export import RandomSource, Source, export_bundle, open_source

pytest.importorskip("tensorrt_rtx", reason="pip install '.[rtx]'")

SMALL = ((16, 16, 1), (32, 16, 3), (64, 32, 5))
SIZES = {
    "tiny": ((64, 64, 1), (64, 64, 5), (128, 96, 9)),
    "tim-tiny": ((64, 64, 1), (64, 64, 1), (128, 128, 1)),
    "wan": SMALL,
    "wan2.2": ((32, 32, 1), (64, 32, 5), (64, 64, 9)),
}
QUANTIZED = ("int8", "fp8", "nvfp4")
Form = tuple[tuple[int, int], str]
FIXED, RANGE = "one size", "a range"
FORMS = [(PRIMITIVES, FIXED), (PRIMITIVES, RANGE), (CANONICAL, FIXED), (CANONICAL, RANGE)]
QUICK = {
    ("fp32", FORMS[2]),
    ("fp16", FORMS[0]),
    ("fp16", FORMS[3]),
    ("bf16", FORMS[0]),
    ("int8", FORMS[2]),
    ("fp8", FORMS[2]),
    ("nvfp4", FORMS[2]),
}
"""What is built of the built-in models in every run: each precision, each lowering, and ranges of sizes."""


@pytest.fixture(scope="module", autouse=True)
def _builder() -> Iterator[None]:
    with nvidia_builder():
        yield


def folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="tmd-test-")
    atexit.register(made.cleanup)
    return Path(made.name) / "bundle"


def source_of(name: str) -> Source:
    if name == "wan":
        return RandomSource("small", 0, fusion=None, wan=WAN, head_blocks=1, vae=VAE, text=TEXT)
    if name == "wan2.2":
        sizes: Any = {"wan": made.WAN22, "vae": made.VAE22, "text": made.TEXT}
        return RandomSource("small", 0, fusion=None, head_blocks=1, **sizes)
    return open_source(name)


@cache
def in_fp16(name: str) -> Bundle:
    if name in ("wan", "wan2.2"):
        parts = ("backbone", "flow_head") if name == "wan" else ("encoder", "backbone", "flow_head")
        return export_bundle(source_of(name), folder(), parts, precision="fp16", verify=False).bundle
    return Bundle.open(BUNDLES / name)


@cache
def in_8_or_4_bits(name: str, backbone: str, flow_head: str) -> Bundle:
    """Backbone and flow head in these precisions."""
    return quantized_from(source_of(name), in_fp16(name), folder(), {"backbone": backbone, "flow_head": flow_head})


def check(name: str, precision: str, form: Form) -> None:
    """Builds every graph of a model in one precision; in 8 or 4 bits those that come in them."""
    version, kind = form
    low = precision in QUANTIZED
    bundle = in_8_or_4_bits(name, precision, precision) if low else in_fp16(name)
    sizes = SIZES[name] if kind == RANGE else SIZES[name][1:2]
    targets = ("12.0",) if precision == "nvfp4" else ()
    for graph in bundle.manifest.graphs:
        if low and graph == "update":
            continue  # it has no types but float32
        model, ranges = build_graph(bundle, graph, version, sizes, None if low else precision)
        check_nodes(precision, model)
        assert figures_of(model, ranges, str(bundle.graph_path(graph)), targets)["plan"] > 1000


def check_nodes(precision: str, model: onnx.ModelProto) -> None:
    """What quantizes is there, and in 4 bits TensorRT's own operator finds the scales, and no `ReduceMax`."""
    operators = {node.op_type for node in model.graph.node}
    assert ("DequantizeLinear" in operators) == (precision in QUANTIZED)
    assert ("TRT_FP4DynamicQuantize" in operators) == (precision == "nvfp4")
    assert precision != "nvfp4" or "ReduceMax" not in operators


def runs(name: str) -> list[Any]:
    """Every precision in every form that there is; of the built-in models most are slow."""
    found = []
    for precision in ("fp16", "fp32", "bf16", *QUANTIZED):
        for version, kind in FORMS:
            if precision == "nvfp4" and version == PRIMITIVES:
                continue  # see `test_4_bits_are_refused_in_one_sentence_where_they_are_not_computed`
            quick = name == "wan" or (precision, (version, kind)) in QUICK
            marks = () if quick else pytest.mark.slow
            label = f"{name}-{precision}-{version[0]}-{kind}"
            found.append(pytest.param(name, precision, (version, kind), marks=marks, id=label))
    return found


@pytest.mark.long
@pytest.mark.parametrize(("name", "precision", "form"), [run for name in SIZES for run in runs(name)])
def test_every_graph_builds_in_every_precision(name: str, precision: str, form: Form) -> None:
    check(name, precision, form)


def test_4_bits_are_refused_in_one_sentence_where_they_are_not_computed(tmp_path: Path) -> None:
    bundle = in_8_or_4_bits("wan", "nvfp4", "nvfp4")
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
    bundle, out = in_8_or_4_bits("wan", "fp8", "int8"), tmp_path / "plans"

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
