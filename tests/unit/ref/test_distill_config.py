"""Configs: typed, with the paper's values, every error with file, line and key; the paper budget."""

import pytest

from tmd_ref.distill.budget import memory, sizes, work
from tmd_ref.distill.config import FOLDER, ConfigError, load_config
from tmd_ref.distill.tim_config import load_any


def test_the_papers_values_are_in_the_configs():
    small, large = load_config("wan1.3b"), load_config("wan14b")
    assert small.data.latent_size == large.data.latent_size == (21, 60, 104)
    assert (small.student.head_blocks, small.student.inner_steps) == (5, 2)
    assert (large.student.head_blocks, large.student.inner_steps) == (5, 4)
    assert (small.stage1.optimizer.lr, large.stage1.optimizer.lr) == (3e-5, 1e-5)
    assert (small.stage1.steps, small.stage1.delta, small.stage1.dropout) == (3000, 5e-3, 0.1)
    assert (small.stage1.weight_constant, large.stage1.weight_constant) == (1, 1e-5)
    assert (small.stage2.depths, large.stage2.depths) == ((15, 22, 29), (19, 29, 39))
    assert (small.stage2.steps, large.stage2.steps) == (4000, 1000)
    assert {c.stage2.gan_weight for c in (small, large)} == {0.03} and small.stage2.generator.lr == 1e-5
    assert small.stage2.generator.schedule(10).lr_at(9) == 1e-5, "the paper's rate is constant"
    assert len(small.data.negative_prompt.split()) > 40


@pytest.mark.parametrize("name", [file.stem for file in FOLDER.glob("*.yaml")])
def test_every_packaged_config_loads(name):
    assert name.removesuffix("-flow").removesuffix("-meanflow") == load_any(name).model


BROKEN = {
    "stage2:\n  stepz: 3\n": r"broken.yaml, line 3: stage2.stepz: unknown key",
    "stage2:\n  steps: many\n": r"line 3: stage2.steps: .*integer.*'many'",
    "stage1:\n  optimizer: {lr: -1}\n": r"line 3: stage1.optimizer.lr: .*greater than 0",
    "data: {size: [60, 64]}\n": r"line 2: data: .*multiples of 16",
    "data: {frames: 16}\n": r"line 2: data: .*4k \+ 1",
    "model: wan2b\n": r"model 'wan2b'.*tiny",
    "stage2: {depths: [3, 8]}\n": r"blocks of tiny are 0 to 7",
    "stage2: {depths: []}\n": r"stage2.depths \[\]: blocks of tiny are 0 to 7",
    "stage2: {depths: [-1]}\n": r"blocks of tiny are 0 to 7",
    "student: {head_blocks: 0}\nstage1: {objective: kd}\n": r"needs stage1.pairs",
    "student: {head_blocks: 2}\nstage1: {objective: kd}\n": r"kd belongs to the baseline",
    "stage2:\n  steps: 3\n  steps: 4\n": r"line 4: stage2.steps is given twice",
    "stage2: [\n": r"is no YAML file",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_config_says_where_and_what(text, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("base: tiny\n" + text)
    with pytest.raises(ConfigError, match=BROKEN[text]):
        load_config(str(path))


def test_single_settings_can_be_changed_and_are_checked_too():
    config = load_config("tiny", ["stage2.steps=7", "student.outer_steps=1", "stage2.depths=[1, 2]"])
    assert (config.stage2.steps, config.student.outer_steps, config.stage2.depths) == (7, 1, (1, 2))
    baseline = load_config("tiny", ["student.head_blocks=0", "student.outer_steps=4"])
    assert not baseline.student.is_tmd and baseline.stage1.objective == "meanflow", "which stage1 refuses to run"
    with pytest.raises(ConfigError, match=r"^--set stage2.steps=0: stage2.steps: .*greater than 0"):
        load_config("tiny", ["stage2.steps=0"])
    with pytest.raises(ConfigError, match=r"^--set stage2=\{stepz: 3\}: stage2.stepz: unknown key"):
        load_config("tiny", ["stage2={stepz: 3}"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_config("tiny", ["stage2.steps"])
    with pytest.raises(ConfigError, match=r"wan1\.3b"):
        load_config("wan2b")


def test_the_budget_counts_the_published_sizes():
    """1.4190 B and 14.2885 B parameters, 283 and 14B's 480p forward from the layers' shapes; see the config's sizes."""
    small, large = sizes(load_config("wan1.3b")), sizes(load_config("wan14b"))
    assert (small.wan, large.wan) == (1_418_996_800, 14_288_491_584)
    assert small.tokens == 32_760
    assert 30 * small.block_flops == pytest.approx(283e12, rel=0.01)
    assert small.student / small.wan == pytest.approx(1.03, abs=0.005)
    eight, sixteen = (sum(need.optimizer for need in memory(load_config("wan1.3b"), g)["stage2"]) for g in (8, 16))
    assert eight == pytest.approx(2 * sixteen)
    assert eight * 8 == pytest.approx(8 * (small.student + small.wan + small.discriminator))
    plain, rolled = (work(load_config("wan1.3b", [f"student.inner_steps={n}"]))["stage2"] for n in (1, 2))
    assert 1 < rolled / plain < 1.17, "the paper: a rollout of 2 costs less than 17 % of the student's update"
