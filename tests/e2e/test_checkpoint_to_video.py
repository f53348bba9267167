"""Every published layout with every preset, through both commands, against diffusers and transformers; every refusal.

Small widths, from the prompt to the latents; the decoder has no part in what a preset says, and its layouts and graphs
have tests of their own (`tests/parity`). The networks of the expected values are theirs, and so is UniPC; times and
updates of the other rules are written out here. Tracing takes longer than all else, so each graph is traced once and
gets the weights of each layout anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import expert_files, lora_files
from tests.helpers import synthetic_checkpoints as made
from tmd_engines import Bundle
from tmd_export import ExportError, Source, graph_export
from tmd_export.checkpoints.experts import experts_of
from tmd_export.checkpoints.names import converted
from tmd_export.cli import command as tmd_export
from tmd_export.families import open as opening
from tmd_export.families import presets
from tmd_export.families.wan import WAN as WAN_FAMILY
from tmd_export.graphs.graph import Graph
from tmd_export.graphs.trace import trace
from tmd_export.inspection import inspect
from tmd_export.presets.wan import WAN21
from tmd_export.sources.experts import TwoTransformers
from tmd_export.sources.loras import with_loras
from tmd_export.sources.wan import WanSource
from tmd_export.weights.weights import Weights
from tmd_ref.samplers import tmd_sample
from tmd_ref.student import GatedFusion, TMDStudent, save_student
from tmd_ref.text import Tokenizer
from tmd_runtime import NoiseStream
from tmd_runtime.command.cli import command as tmd_run
from tmd_runtime.files.tensor_files import load_latents

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

State = dict[str, Tensor]
PROMPT, SEED, SHAPE = "a red circle", 4, (1, 16, 2, 2, 4)  # 5 frames of 32x16
GRAPHS = "text_encoder,backbone,flow_head"
STEPS = {"wan": 3}  # in place of 50; otherwise the preset's own
PRESETS = presets()
WAN_PRESETS = [name for name, preset in WAN_FAMILY.presets.items() if preset.architecture == WAN21]


def diffusers_folder(folder: Path) -> list[Path]:
    return [made.write_diffusers(folder)]


def original_folder(folder: Path) -> list[Path]:
    return [made.write_original(folder)]


def six_shards(folder: Path) -> list[Path]:
    return [made.write_original(folder, shards=6)]


def as_rcm_writes_it(folder: Path) -> list[Path]:
    """A `.pt` of its own, with prefix, flat patches and a counter, and the folder of the model it was made from."""
    made.write_original(folder)
    state = {f"net.{name}": weight for name, weight in made.models().state("transformer").items()}
    state["net.patch_embedding.weight"] = state["net.patch_embedding.weight"].flatten(1)
    state["net.accum_video_sample_counter"] = torch.tensor(7)
    torch.save(state, folder.parent / "rCM.pt")
    return [folder.parent / "rCM.pt", folder]


def as_comfy_writes_it(folder: Path) -> list[Path]:
    """Three single files and a tokenizer."""
    made.write_original(folder)
    state = {f"model.diffusion_model.{name}": w for name, w in made.models().state("transformer").items()}
    save_file(state, folder.parent / "wan.safetensors")
    files = ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model")
    return [folder.parent / "wan.safetensors", *(folder / name for name in files)]


LAYOUTS: dict[str, Callable[[Path], list[Path]]] = {
    "diffusers": diffusers_folder,
    "original": original_folder,
    "six shards": six_shards,
    "rcm": as_rcm_writes_it,
    "comfy": as_comfy_writes_it,
}


TWO: dict[str, Callable[[Path], list[Path]]] = {  # of Wan2.2-A14B
    "diffusers": lambda folder: [expert_files.write_diffusers(folder)],
    "original": lambda folder: [expert_files.write_original(folder)],
    "files": expert_files.write_files,
}
ALL = ("--parts", f"{GRAPHS},backbone_2,flow_head_2")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return LAYOUTS[request.param](tmp_path_factory.mktemp("layout") / "Wan2.1-T2V-small")


@pytest.fixture(scope="module")
def traced() -> dict[tuple[str, str], onnx_ir.Model]:
    return {}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, traced: dict[tuple[str, str], onnx_ir.Model]) -> None:
    """`--model wan1.3b` has small sizes, and what was traced once is kept.

    Of weights, that holds at most small ones, which are the same in every layout, and in both transformers of two.
    """

    def trace_once(graph: Graph, weights: Weights) -> onnx_ir.Model:
        key = type(graph.module).__name__, graph.name.removesuffix("_2")
        if key not in traced:
            traced[key] = trace(graph, weights)
        return traced[key].clone()

    def open_source(model: str, paths: tuple[Path, ...], *others: Any) -> Source:
        experts, loras = experts_of(paths), others[-1]
        source: Source = TwoTransformers(experts, **made.SIZES) if experts else WanSource(paths, model, **made.SIZES)
        return with_loras(source, loras) if loras else source

    monkeypatch.setattr(opening, "open_source", open_source)
    monkeypatch.setattr(graph_export, "trace", trace_once)
    monkeypatch.setattr(graph_export.gc, "collect", lambda: 0)  # takes longer than what is left of an export


def export(paths: list[Path], out: Path, *options: object) -> Result:
    checkpoints = [word for path in paths for word in ("--checkpoint", path)]
    arguments = ("--model", "wan1.3b", *checkpoints, "--parts", GRAPHS, "--out", out, "--quiet", *options)
    return CliRunner().invoke(tmd_export, [str(word) for word in arguments], catch_exceptions=False)


def latents_of(bundle: Path, *options: object) -> np.ndarray:
    file = bundle.parent / "latents.safetensors"
    wishes = ("--prompt", PROMPT, "--seed", SEED, "--frames", 5, "--size", "32x16", "--threads", 1, "--quiet")
    arguments = ("--bundle", bundle, *wishes, "--engine", "onnxruntime", "--save-latents", file, *options)
    result = CliRunner().invoke(tmd_run, [str(word) for word in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return load_latents(file, Bundle.open(bundle).manifest).latents


@pytest.mark.long
@pytest.mark.parametrize("preset", WAN_PRESETS)
def test_a_layout_with_a_preset_gives_the_latents_of_diffusers(layout: list[Path], preset: str, tmp_path: Path) -> None:
    done = export(layout, tmp_path / "b", "--no-verify", "--preset", preset)
    assert done.exit_code == 0, done.output
    found = latents_of(tmp_path / "b", *(("--steps", STEPS[preset]) if preset in STEPS else ()))
    expected = expected_latents(preset)
    assert 0.1 < expected.std() < 10
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_folder_of_diffusers_on_its_grid_gives_the_latents_of_its_pipeline(name: str, tmp_path: Path) -> None:
    """The pipeline and its scheduler as they are, with their own times, noise and guidance."""
    settings: dict[str, Any] = made.UNIPC | {"flow_shift": 5.0} if name.startswith("UniPC") else {"shift": 5.0}
    scheduler = getattr(diffusers, name)(**settings)
    folder = made.write_diffusers(tmp_path / "Wan2.1-T2V-small")
    made.write_scheduler(folder, scheduler)
    done = export([folder], tmp_path / "b", "--no-verify", "--grid", "diffusers")
    assert done.exit_code == 0, done.output
    sampler: Any = Bundle.open(tmp_path / "b").manifest.sampler
    expected = latents_of_pipeline(scheduler, sampler, 4)
    found = latents_of(tmp_path / "b", "--steps", 4)
    assert 0.1 < expected.std() < 10
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", TWO)
def test_an_a14b_gives_the_latents_of_diffusers_pipeline(layout: str, tmp_path: Path) -> None:
    """Two networks, boundary and guidances are those of the pipeline; every layout says which network is which."""
    done = export(TWO[layout](tmp_path / "A14B"), tmp_path / "b", "--no-verify", "--grid", "diffusers", *ALL)
    assert done.exit_code == 0, done.output
    manifest: Any = Bundle.open(tmp_path / "b").manifest
    sampler = manifest.sampler
    assert (sampler.boundary, sampler.guidance, sampler.guidance_2, sampler.steps) == (0.875, 4.0, 3.0, 40)
    assert sampler.shift == (made.UNIPC["flow_shift"] if layout == "diffusers" else 12.0)
    assert manifest.model.architecture == "wan2.2-t2v-a14b"
    turns = list[str]()
    networks = {"high": made.models().theirs["transformer"], "low": expert_files.low_theirs()}
    hooks = [net.register_forward_hook(lambda *_, w=which: turns.append(w)) for which, net in networks.items()]
    scheduler = diffusers.UniPCMultistepScheduler(**made.UNIPC | {"flow_shift": sampler.shift})
    more = {"guidance_scale_2": sampler.guidance_2}
    expected = latents_of_pipeline(scheduler, sampler, 6, networks["low"], expert_files.BOUNDARY, **more)
    for hook in hooks:
        hook.remove()
    assert {"high", "low"} == set(turns) and turns == sorted(turns), "both have steps, each its own"
    assert 0.1 < expected.std() < 10
    for memory in ("all", "low"):
        found = latents_of(tmp_path / "b", "--steps", 6, "--memory", memory)
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


def test_lightning_with_a_lora_for_each_expert_gives_the_formula(tmp_path: Path) -> None:
    """Strength 0.125 as its authors say, one LoRA for both, and plain Euler through the published times."""
    folder = expert_files.write_original(tmp_path / "A14B")
    states, options = {"high": made.models().state("transformer"), "low": expert_files.low()}, list[object]()
    for seed, name, sides in ((1, "high_noise_model", ["high"]), (2, "low_noise_model", ["low"]), (3, "style", states)):
        lora, file = lora_files.random_lora(seed=seed), tmp_path / f"{name}.safetensors"
        save_file(lora.tensors(), file)
        options += ["--lora", f"{file}=0.125"]
        states |= {side: lora.merged(states[side], 0.125) for side in sides}
    done = export([folder], tmp_path / "b", "--no-verify", "--preset", "lightning", *ALL, *options)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert [lora["file"].partition("_")[0] for lora in manifest["provenance"]["loras"]] == [
        "high", "style.safetensors", "low",
    ]  # fmt: skip
    assert manifest["sampler"] == {**PRESETS["lightning"].sampler, "boundary": 0.875}
    networks = {}
    for side, state in states.items():
        networks[side] = copy.deepcopy(made.models().theirs["transformer"])
        networks[side].load_state_dict({converted("transformer", name): w.float() for name, w in state.items()})
    x = torch.from_numpy(NoiseStream(SEED).normal(SHAPE))
    with torch.no_grad():
        for side, t, after in (
            ("high", 1000, 937.5),
            ("high", 937.5, 2500 / 3),
            ("low", 2500 / 3, 625),
            ("low", 625, 0),
        ):
            v = networks[side](x, torch.tensor([float(t)]), expected_embeds(PROMPT), return_dict=False)[0]
            x = x + (after - t) / 1000 * v
    np.testing.assert_allclose(latents_of(tmp_path / "b"), x.numpy(), rtol=0, atol=1e-4)


def test_an_a14b_in_precisions_that_need_a_calibration_is_refused(tmp_path: Path) -> None:
    done = export(expert_files.write_files(tmp_path / "A14B"), tmp_path / "b", "--precision", "int8", *ALL)
    assert done.exit_code == 1 and "cannot be calibrated yet" in done.output and not (tmp_path / "b").exists()


def test_a_plan_that_an_export_refuses_is_refused_when_it_is_inspected(tmp_path: Path) -> None:
    experts = experts_of(expert_files.write_files(tmp_path / "A14B"))
    assert experts is not None
    source = TwoTransformers(experts, "small", **made.SIZES)
    for precision in ("int8", "bf16,flow_head=fp8"):
        with pytest.raises(ExportError, match="cannot be calibrated yet"):
            inspect(source, None, None, precision=precision)
    with pytest.raises(ExportError, match="has no graph encoder"):
        inspect(source, None, None, parts=("encoder",))
    found = inspect(source, None, None, precision="bf16,backbone=fp16")
    assert found["precision"]["backbone_2"] == "fp16" and found["precision"]["flow_head_2"] == "bf16"


def test_a_student_with_an_official_folder_gives_the_latents_of_the_reference(tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = TMDStudent.from_teacher(made.models().transformer, 1)
    fusion = student.head.fusion
    assert isinstance(fusion, GatedFusion)
    fusion.gate.data.zero_()  # so that the flow head's own weights tell
    save_student(tmp_path / "student.safetensors", student)
    paths = [tmp_path / "student.safetensors", made.write_original(tmp_path / "Wan2.1-T2V-small")]
    assert export(paths, tmp_path / "b", "--no-verify").exit_code == 0
    stream = NoiseStream(SEED)
    noise = [torch.from_numpy(stream.normal(SHAPE)) for _ in range(3)]
    prompt_embeds = expected_embeds(PROMPT)
    expected = tmd_sample(student.eval(), noise[0], prompt_embeds, 2, 2, inner_noise=torch.stack(noise[1:]))
    np.testing.assert_allclose(latents_of(tmp_path / "b"), expected.numpy(), rtol=0, atol=1e-4)
    done = export(paths, tmp_path / "other", "--preset", "rcm")
    assert done.exit_code == 1 and "the preset rcm is for rCM" in done.output


def test_two_loras_on_a_folder_give_the_latents_of_diffusers_with_both_in_its_weights(tmp_path: Path) -> None:
    folder, files = made.write_diffusers(tmp_path / "Wan2.1-T2V-small"), []
    weights, options = made.models().state("transformer"), list[object]()
    for seed, strength in ((1, 0.5), (2, -0.25)):
        lora = lora_files.random_lora(seed=seed)
        files.append(tmp_path / f"steps={seed}.safetensors")
        save_file(lora.tensors(lora_files.flat if seed == 1 else str), files[-1])
        weights = lora.merged(weights, strength)
        options += ["--lora", f"{files[-1]}={strength}"]
    done = export([folder], tmp_path / "b", "--preset", "lightx2v", "--json", *options)
    assert done.exit_code == 0, done.output
    written = [(lora["file"], lora["strength"]) for lora in json.loads(done.stdout)["loras"]]
    assert written == [("steps=1.safetensors", 0.5), ("steps=2.safetensors", -0.25)]
    origin = Bundle.open(tmp_path / "b").manifest.provenance
    assert [lora.sha256 for lora in origin.loras] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    network = copy.deepcopy(made.models().theirs["transformer"])
    network.load_state_dict({converted("transformer", name): weight.float() for name, weight in weights.items()})
    expected = expected_latents("lightx2v", network)
    np.testing.assert_allclose(latents_of(tmp_path / "b"), expected.numpy(), rtol=0, atol=1e-4)
    assert (expected - expected_latents("lightx2v")).abs().max() > 0.1


def test_a_lora_at_strength_0_gives_the_bytes_of_the_graphs_without_it(tmp_path: Path) -> None:
    folder = made.write_original(tmp_path / "Wan2.1-T2V-small")
    save_file(lora_files.random_lora().tensors(), tmp_path / "lora.safetensors")
    graphs: dict[str, list[bytes]] = {}
    for strength in (None, 0, 1):
        options = () if strength is None else ("--lora", f"{tmp_path / 'lora.safetensors'}={strength}")
        assert export([folder], tmp_path / f"{strength}", "--no-verify", *options).exit_code == 0
        files = sorted(file for file in (tmp_path / f"{strength}").iterdir() if ".onnx" in file.name)
        graphs[str(strength)] = [file.read_bytes() for file in files]
        assert len(files) > 4
    assert graphs["None"] == graphs["0"] != graphs["1"]
    assert "loras" not in json.loads((tmp_path / "None" / "manifest.json").read_text())["provenance"]


@pytest.mark.parametrize(("key", "value", "family"), made.RELATIVES)
def test_a_relative_in_any_layout_is_refused_and_leaves_nothing(
    key: str, value: Tensor, family: str, tmp_path: Path
) -> None:
    state = {**made.models().state("transformer"), key: value}
    theirs = {converted("transformer", name): weight for name, weight in made.models().state("transformer").items()}
    in_theirs = {**theirs, converted("transformer", key): value}
    folders = [tmp_path / name for name in ("official", "shards", "diffusers/transformer", "files")]
    for folder in folders:
        folder.mkdir(parents=True)
    save_file(state, folders[0] / "diffusion_pytorch_model.safetensors")
    made.write_shards(folders[1], state, 3)
    save_file(in_theirs, folders[2] / "diffusion_pytorch_model.safetensors")
    torch.save({"generator": state}, folders[3] / "model.pt")
    for path in (folders[0], folders[1], folders[2].parent, folders[3] / "model.pt"):
        done = export([path], tmp_path / "b")
        assert done.exit_code == 1 and family in done.output, (path, done.output)
        assert key in done.output or converted("transformer", key) in done.output
        assert not (tmp_path / "b").exists()


def latents_of_pipeline(scheduler: Any, sampler: Any, steps: int, *others: Any, **more: Any) -> Tensor:
    """What diffusers' own pipeline makes, with a guidance; `others` are a second transformer and its boundary."""
    theirs = made.models().theirs
    pipeline = diffusers.WanPipeline(None, None, theirs["vae"], scheduler, theirs["transformer"], *others)
    latents: Tensor = pipeline(
        prompt_embeds=expected_embeds(PROMPT),
        negative_prompt_embeds=expected_embeds(sampler.negative_prompt),
        guidance_scale=sampler.guidance,
        height=16,
        width=32,
        num_frames=5,
        num_inference_steps=steps,
        max_sequence_length=made.WAN.text_len,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **more,
    ).frames
    return latents


