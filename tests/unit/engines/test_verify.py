"""`tmd-engine verify` passes an engine that computes the graphs, and fails one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.helpers.bundle_tools import edit_graph
from tests.helpers.synthetic import GRAPHS
from tests.helpers.synthetic_tim import write_tim_bundle
from tmd_engines import Bundle, load
from tmd_engines.command import verify
from tmd_engines.command.cli import main
from tmd_engines.command.verify import GraphCheck, _compare
from tmd_engines.device.buffers import check_graph_types
from tmd_engines.openvino.engine import OpenVinoEngine

pytest.importorskip("openvino")


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["verify", *map(str, arguments), "--threads", "1"])


def test_engine_that_computes_every_graph_passes(synthetic_bundle: Path) -> None:
    result = invoke(synthetic_bundle, "--engine", "openvino", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"] is True
    assert [row["graph"] for row in document["graphs"]] == list(GRAPHS)
    for row in document["graphs"]:
        assert row["problem"] is None and row["engine"] == "openvino"
        assert row["max_abs_error"] < 1e-5 and row["cosine"] > 0.999999
        assert (row["max_levels"] is None) == (not row["graph"].startswith("decoder"))
    assert any(row["max_abs_error"] > 0 for row in document["graphs"])  # two engines, not one twice


def test_a_model_of_few_classes_is_asked_for_those_that_it_has(tmp_path: Path) -> None:
    checks = list(verify.verify(Bundle.open(write_tim_bundle(tmp_path / "stills", classes=True)), "openvino", 1))
    assert [check.problem for check in checks] == [None] * len(checks) and len(checks) > 3


@pytest.mark.parametrize(
    ("damage", "said"), [(np.nan, "features has NaN or Inf"), (0.01, "features is off by 1.0e-02")]
)
def test_engine_that_is_off_fails(
    synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch, damage: float, said: str
) -> None:
    real = OpenVinoEngine.run

    def run(self: OpenVinoEngine, inputs: Any, outputs: dict[str, np.ndarray]) -> None:
        real(self, inputs, outputs)
        if self.graph == "backbone":
            outputs["features"].flat[7] += damage

    monkeypatch.setattr(OpenVinoEngine, "run", run)
    result = invoke(synthetic_bundle, "--engine", "openvino")
    assert result.exit_code == 1
    (failed,) = [line for line in result.stdout.splitlines() if "FAILED" in line]
    assert failed.startswith("backbone") and said in failed
    assert "1 of 6 graphs failed (backbone)" in result.stderr


def test_graph_that_the_engine_does_not_take_has_failed(
    synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(engine: str, device: str, graph: str, info: Any, precisions: tuple[str, ...]) -> None:
        check_graph_types(engine, graph, info, ("fp16",))

    monkeypatch.setattr("tmd_engines.openvino.engine.check_cpu_graph", refuse)
    checks = list(verify.verify(Bundle.open(synthetic_bundle), "openvino", threads=1))
    assert len(checks) == len(GRAPHS) and all("is fp32" in (check.problem or "") for check in checks)


def test_auto_that_is_the_reference_itself_says_so(synthetic_bundle: Path) -> None:
    result = invoke(synthetic_bundle)
    assert result.exit_code == 0 and "compared with itself" in result.stdout


def test_broken_graph_or_engine_name_is_one_sentence(synthetic_bundle: Path) -> None:
    assert "no engine 'magic'" in invoke(synthetic_bundle, "--engine", "magic").stderr

    def edit(model: Any) -> None:
        model.graph.node[0].op_type = "NoSuchOperator"

    edit_graph(synthetic_bundle, edit, "text_encoder")
    result = invoke(synthetic_bundle, "--engine", "openvino")
    assert result.exit_code == 1 and "NoSuchOperator" in result.stderr and result.stderr.count("\n") == 1


def test_inputs_are_what_the_graphs_expect(synthetic_bundle: Path) -> None:
    bundle = Bundle.open(synthetic_bundle)
    given = {name: verify._inputs(bundle, load(bundle, name, "onnxruntime", threads=1), 3) for name in GRAPHS}
    head, text = given["flow_head"], given["text_encoder"]
    assert (head["r"] <= head["s"]).all() and head["s"].min() >= 0 and head["s"].max() <= 1
    assert np.allclose(head["rope_cos"] ** 2 + head["rope_sin"] ** 2, 1, atol=1e-6)
    assert 0 < text["attention_mask"].sum() < text["attention_mask"].size
    assert head["y"].shape == (1, 16, 3, 8, 12) and head["features"].shape[1] == 72


def measured(precision: str, expected: np.ndarray, found: np.ndarray) -> str | None:
    return _compare(GraphCheck("g", precision, "e"), {"o": expected}, {"o": found}).problem


@pytest.mark.parametrize(
    ("precision", "size", "noise", "passes"),
    [
        ("fp32", 1.0, 0.9e-4, True),
        ("fp32", 1.0, 1.5e-4, False),
        ("fp32", 10.0, 9e-4, True),  # a tenth of a thousandth of the output's size
        ("bf16", 1.0, 0.013, True),  # cosine about 1 - noise^2 / 2
        ("bf16", 1.0, 0.016, False),
        ("fp16", 1.0, 0.016, False),
        ("int8", 1.0, 0.13, True),
        ("fp8", 1.0, 0.16, False),
    ],
)
def test_gates_are_those_of_the_precision(precision: str, size: float, noise: float, passes: bool) -> None:
    rng = np.random.default_rng(0)
    expected = size * rng.choice([-1.0, 1.0], 10_000)
    found = expected + noise * rng.choice([-1.0, 1.0], 10_000)
    assert (measured(precision, expected, found) is None) == passes


@pytest.mark.parametrize(("off", "passes"), [(0, True), (1, True), (2, False)])
def test_frames_of_an_fp32_graph_may_be_one_level_off(off: int, passes: bool) -> None:
    expected = np.full(64, 100, np.uint8)
    found = expected.copy()
    found[5] += off
    assert (measured("fp32", expected, found) is None) == passes
    assert (measured("fp32", found, expected) is None) == passes
