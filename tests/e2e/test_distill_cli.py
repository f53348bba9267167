"""`tmd-distill` from nothing to an evaluation, two steps a stage; the result is a checkpoint for export."""

import dataclasses
import json
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tmd_runtime
from tmd_export import export_bundle, open_source
from tmd_ref.captions import caption
from tmd_ref.distill import config, tiny
from tmd_ref.distill.cli import main
from tmd_ref.distill.evaluate_videos import write_mp4
from tmd_ref.distill.prepare import read_video
from tmd_ref.scenes import render, sample_scene

SHORT = ["data.clips=16", "data.shard=8", "teacher.steps=2", "teacher.batch=4", "stage1.steps=2", "stage1.batch=4",
         "stage2.steps=5", "stage2.batch=4", "evaluate.captions=12", "evaluate.teacher_steps=2",
         "machine.compile=false"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run folder of `tiny all`, and what it printed, once and a second time."""
    run = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        short = {name: dataclasses.replace(schedule, steps=2) for name, schedule in tiny.SCHEDULES.items()}
        patch.setattr(tiny, "SCHEDULES", short)
        patch.setattr(tiny, "load_config", lambda name: config.load_config(name, SHORT))
        patch.setattr(tiny, "channel_statistics", partial(tiny.channel_statistics, clips=8))
        patch.setattr(torch.nn.Module, "compile", lambda self: None)  # a minute of compiling for two steps
        done = [CliRunner().invoke(main, ["tiny", "all", "--run", str(run)], catch_exceptions=False) for _ in range(2)]
    return run, done


def distill(command, run, *options, settings=SHORT):
    changes = [word for setting in settings for word in ("--set", setting)]
    arguments = [command, "--config", "tiny", "--run", str(run), *changes, *options]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_all_stages_run_and_give_a_checkpoint_for_export(made):
    run, (first, again) = made
    assert first.exit_code == 0, first.output
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert [row["nfe"] for row in rows.values()] == [0, 4, 2.5]
    assert all(row["frechet"] > 0 for row in rows.values()) and "diversity" in list(rows.values())[-1]
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    source: Any = open_source("tiny", checkpoint=run / "weights")
    assert source.head_blocks == 2
    assert again.exit_code == 0 and again.output.count("is there, skipped") == 9


@pytest.mark.slow  # a minute, for settings that unit tests hold too
def test_the_baseline_and_its_warm_up_share_data_and_teacher(made, tmp_path):
    run, _ = made
    baseline = [*SHORT, "student.head_blocks=0", "student.outer_steps=1", "stage1.objective=kd",
                "stage1.pairs={count: 5, sampler_steps: 2, shift: 3, skip_layers: [3]}"]  # fmt: skip
    for command in ("stage1", "stage2", "evaluate"):
        done = distill(command, tmp_path, "--inputs", str(run), settings=baseline)
        assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert {"DMD2-v warm-up M=1": 1, "DMD2-v M=1": 1}.items() <= {
        name: row["nfe"] for name, row in rows.items()
    }.items()


@pytest.mark.parametrize(
    ("command", "options", "code", "message"),
    [
        ("teacher", (), 1, "there is no data"),
        ("stage2", ("--set", "stage2.stepz=1"), 2, "stage2.stepz: unknown key"),
        ("stage1", ("--device", "cuda"), 1, "no NVIDIA GPU"),
        ("prepare", ("--set", "data.clips=null"), 2, "--videos"),
        ("stage1", ("--set", "data.frames=33"), 1, "another resolution"),
        ("evaluate", ("--clips", "5"), 2, "--videos"),
        ("evaluate", ("--set", "sources.teacher=setup.cfg"), 1, "setup.cfg"),
    ],
)
def test_what_is_missing_or_wrong_is_said_in_one_line(made, tmp_path, command, options, code, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run, _ = made
    inputs = () if command == "teacher" else ("--inputs", str(run))
    done = distill(command, tmp_path, *inputs, *options)
    assert done.exit_code == code and message in done.output, done.output
    assert "Traceback" not in done.output


def test_data_are_prepared_anew_in_another_folder_alone(made):
    run, _ = made
    again = distill("prepare", run, settings=[*SHORT, "data.seed=9"])
    assert again.exit_code == 1 and "made with another seed" in again.output, again.output
    assert distill("prepare", run).exit_code == 0


@pytest.mark.parametrize("name", ["teacher.safetensors", "student.safetensors", "tokenizer.model", "umt5.safetensors"])
def test_a_file_that_is_cut_is_named(made, tmp_path, name):
    run, _ = made
    (tmp_path / name).write_bytes((run / name).read_bytes()[:5000])
    done = distill("evaluate", tmp_path, "--inputs", str(run))
    assert done.exit_code == 1 and name in done.output and "Traceback" not in done.output, done.output


def test_a_packing_that_was_stopped_is_done_again(made, tmp_path, monkeypatch):
    run, _ = made
    whole = tmp_path / "run"
    shutil.copytree(run, whole)
    (whole / "weights" / "recipe.json").unlink()
    (whole / "weights" / "student.safetensors").unlink()
    (whole / "evaluation.json").unlink()
    monkeypatch.setattr(tiny, "evaluate", lambda run, report: None)
    tiny.all(whole, lambda line: None)
    assert (whole / "weights" / "student.safetensors").is_file()


def test_a_finished_stage_is_not_kept_when_its_input_was_replaced(made, tmp_path):
    run, _ = made
    teacher = shutil.copy(run / "teacher.safetensors", tmp_path / "teacher.safetensors")
    options = ("--inputs", str(run), "--set", f"sources.teacher={teacher}")
    assert distill("stage1", tmp_path, *options).exit_code == 0
    again = distill("stage1", tmp_path, *options)
    assert again.exit_code == 0 and "is finished, at step 2: delete it to train anew" in again.output
    weights = load_file(teacher)
    save_file({name: value * 2 for name, value in weights.items()}, teacher)
    other = distill("stage1", tmp_path, *options)
    assert other.exit_code == 1 and f"was made with another input {teacher}" in other.output
    missing = distill("stage1", tmp_path / "empty", "--set", "sources.teacher=nowhere.safetensors")
    assert missing.exit_code == 1 and "--inputs DIR" in missing.output and "--set sources.NAME=FILE" in missing.output


def test_a_student_starts_from_a_few_step_model_if_one_is_given(made, tmp_path):
    """Its weights, not the teacher's, are those of the first step; the teacher stays the one of stage 2."""
    run, _ = made
    few = {name: weight + 0.25 for name, weight in load_file(run / "teacher.safetensors").items()}
    with safe_open(run / "teacher.safetensors", "pt") as file:
        save_file(few, tmp_path / "few.safetensors", file.metadata())
    given = ("--inputs", str(run), "--set", "sources.student=few.safetensors", "--set", "stage1.optimizer.lr=1e-12")
    done = distill("stage1", tmp_path, *given)
    assert done.exit_code == 0, done.output
    made_of = load_file(tmp_path / "student_stage1.safetensors")
    for theirs, ours in (("blocks.0.ffn.0.weight", "backbone.blocks.0.ffn.0.weight"),
                         ("blocks.7.ffn.0.weight", "head.blocks.1.ffn.0.weight")):  # fmt: skip
        assert (made_of[ours] - few[theirs]).abs().max() < 1e-4
    missing = distill("stage1", tmp_path / "other", *given)
    assert missing.exit_code == 1 and "there is no few.safetensors" in missing.output
    baseline = [*SHORT, f"sources.student={tmp_path / 'few.safetensors'}", "stage1.optimizer.lr=1e-12",
                "student.head_blocks=0", "student.outer_steps=1", "stage1.objective=kd",
                "stage1.pairs={count: 4, sampler_steps: 1, shift: 3}"]  # fmt: skip
    done = distill("stage1", tmp_path / "baseline", "--inputs", str(run), settings=baseline)
    assert done.exit_code == 0, done.output
    made_of = load_file(tmp_path / "baseline" / "generator_stage1.safetensors")
    assert (made_of["blocks.0.ffn.0.weight"] - few["blocks.0.ffn.0.weight"]).abs().max() < 1e-4


def test_real_clips_become_a_bundle_and_are_compared_with(made, tmp_path):
    """mp4 files and captions -> shards -> teacher -> student -> bundle -> evaluation, with clips named for VBench."""
    inputs, _ = made
    run, rng = tmp_path / "run", np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(4)]
    captions = [caption(scene, rng) for scene in scenes]
    for name, chosen in (("train", range(4)), ("held", range(2, 4))):
        lines = [{"video": f"{number}.mp4", "caption": captions[number]} for number in chosen]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, scene in enumerate(scenes):
        write_mp4(tmp_path / f"{number}.mp4", render(scene), 8)
    size = ["data.size=[32, 32]", "data.frames=5", "data.fps=8", "data.clips=null"]
    settings = [*SHORT, *size, "stage2.steps=1", "stage2.gan_weight=0.03"]
    training, held_out = (str(tmp_path / f"{name}.jsonl") for name in ("train", "held"))
    for command, *more in (("prepare", "--videos", training), ("teacher",), ("stage1",), ("stage2",),
                           ("evaluate", "--videos", held_out, "--clips", "2")):  # fmt: skip
        done = distill(command, run, "--inputs", str(inputs), *more, settings=settings)
        assert done.exit_code == 0, done.output
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert list(rows) == ["autoencoder", "teacher 2x2", "TMD stage 1 M=2 N=2", "TMD M=2 N=2"]
    assert all(np.isfinite(row["frechet"]) for row in rows.values())  # of two clips, so no order is to be expected
    names = {path.name for path in (run / "videos" / "TMD-M=2-N=2").iterdir()}
    assert names == {f"{captions[number]}-{index}.mp4" for number in (2, 3) for index in (0, 1)}
    one = run / "videos" / "TMD-M=2-N=2" / f"{captions[2]}-0.mp4"
    assert read_video(one, 5, (32, 32), 8).shape == (3, 5, 32, 32)
    export_bundle(open_source("tiny", checkpoint=run), tmp_path / "bundle", ("backbone", "flow_head"), verify=False)
    with tmd_runtime.load(tmp_path / "bundle", engine="onnxruntime", threads=1) as pipeline:
        latents = pipeline.denoise(np.ones((1, 8, 64), np.float32), seed=1, frames=5, size=(32, 32))
    assert latents.shape == (1, 16, 2, 4, 4)


def test_plan_says_what_fits_where():
    done = CliRunner().invoke(main, ["plan", "--config", "wan1.3b", "--gpus", "8"])
    assert done.exit_code == 0 and "fake score" in done.output and "TFLOP/s" in done.output
    done = CliRunner().invoke(main, ["plan", "--config", "tim-tiny"])
    assert done.exit_code == 2 and "there is no plan" in done.output
