"""int8 and fp8 graphs on the engines for CPUs: the values that the graph says, and integer kernels where there are."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
import pytest

from tests.helpers.engine_tools import Buffers
from tests.helpers.quantized_tools import quantized
from tmd_engines import load
from tmd_engines.command.verify import verify
from tmd_engines.onnxruntime.engine import OnnxRuntimeEngine, fast_unsigned_products
from tmd_engines.onnxruntime.lowering import low_precision_to_float32, signed_to_unsigned_activations

PARTS = {"backbone": "fp8", "flow_head": "int8"}
DIMS = {"batch": 1, "frames": 2, "height": 4, "width": 6, "text": 8, "tokens": 12}


def inputs_of(engine: OnnxRuntimeEngine) -> Buffers:
    rng = np.random.default_rng(0)
    arrays = {name: engine.empty(name, **DIMS) for name in engine.inputs}
    for name, array in arrays.items():
        array[...] = 0.5 if name in ("t", "s", "r") else rng.standard_normal(array.shape)
    return arrays


def run(part: str, engine: str, as_stored: bool = False) -> Buffers:
    bundle = quantized().bundle
    opened = (
        OnnxRuntimeEngine(bundle, part, "cpu", 1, as_stored=True) if as_stored else load(bundle, part, engine, "cpu", 1)
    )
    with opened as loaded:
        outputs = {name: loaded.empty(name, **DIMS) for name in loaded.outputs}
        loaded.run(inputs_of(loaded), outputs)  # type: ignore[arg-type]
        return outputs


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("part", PARTS)
def test_engines_compute_what_the_graph_says(part: str, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    for name, expected in run(part, "onnxruntime", as_stored=True).items():
        found = run(part, engine)[name]
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 0.05, name  # the literal values are bfloat16 between products, which shifts some of 8 bits


def test_verify_passes_quantized_graphs() -> None:
    pytest.importorskip("openvino")
    checks = list(verify(quantized().bundle, "openvino", threads=1))
    assert [(check.graph, check.precision, check.problem) for check in checks] == [
        (*item, None) for item in {**PARTS, "update": "fp32"}.items()
    ]


def literal_session(model: onnx.ModelProto, optimised: str | None = None, **settings: str) -> object:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised:
        options.optimized_model_filepath = optimised
    folder = str(quantized().bundle.folder)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    for key, value in settings.items():
        options.add_session_config_entry(f"session.{key}", value)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_unsigned_activations_are_the_same_values_and_fuse_with_every_product(tmp_path: object) -> None:
    bundle = quantized().bundle
    signed = onnx.load(bundle.graph_path("flow_head"), load_external_data=False)
    low_precision_to_float32(signed)
    unsigned = copy.deepcopy(signed)
    assert signed_to_unsigned_activations(unsigned) == 9  # q, k and v of self-attention share one, k and v of the other
    with load(bundle, "flow_head", "onnxruntime", "cpu", 1) as loaded:
        inputs = inputs_of(loaded)  # type: ignore[arg-type]
    one, other = (literal_session(model, disable_quant_qdq="1").run(None, inputs)[0] for model in (signed, unsigned))  # type: ignore[attr-defined]
    assert np.abs(one - other).max() < 1e-5
    path = f"{tmp_path}/optimised.onnx"
    literal_session(unsigned, path)
    kinds = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    if fast_unsigned_products():
        assert kinds["MatMulIntegerToFloat"] == 12


def test_openvino_multiplies_int8() -> None:
    openvino = pytest.importorskip("openvino")
    if not fast_unsigned_products():
        pytest.skip("this CPU has no products of 8 bits")
    bundle = quantized().bundle
    core = openvino.Core()
    model = core.read_model(bundle.graph_path("flow_head"))
    with load(bundle, "flow_head", "onnxruntime", "cpu", 1) as loaded:
        model.reshape({name: list(loaded.shape(name, **DIMS)) for name in loaded.inputs})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = Counter(
        info["runtimePrecision"].astype(str) for info in infos if info["layerType"].astype(str) == "FullyConnected"
    )
    assert kinds["i8"] + kinds["u8"] == 12, kinds