@cache
@torch.no_grad()
def expected_embeds(prompt: str) -> Tensor:
    """What transformers' UMT5 makes of `prompt`, zero behind it."""
    ids, mask = (torch.from_numpy(value) for value in tokenizer()([prompt]))
    return made.models().theirs["text_encoder"](ids, mask).last_hidden_state * mask[..., None]


@cache
def tokenizer() -> Tokenizer:
    with tempfile.NamedTemporaryFile() as file:
        file.write(made.tokenizer_bytes())
        file.flush()
        return Tokenizer(file.name, made.WAN.text_len)


@cache
@torch.no_grad()
def expected_latents(preset: str, network: Any = None) -> Tensor:
    sampler = PRESETS[preset].sampler
    guidance = sampler["guidance"]
    prompts = (PROMPT, sampler["negative_prompt"]) if guidance != 1 else (PROMPT,)
    embeds = [expected_embeds(prompt) for prompt in prompts]
    network = network or made.models().theirs["transformer"]

    def velocity(x: Tensor, told: Tensor) -> Tensor:
        v = [network(x, told, rows, return_dict=False)[0] for rows in embeds]
        return v[0] if len(v) == 1 else v[1] + guidance * (v[0] - v[1])

    stream = NoiseStream(SEED)
    x = torch.from_numpy(stream.normal(SHAPE))
    if sampler["rule"] == "unipc":
        steps, shift = STEPS.get(preset, sampler["steps"]), sampler["shift"]
        times = np.linspace(0.999, 0, steps + 1)  # as Wan's own code has them; diffusers' begin at 1
        times = shift * times / (1 + (shift - 1) * times)
        scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = torch.from_numpy(times)
        for t, key in zip(times, scheduler.timesteps, strict=False):
            x = scheduler.step(velocity(x, torch.tensor([float(int(1000 * t))])), key, x, return_dict=False)[0].float()
        return x
    x = x * sampler["init_scale"]
    for t, after in pairwise([*sampler["times"], 0.0]):
        told = torch.tensor([1000 * t])
        if sampler["time_rounding"] != "none":
            told = told.round() if sampler["time_rounding"] == "nearest" else told.bfloat16().float()
        v = velocity(x, told)
        if sampler["rule"] == "euler":
            x = x + (after - t) * v
        else:
            data = x - t * v
            x = (1 - after) * data + after * torch.from_numpy(stream.normal(SHAPE)) if after else data
    return x
