"""The words and exit codes of `tmd-export`; what it writes is tested elsewhere."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from tests.helpers.export_tools import skip_tracing, small_source
from tmd_export import ExportError, graph_export
from tmd_export.cli import command
from tmd_export.families import models
from tmd_export.families import open as opening
from tmd_export.parts import VIDEO_PARTS
from tmd_export.sources.wan21 import HEAD_BLOCKS
from tmd_ref.distill.cli import main as distill


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports the small model, without the seconds of tracing."""
    monkeypatch.setattr(opening, "open_source", lambda *_: small_source())
    skip_tracing(monkeypatch)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_summary_names_every_graph_with_its_error(quick: None, tmp_path: Path) -> None:
    result = run("--model", "tiny", "--random-weights", 0, "--out", tmp_path / "b")
    assert result.exit_code == 0
    for part in VIDEO_PARTS:
        assert part in result.stdout
    assert "max error" in result.stdout and "e-0" in result.stdout and str(tmp_path / "b") in result.stdout
    assert "backbone (2 of 6)" in result.stderr


def test_json_is_one_document(quick: None, tmp_path: Path) -> None:
    out = tmp_path / "b"
    result = run("--model", "tiny", "--out", out, "--parts", "flow_head,backbone", "--json")
    document = json.loads(result.stdout)
    assert list(document["graphs"]) == ["backbone", "flow_head", "update"]
    graph = document["graphs"]["backbone"]
    assert graph["nodes"] > 50 and graph["precision"] == "fp32" and graph["accuracy"]["cosine"] > 0.9999
    assert document["bytes"] == sum(file.stat().st_size for file in out.iterdir() if file.name != "manifest.json")


def test_quiet_says_nothing_and_no_verify_says_not_measured(quick: None, tmp_path: Path) -> None:
    arguments = ("--model", "tiny", "--parts", "text_encoder", "--no-verify", "--out")
    result = run(*arguments, tmp_path / "a", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert "not measured" in run(*arguments, tmp_path / "b").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "wan1.3b"], "give --checkpoint PATH or --random-weights SEED"),
        (["--model", "wan2"], "'wan2' is not one of"),
        ([], "there is no --model and no --checkpoint"),
        (["--model", "tiny", "--parts", "head"], "there is no part 'head': choose among encoder, text_encoder"),
        (["--model", "tiny", "--parts", ","], "no part is named"),
        (["--model", "tiny", "--random-weights", "x"], "'x' is not a valid integer"),
        (["--model", "tiny", "--random-weights", "-1"], "-1 is not in the range"),
        (["--model", "tiny", "--random-weights", "1", "--checkpoint", "c"], "two sources of weights"),
        (["--model", "tiny", "--precision", "fp4"], "there is no precision 'fp4': choose among fp32, fp16, bf16, int8"),
        (["--model", "tiny", "--precision", "decoder=fp8"], "decoder_first cannot be fp8, only backbone and flow_head"),
        (["--model", "tiny", "--calibration", "prompts.txt"], "--calibration is for --precision int8, fp8 or nvfp4"),
        (["--model", "tiny", "--keep-no-layers"], "--keep-no-layers is for --precision int8, fp8 or nvfp4"),
        (["--model", "tiny", "--precision", "head=fp16"], "there is no part 'head'"),
    ],
)
def test_bad_usage_ends_with_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = run(*arguments, "--out", tmp_path / "b")
    assert result.exit_code == 2 and said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_failure_ends_with_1_and_one_sentence(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ExportError("the weights are damaged.")

    monkeypatch.setattr(graph_export, "trace", fail)
    arguments = ("--model", "tiny", "--out", tmp_path / "b", "--parts", "text_encoder", "--quiet")
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (1, "tmd-export: the weights are damaged.\n")
    assert json.loads(run(*arguments, "--json").stdout) == {"error": "the weights are damaged."}
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_none_and_a_taken_name_end_with_1(tmp_path: Path) -> None:
    result = run("--model", "tiny", "--checkpoint", tmp_path, "--out", tmp_path / "b")
    assert result.exit_code == 1 and "has no student.safetensors" in result.stderr
    (tmp_path / "taken").write_text("mine")
    result = run("--model", "tiny", "--random-weights", 0, "--out", tmp_path / "taken")
    assert result.exit_code == 1 and "is not a folder: choose another --out" in result.stderr
    assert (tmp_path / "taken").read_text() == "mine"


def test_ctrl_c_leaves_nothing(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graph_export, "lint", interrupt)  # files are written by then
    result = run("--model", "tiny", "--out", tmp_path / "b", "--parts", "text_encoder", "--quiet")
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_export, "save", full)
    result = run("--model", "tiny", "--out", tmp_path / "b", "--parts", "text_encoder", "--quiet")
    assert result.exit_code == 1 and "No space left on device. Free some space" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "name"), [(command, "tmd-export"), (distill, "tmd-distill")])
def test_a_command_prints_its_version(command: click.Command, name: str) -> None:
    result = CliRunner().invoke(command, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{name} {version('tmd-runtime')}\n")


def test_models_of_the_command_line_are_those_of_the_reference() -> None:
    from tmd_ref.tim.model import TIM_CONFIGS
    from tmd_ref.wan import WAN_CONFIGS

    assert set(models()) == {*WAN_CONFIGS, *TIM_CONFIGS} and set(WAN_CONFIGS) == set(HEAD_BLOCKS)
