"""`tmd-distill` for a Transition Model as a user types it: prepare, tim, evaluate, two steps each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tmd_export import open_source
from tmd_ref.checkpoint import load_model
from tmd_ref.distill.cli import main
from tmd_ref.distill.data import LatentDataset, still
from tmd_ref.distill.tim_evaluate import score
from tmd_ref.distill.vae import to_video
from tmd_ref.distill.weights import load_vae
from tmd_ref.scenes import sample_scene
from tmd_ref.tim.model import TIM_CONFIGS, TiM

SHIPPED = Path(__file__).parents[2] / "tmd_ref" / "weights" / "tiny"
SHORT = (
    "data.clips=16", "data.shard=8", "tim.steps=2", "tim.batch=4", "evaluate.captions=4", "evaluate.steps=[1,3]",
    "evaluate.guidance=2",
)  # fmt: skip


def distill(command: str, run: Path, config: str = "tim-tiny") -> Result:
    changes = [word for setting in SHORT for word in ("--set", setting)]
    arguments = [command, "--config", config, "--run", str(run), "--inputs", str(SHIPPED), *changes]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tim")
    for command in ("prepare", "tim", "evaluate"):
        done = distill(command, run)
        assert done.exit_code == 0, done.output
    return run


def test_data_are_the_middle_frames_of_the_scenes(made: Path) -> None:
    data = LatentDataset(made / "data", (1, 8, 8))
    assert len(data) == 16
    scene = sample_scene(np.random.default_rng([4, 0]))
    expected = load_vae(SHIPPED / "vae.safetensors").encode(to_video(still(scene)[None, None]))[0]
    torch.testing.assert_close(data.latents(0), expected, rtol=0, atol=5e-3)  # stored in float16


def test_a_trained_model_is_left_and_measured(made: Path) -> None:
    assert load_model(made / "tim.safetensors", TiM).config == TIM_CONFIGS["tim-tiny"]
    rows = json.loads((made / "evaluation.json").read_text())["rows"]
    assert [row["nfe"] for row in rows.values()] == [0, 1, 5]  # the first step is not guided
    assert set(rows["autoencoder"]) == {"nfe", "shape", "color", "background", "all", "frechet"}
    assert rows["autoencoder"]["all"] >= 0.75 > rows["1 steps"]["all"]
    assert (made / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_packed_weights_are_a_checkpoint_for_export(made: Path) -> None:
    assert distill("pack", made).exit_code == 0
    source = open_source("tim-tiny", made / "weights")
    source.check(source.default_parts)
    assert source.default_parts == ("encoder", "text_encoder", "backbone", "flow_head", "decoder_first")
    assert sum(file.stat().st_size for file in (made / "weights").iterdir()) < 10e6
    trained = load_model(made / "tim.safetensors", TiM)
    weight = source.tensor("student", "prompt.sides.0.kv.weight")
    assert torch.equal(weight, trained.get_parameter("blocks.0.cross_attn.kv.weight").half())


def test_rendered_stills_are_read_back() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(24)]
    stills = np.stack([still(scene) for scene in scenes])
    assert score(scenes, stills) == {"shape": 1, "color": 1, "background": 1, "all": 1}
    assert score(scenes, np.roll(stills, 1, 0))["all"] < 0.2


def test_a_command_of_another_kind_says_which_go(made: Path) -> None:
    for command, config, text in (("stage1", "tim-tiny", "prepare, tim"), ("tim", "tiny", "teacher, stage1")):
        done = distill(command, made, config) if config == "tim-tiny" else CliRunner().invoke(
            main, [command, "--config", config, "--run", str(made)]
        )  # fmt: skip
        assert done.exit_code == 2 and text in done.output
