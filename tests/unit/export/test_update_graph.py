"""The graph `update` computes what the bundle's page says, bit by bit, whatever the coefficients are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.helpers.export_tools import small_export
from tmd_engines import load
from tmd_export import export_bundle, open_source

SLOTS = ("x", "velocity", "negative", "noise", "before_1", "before_2")
SHAPE = (2, 16, 3, 4, 6)


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(SHAPE, np.float32) for name in SLOTS}


def run(given: dict[str, np.ndarray], coefficients: list[float]) -> dict[str, np.ndarray]:
    batch, _, frames, height, width = SHAPE
    with load(small_export().bundle, "update", "onnxruntime", threads=1) as engine:
        outputs = {name: engine.empty(name, batch=batch, frames=frames, height=height, width=width)
                   for name in engine.outputs}  # fmt: skip
        engine.run({**given, "coefficients": np.array(coefficients, np.float32)}, outputs)
    return outputs


def test_the_sum_is_that_of_numpy_in_float32_to_the_last_bit() -> None:
    given, factors = inputs(), [1.7, 0.3, 0.9, -0.4, 0.2, 1.1, -0.6]
    x, velocity, negative, noise, before_1, before_2 = given.values()
    guidance, t, c_x, c_v, c_noise, c_1, c_2 = np.array(factors, np.float32)
    v = negative + guidance * (velocity - negative)
    expected = c_x * x + c_v * v + c_noise * noise + c_1 * before_1 + c_2 * before_2
    found = run(given, factors)
    np.testing.assert_array_equal(found["x_next"], expected)
    np.testing.assert_array_equal(found["data"], x - t * v)
    assert found["magnitude"] == pytest.approx(np.abs(expected).mean(), rel=1e-6)


def test_slots_without_a_factor_change_nothing() -> None:
    given, others = inputs(), inputs(1)
    factors = [1.0, 0.5, 1.0, -0.25, 0.0, 0.0, 0.0]
    unused = {name: others[name] for name in ("noise", "before_1", "before_2")}
    given["negative"] = given["velocity"]
    first, second = run(given, factors), run({**given, **unused}, factors)
    np.testing.assert_array_equal(first["x_next"], second["x_next"])
    np.testing.assert_array_equal(first["x_next"], given["x"] - np.float32(0.25) * given["velocity"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SLOTS)
def test_the_magnitude_tells_of_one_bad_value_in_any_slot(name: str, value: float) -> None:
    """Also where the factor is 0: a product with 0 is not left out."""
    given = inputs()
    given[name][1, 3, 2, 1, 4] = value
    found = run(given, [2.0, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert not np.isfinite(found["magnitude"]).any()
    assert np.isfinite(found["x_next"]).sum() == found["x_next"].size - 1


def test_no_operation_of_it_is_fused_or_folded() -> None:
    model = onnx.load(small_export().bundle.graph_path("update"))
    counts = [node.op_type for node in model.graph.node]
    assert counts == [
        "Split", "Sub", "Mul", "Add",
        "Mul", "Mul", "Add", "Mul", "Add", "Mul", "Add", "Mul", "Add",
        "Mul", "Sub", "Abs", "Reshape", "ReduceMean",
    ]  # fmt: skip
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]


@pytest.mark.long
def test_it_stands_beside_every_flow_head_and_no_other_graph(tmp_path: Path) -> None:
    result = export_bundle(
        open_source("tim-tiny", random_seed=0), tmp_path / "stills", ("flow_head",), precision="bf16", verify=False
    )
    graphs = result.bundle.manifest.graphs
    assert {name: graph.precision for name, graph in graphs.items()} == {"flow_head": "bf16", "update": "fp32"}
    assert graphs["update"].inputs[0].shape == ("batch", 16, 1, "height", "width")
    assert graphs["update"].data is None
    with pytest.raises(ValueError, match="no part 'update'"):
        export_bundle(open_source("tiny"), tmp_path / "alone", ("update",))
