"""A new engine is a class and a line in the registry: shared code asks the class, and never for a name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.helpers.reference_engine import ReferenceEngine
from tests.helpers.synthetic import GRAPHS
from tmd_engines import Bundle, EngineError, load
from tmd_engines.command.cli import main
from tmd_engines.registry import ENGINES, choose, engine_names


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "reference", {"cpu": ReferenceEngine})


def test_it_verifies_a_bundle_against_onnx_runtime(synthetic_bundle: Path) -> None:
    done = CliRunner().invoke(main, ["verify", str(synthetic_bundle), "--engine", "reference", "--json"])
    assert done.exit_code == 0, done.output
    checks = json.loads(done.stdout)["graphs"]
    assert [(check["graph"], check["engine"]) for check in checks] == [(graph, "reference") for graph in GRAPHS]


def test_it_builds_and_the_doctor_knows_it(synthetic_bundle: Path) -> None:
    done = CliRunner().invoke(main, ["build", str(synthetic_bundle), "--engine", "reference"])
    assert done.exit_code == 0 and done.stdout.count("reference on cpu") == len(GRAPHS), done.output
    assert "to compare with" in CliRunner().invoke(main, ["doctor"]).stdout


def test_names_and_refusals_come_from_its_class(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reference" in engine_names()
    bundle = Bundle.open(synthetic_bundle)
    with pytest.raises(EngineError, match="runs on device cpu, not on cuda"):
        load(bundle, "backbone", "reference", "cuda")
    assert choose(bundle, "backbone", device="cpu") == ("onnxruntime", "cpu")  # it does not put itself forward
    monkeypatch.setattr(ReferenceEngine, "precisions", ("fp16",))
    done = CliRunner().invoke(main, ["build", str(synthetic_bundle), "--engine", "reference"])
    assert done.exit_code == 1 and "is fp32" in done.output and "a bundle in fp16" in done.output


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_where_no_engine_is_the_message_fits_the_device(
    device: str, synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmd_engines.registry.ENGINES", {})
    with pytest.raises(EngineError, match="tmd-engine doctor says what is missing") as refused:
        choose(Bundle.open(synthetic_bundle), "backbone", device=device)
    assert ("leave the device to auto" in str(refused.value)) == (device != "auto")
