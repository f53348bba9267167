"""`tmd-distill tiny all` from nothing to an evaluation, two steps a stage; the result is a checkpoint for export."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from tmd_export.sources import open_source
from tmd_ref.distill import evaluate, tiny
from tmd_ref.distill.cli import main


@pytest.fixture
def two_steps(monkeypatch):
    short = {name: dataclasses.replace(schedule, steps=2) for name, schedule in tiny.SCHEDULES.items()}
    monkeypatch.setattr(tiny, "SCHEDULES", short)
    monkeypatch.setattr(tiny, "CLIPS", 16)
    monkeypatch.setattr(tiny, "BATCH", 4)
    monkeypatch.setattr(tiny, "channel_statistics", partial(tiny.channel_statistics, clips=8))
    monkeypatch.setattr(evaluate, "evaluate", partial(evaluate.evaluate, count=12))
    monkeypatch.setattr(evaluate, "TEACHER_STEPS", 2)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # a minute of compiling for two steps


def test_all_stages_run_and_give_a_checkpoint_for_export(two_steps, tmp_path):
    done = CliRunner().invoke(main, ["tiny", "all", "--run", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [row["nfe"] for row in rows.values()] == [0, 4, 2.5]
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert open_source("tiny", checkpoint=tmp_path / "weights").head_blocks == tiny.HEAD_BLOCKS

    again = CliRunner().invoke(main, ["tiny", "all", "--run", str(tmp_path)])
    assert again.exit_code == 0 and again.output.count("is there, skipped") == 8


def test_a_stage_without_the_stages_before_it_says_what_is_missing(tmp_path):
    done = CliRunner().invoke(main, ["tiny", "teacher", "--run", str(tmp_path)])
    assert done.exit_code == 1
    assert "data.safetensors" in done.output
