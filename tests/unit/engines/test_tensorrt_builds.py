"""NVIDIA's own builder takes every graph that we make: a graph that does not build fails here, and nothing is retried.

Built are all graphs of the built-in models in fp32, fp16 and bf16, and backbone and flow head of small models of every
family in int8 and fp8, as tmd-export writes them; in both lowerings, for one size and for a range of sizes. Of these
four combinations the built-in models are built in two per precision, the small ones in all.
Full sizes, and the memory that shows whether attention is fused, are left to `test_tensorrt_full_size.py` (slow).
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.helpers.built_in import BUNDLES
from tests.helpers.export_tools import TEXT, VAE, WAN
from tests.helpers.nvidia_builder import CANONICAL, PRIMITIVES, build_graph, figures_of, nvidia_builder, refusal
from tests.helpers.quantized_tools import quantized
from tmd_engines import Bundle
from tmd_engines.tensorrt.fusion import is_fused
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
        else RandomSource("small", 0, kind="wan", wan=WAN, head_blocks=1, vae=VAE, text=TEXT)
    )
    given = {"calibration": ["one"]} if {first, second} & {"int8", "fp8"} else {}
    return export_bundle(source, folder(), ("backbone", "flow_head"), precision=precision, **given).bundle


SMALL_MODELS = ("tmd fp8 int8", "tim int8 fp8", "tim bf16 int8", "wan fp16 bf16", "wan int8 fp8")


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_models_build_in_8_bits_and_of_every_family(name: str) -> None:
    bundle = small(name)
    for form in FORMS:
        for graph in bundle.manifest.graphs:
            check(bundle, graph, form, STILLS if bundle.manifest.family.makes_stills else SMALL)


Asked = tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]


def attention(low: int, heads: int, width: int, rows: int, keys: int, marked: bool = False) -> Asked:
    shapes = {"q": (1, heads, rows, width), "k": (1, heads, keys, width), "v": (1, heads, keys, width)}
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
