"""8 bits as a user gets them: prompts of one's own, a bundle in fp8 and int8, and a video of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tmd_runtime
from benchmarks.ms_ssim import ms_ssim
from tmd_export.cli import command

PROMPT = "a red circle moving left on a black background"


def export(*arguments: str | Path) -> dict[str, dict[str, object]]:
    result = CliRunner().invoke(command, ["--model", "tiny", "--json", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    graphs: dict[str, dict[str, object]] = json.loads(result.stdout)["graphs"]
    return graphs


@pytest.mark.slow
def test_a_video_in_8_bits_shows_what_it_shows_in_fp32(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\na small blue star spinning on a gray background\n", encoding="utf-8")
    graphs = export("--precision", "backbone=fp8,flow_head=int8", "--calibration", prompts, "--out", tmp_path / "mixed")
    assert {graphs[name]["precision"] for name in ("backbone", "flow_head")} == {"fp8", "int8"}
    calibration = tmp_path / "mixed" / "calibration.json"
    assert json.loads(calibration.read_text())["prompts"][0] == PROMPT
    graphs = export("--precision", "int8", "--calibration", calibration, "--out", tmp_path / "int8")
    assert graphs["decoder_step"]["precision"] == graphs["text_encoder"]["precision"] == "bf16"
    export("--out", tmp_path / "fp32")
    frames = {}
    for name in ("fp32", "mixed", "int8"):
        with tmd_runtime.load(tmp_path / name) as pipeline:
            frames[name] = pipeline(PROMPT, seed=3).frames
    for name in ("mixed", "int8"):
        assert ms_ssim(frames[name], frames["fp32"], 3) > 0.9
        assert np.abs(frames[name].astype(int) - frames["fp32"]).mean() < 8
