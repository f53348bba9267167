"""fp16 storage: half the file, the same arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.unit.export_tools import small_graph, small_source
from tmd_engines import Bundle
from tmd_export import ExportError, export, export_bundle
from tmd_export.storage import store_float16
from tmd_export.trace import save
from tmd_export.verify import Accuracy, check


def run(path: Path) -> np.ndarray:
    inputs = small_source().graph("backbone").random_inputs(3, batch=2, frames=2, height=4, width=2, text=11)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def test_half_the_file_and_bit_equal_results_for_weights_that_float16_holds(tmp_path: Path) -> None:
    model = small_graph("backbone")
    large = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value.numpy()
        if tensor.dtype == np.float32 and tensor.size > 1024:
            large[name] = tensor.astype(np.float16).astype(np.float32)
            value.const_value = ir.tensor(large[name], name=name)
    full = save(model, tmp_path, "full")
    assert store_float16(model) == 0
    half = save(model, tmp_path, "half")
    casts = {node.inputs[0].name for node in model.graph if node.op_type == "Cast" and node.inputs[0].name in large}
    assert casts == set(large) and len(large) > 10
    sizes = [path.with_name(path.name + ".data").stat().st_size for path in (half, full)]
    assert sizes[0] < 0.53 * sizes[1]
    assert np.array_equal(run(half), run(full))


def test_the_number_of_rounded_values_is_told_and_too_large_ones_are_refused() -> None:
    def model(values: np.ndarray) -> ir.Model:
        weight = ir.Value(name="w", const_value=ir.tensor(values, name="w"))
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, len(values)]))
        node = ir.node("MatMul", [x, weight])
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 23})
        return ir.Model(graph, ir_version=10)

    values = np.ones((40, 40), np.float32)
    assert store_float16(model(values)) == 0
    values[3, :5] = 0.1
    assert store_float16(model(values)) == 5
    assert store_float16(model(np.full((20, 20), 0.1, np.float32))) == 0  # small: left as it is
    values[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"w has values up to 1e\+06, and float16 ends at 65504"):
        store_float16(model(values))


def test_a_bundle_with_half_weights_says_so_and_counts_what_it_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "trace", lambda _: small_graph("text_encoder"))
    result = export_bundle(small_source(), tmp_path / "half", ("text_encoder",), weights="fp16")
    graph = Bundle.open(tmp_path / "half").manifest.graphs["text_encoder"]
    assert (graph.precision, graph.storage) == ("fp32", "fp16")
    assert result.graphs[0].rounded > 500
    assert graph.accuracy is not None and 1e-4 < graph.accuracy.max_abs_error < 1e-2


@pytest.mark.parametrize(
    ("found", "exact", "said"),
    [
        (Accuracy(1.1e-4, 1.0), True, "up to 0.00011 off, more than 0.0001"),
        (Accuracy(float("inf"), 1.0), False, "NaN or Inf"),
        (Accuracy(1e-5, 0.99980), False, "cosine is 0.999800, below 0.9999"),
        (Accuracy(0.0, 1.0, 2, 1, 1000), True, "up to 2 levels of 255 off"),
        (Accuracy(0.0, 1.0, 1, 6, 1000), True, "6 of 1000 values"),
    ],
)
def test_every_gate_can_fail(found: Accuracy, exact: bool, said: str) -> None:
    with pytest.raises(ExportError) as caught:
        check("backbone", found, exact_weights=exact)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("found", "exact"), [(Accuracy(9e-5, 1.0, 1, 4, 1000), True), (Accuracy(3e-3, 0.99995, 2, 900, 1000), False)]
)
def test_what_is_within_the_gates_passes(found: Accuracy, exact: bool) -> None:
    check("backbone", found, exact_weights=exact)
