"""The built-in model in every precision, on every engine that runs here, within the gates of docs/architecture.md.

Each is exported for real, but for what takes most of an export's time: the graphs are not traced, they are the shipped
ones with other types in the place of float16, and 8 bits are calibrated on one prompt, without the table of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from tests.helpers.shipped_graphs import not_traced
from tmd_engines import Bundle, load
from tmd_engines.command.verify import MAX_ERROR_FP32, MIN_COSINE
from tmd_export import export_bundle, open_source
from tmd_export.quantization.calibration import Sensitivity, read_calibration
from tmd_export.quantization.quantizer import Quantizer
from tmd_ref.wan import rope_tables
from tmd_runtime.built_in import BUILT_IN

RUNS = [("onnxruntime", precision) for precision in ("fp32", "fp16", "bf16", "int8", "fp8")]
RUNS += [("openvino", precision) for precision in ("fp32", "bf16", "int8")]
DIMS = {"batch": 1, "frames": 5, "height": 8, "width": 8, "text": 32, "tokens": 80}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder, found = tmp_path_factory.mktemp("precisions"), {}
    source = open_source("tiny")
    calibration: Any = ("a red circle moving right on a black background",)
    none_kept = Sensitivity(everything=0.0, chosen=0.0, layers={}, kept=())  # as it is by docs/precision.md
    with (
        not_traced(BUILT_IN),
        patch.object(Quantizer, "_measure_layers", lambda *_: none_kept),
        patch.object(Quantizer, "_hold_out", lambda *_: None),
    ):
        for precision in dict.fromkeys(precision for _, precision in RUNS):
            quantized = precision in ("int8", "fp8")
            parts = ("text_encoder", "backbone", "flow_head") if quantized else ("backbone", "flow_head")
            given = {"calibration": calibration} if quantized else {}
            export_bundle(
                source, folder / precision, parts, precision=f"{precision},text_encoder=fp32", verify=False, **given
            )
            found[precision] = Bundle.open(folder / precision)
            if quantized:  # ranges are those of the checkpoint, in whatever precision
                known = {said: dict.fromkeys(("backbone", "flow_head"), none_kept) for said in ("int8", "fp8")}
                found_ranges = read_calibration(folder / precision / "calibration.json")
                calibration = found_ranges.model_copy(update={"sensitivity": known})
    return found


def outputs(bundle: Bundle, engine: str, features: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """One pass of both graphs on an engine. The flow head gets `features`, or those of this backbone if there are none,
    which are then put there."""
    rng = np.random.default_rng(0)
    cos, sin = rope_tables(5, 4, 4, bundle.manifest.model.head_dim)
    given = {"rope_cos": cos.numpy(), "rope_sin": sin.numpy(), "prompt_embeds": np.zeros((1, 32, 64), np.float32)}
    given |= {name: rng.standard_normal((1, 16, 5, 8, 8), np.float32) for name in ("x", "y", "noise")}
    given |= {name: np.full(1, time, np.float32) for name, time in (("t", 0.9), ("s", 0.8), ("r", 0.4))}
    given["prompt_embeds"][:, :12] = rng.standard_normal((1, 12, 64), np.float32)
    for part in ("backbone", "flow_head"):
        with load(bundle, part, engine, "cpu", threads=1) as loaded:
            made = {name: loaded.empty(name, **DIMS) for name in loaded.outputs}
            loaded.run({name: {**given, **features}[name] for name in loaded.inputs}, made)
        if part == "backbone" and not features:
            features |= made
        yield from made.items()


@pytest.fixture(scope="module")
def expected(bundles: dict[str, Bundle]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    features: dict[str, np.ndarray] = {}
    return dict(outputs(bundles["fp32"], "onnxruntime", features)), features


@pytest.mark.long
@pytest.mark.parametrize(("engine", "precision"), RUNS, ids=map("-".join, RUNS))
def test_every_precision_is_within_its_gate_on_every_engine(
    bundles: dict[str, Bundle], expected: Any, engine: str, precision: str
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    bundle = bundles[precision]
    assert {bundle.graph_info(part).precision for part in ("backbone", "flow_head")} == {precision}
    wanted, features = expected
    found = dict(outputs(bundle, engine, dict(features)))
    assert found.keys() == wanted.keys() == {"features", "context", "y_next"}
    for name, values in found.items():
        one, other = values.astype(np.float64).ravel(), wanted[name].astype(np.float64).ravel()
        if precision == "fp32":
            assert np.abs(one - other).max() <= MAX_ERROR_FP32 * max(1.0, np.sqrt(np.mean(other**2))), name
        else:
            assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) >= MIN_COSINE[precision], name
            # The shipped weights are float16 already, and ONNX Runtime computes float16 in float32.
            assert precision == "fp16" or (one != other).any(), f"{name} was not computed in {precision}"
