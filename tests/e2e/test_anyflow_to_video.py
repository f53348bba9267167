"""A folder of AnyFlow, as diffusers writes it, through both commands, against diffusers' AnyFlowPipeline as it is."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.helpers import synthetic_checkpoints as made
from tests.helpers.flow_maps import random_flow_map, theirs_of
from tmd_engines import Bundle
from tmd_export import Source
from tmd_export.cli import command as tmd_export
from tmd_export.families import open as opening
from tmd_export.sources.wan import WanSource
from tmd_ref.text import Tokenizer
from tmd_ref.wan import WanConfig
from tmd_runtime import NoiseStream
from tmd_runtime.command.cli import command as tmd_run
from tmd_runtime.files.tensor_files import load_latents

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPT, SEED, SHAPE = "a red circle", 4, (1, 16, 2, 2, 4)  # 5 frames of 32x16


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nvidia/AnyFlow-Wan2.1-T2V-…-Diffusers` at a small width."""
    folder = made.write_diffusers(tmp_path_factory.mktemp("checkpoint") / "AnyFlow-small")
    for file in (folder / "transformer").iterdir():
        file.unlink()
    theirs_of(random_flow_map()).save_pretrained(folder / "transformer")
    made.write_scheduler(folder, diffusers.FlowMapEulerDiscreteScheduler(shift=5.0))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of the transformer are read; text encoder and VAE have fixed ones, which are small here."""

    def open_source(model: str | None, paths: tuple[Path, ...], *others: Any) -> Source:
        return WanSource(paths, model, vae=made.VAE, text=made.TEXT, head_blocks=1)

    monkeypatch.setattr(opening, "open_source", open_source)


def export(folder: Path, out: Path, *options: str) -> str:
    words = ["--checkpoint", folder, "--parts", "text_encoder,backbone,flow_head", "--out", out, *options]
    done = CliRunner().invoke(tmd_export, list(map(str, words)), catch_exceptions=False)
    return f"{done.exit_code} {done.output}"


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    with pytest.MonkeyPatch.context() as patch:
        small.__wrapped__(patch)  # type: ignore[attr-defined]
        printed = export(folder, out)
    assert printed.startswith("0") and "FlowMapEulerDiscreteScheduler, shift 5" in printed
    return out


def latents_of(bundle: Path, *options: object) -> tuple[np.ndarray, dict[str, Any]]:
    file = bundle.parent / "latents.safetensors"
    wishes = ("--prompt", PROMPT, "--seed", SEED, "--frames", 5, "--size", "32x16", "--threads", 1, "--json")
    words = ("--bundle", bundle, *wishes, "--engine", "onnxruntime", "--save-latents", file, *options)
    done = CliRunner().invoke(tmd_run, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return load_latents(file, Bundle.open(bundle).manifest).latents, json.loads(done.stdout)


def embeds(folder: Path, prompt: str) -> torch.Tensor:
    """What transformers' UMT5 makes of `prompt`, zero behind it."""
    tokenizer = Tokenizer(
        folder / "tokenizer" / "spiece.model", WanConfig.text_len
    )  # a folder in this layout does not say it
    ids, mask = (torch.from_numpy(value) for value in tokenizer([prompt]))
    found: torch.Tensor = made.models().theirs["text_encoder"](ids, mask).last_hidden_state * mask[..., None]
    return found.detach()


def pipeline_latents(folder: Path, steps: int, guidance: float = 1.0) -> np.ndarray:
    """AnyFlowPipeline on the folder, with its own times and noise."""
    transformer = diffusers.AnyFlowTransformer3DModel.from_pretrained(folder / "transformer")
    scheduler = diffusers.FlowMapEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    vae = made.models().theirs["vae"]
    pipeline = diffusers.AnyFlowPipeline(None, None, transformer=transformer, vae=vae, scheduler=scheduler)
    found = pipeline(
        prompt_embeds=embeds(folder, PROMPT),
        negative_prompt_embeds=None if guidance == 1 else embeds(folder, ""),
        guidance_scale=guidance,
        height=16,
        width=32,
        num_frames=5,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).frames
    return np.asarray(found)


@pytest.mark.parametrize(("steps", "guidance"), [(None, 1.0), (1, 1.0), (7, 1.0), (3, 4.0)])
def test_the_latents_are_those_of_the_pipeline(folder: Path, bundle: Path, steps: int | None, guidance: float) -> None:
    options = (*(("--steps", steps) if steps else ()), *(("--guidance", guidance) if guidance != 1 else ()))
    found, _ = latents_of(bundle, *options)
    expected = pipeline_latents(folder, steps or 4, guidance)
    assert 0.1 < expected.std() < 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_any_schedule_is_followed(folder: Path, bundle: Path) -> None:
    times = [1.0, 0.7, 0.25, 0.0]
    found, said = latents_of(bundle, "--schedule", ",".join(map(str, times)))
    assert said["steps"] == 3
    x = torch.from_numpy(NoiseStream(SEED).normal(SHAPE))
    model, prompt_embeds = random_flow_map(), embeds(folder, PROMPT)
    for t, r in pairwise(times):
        x = x - (t - r) * model(x, torch.tensor([t]), torch.tensor([r]), prompt_embeds)
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=1e-4)


def test_a_deadline_takes_fewer_steps(bundle: Path) -> None:
    found, said = latents_of(bundle, "--steps", 3, "--deadline", 1e-6)
    one, _ = latents_of(bundle, "--steps", 1)
    assert said["steps"] == 1 and np.array_equal(found, one)


def refusal(folder: Path, tmp_path: Path, *options: str) -> str:
    printed = export(folder, tmp_path / "b", *options)
    assert printed.startswith("1") and not (tmp_path / "b").exists()
    return printed


def changed(folder: Path, tmp_path: Path, **entries: Any) -> Path:
    """The folder with other entries in the transformer's config.json; weights are links."""
    other = tmp_path / "other"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        link = other / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    config = other / "transformer" / "config.json"
    stated = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**stated, **entries}))
    return other


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "preset rcm is for rCM" in refusal(folder, tmp_path, "--preset", "rcm")
    other = changed(folder, tmp_path, deltatime_type="t-r")
    assert "only 'r', the time to go to" in refusal(other, tmp_path)


def test_a_scheduler_for_one_time_is_refused(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path)
    (other / "scheduler" / "scheduler_config.json").unlink()
    made.write_scheduler(other, diffusers.UniPCMultistepScheduler(**made.UNIPC))
    assert "sampled by UniPCMultistepScheduler, and its transformer is told two times" in refusal(other, tmp_path)


def test_the_gate_is_that_of_the_config(folder: Path, tmp_path: Path) -> None:
    source = WanSource([changed(folder, tmp_path, gate_value=0.5)], vae=made.VAE, text=made.TEXT, head_blocks=1)
    assert (source.family, source.gate) == ("anyflow", 0.5)
