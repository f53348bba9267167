"""Wan2.2-A14B at small width, from each published layout through both commands, against diffusers' own pipeline.

The two networks, the boundary, the guidances and the scheduler of the expected values are all theirs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import tmd_runtime
from tests.helpers import expert_files as experts
from tests.helpers import lora_files
from tests.helpers import synthetic_checkpoints as made
from tmd_engines import Bundle
from tmd_export import Source, graph_export
from tmd_export.checkpoints.experts import experts_of
from tmd_export.checkpoints.names import converted
from tmd_export.cli import command as tmd_export
from tmd_export.families import open as opening
from tmd_export.families import presets
from tmd_export.graphs.graph import Graph
from tmd_export.graphs.trace import trace
from tmd_export.sources.experts import TwoTransformers
from tmd_export.sources.loras import with_loras
from tmd_export.weights.weights import Weights

diffusers = pytest.importorskip("diffusers")

SEED, SHAPE = 4, (1, 16, 2, 2, 4)  # 5 frames of 32x16
SIZE: dict[str, Any] = {"frames": 5, "size": (32, 16), "seed": SEED}
PARTS = "backbone,flow_head,backbone_2,flow_head_2"
LAYOUTS: dict[str, Callable[[Path], list[Path]]] = {
    "diffusers": lambda folder: [experts.write_diffusers(folder)],
    "original": lambda folder: [experts.write_original(folder)],
    "files": experts.write_files,
}


@pytest.fixture(scope="module")
def traced() -> dict[tuple[str, str], onnx_ir.Model]:
    return {}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, traced: dict[tuple[str, str], onnx_ir.Model]) -> None:
    """The command opens models of small sizes, and each graph is traced once (of weights, that holds at most small
    ones, which are the same in every layout and in both transformers)."""

    def trace_once(graph: Graph, weights: Weights) -> onnx_ir.Model:
        key = type(graph.module).__name__, graph.name.removesuffix("_2")
        if key not in traced:
            traced[key] = trace(graph, weights)
        return traced[key].clone()

    def open_source(_: str | None, paths: tuple[Path, ...], *others: Any) -> Source:
        found = experts_of(paths)
        assert found is not None
        source = TwoTransformers(found, "small", **made.SIZES)
        return with_loras(source, others[-1]) if others[-1] else source

    monkeypatch.setattr(opening, "open_source", open_source)
    monkeypatch.setattr(graph_export, "trace", trace_once)


def export(paths: list[Path], out: Path, *options: object) -> Result:
    checkpoints = [word for path in paths for word in ("--checkpoint", path)]
    arguments = (*checkpoints, "--parts", PARTS, "--out", out, "--no-verify", *options)
    return CliRunner().invoke(tmd_export, [str(word) for word in arguments], catch_exceptions=False)


def embeds() -> list[torch.Tensor]:
    """Of a prompt and a negative prompt; what they say does not matter here."""
    return list(torch.randn(2, 1, made.WAN.text_len, made.WAN.text_dim, generator=torch.Generator().manual_seed(1)))


def latents_of(bundle: Path, memory: str = "all", **wishes: Any) -> np.ndarray:
    prompt, negative = (each.numpy() for each in embeds())
    pipeline = tmd_runtime.load(bundle, "onnxruntime", threads=1, memory=memory)
    return pipeline.denoise(prompt, negative_embeds=negative, **SIZE, **wishes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_latents_of_diffusers_pipeline(layout: str, tmp_path: Path) -> None:
    paths = LAYOUTS[layout](tmp_path / "Wan2.2-T2V-A14B-small")
    done = export(paths, tmp_path / "b", "--grid", "diffusers")
    assert done.exit_code == 0, done.output
    manifest: Any = Bundle.open(tmp_path / "b").manifest
    sampler = manifest.sampler
    assert (sampler.boundary, sampler.guidance, sampler.guidance_2, sampler.steps) == (0.875, 4.0, 3.0, 40)
    assert sampler.shift == (made.UNIPC["flow_shift"] if layout == "diffusers" else 12.0)
    assert manifest.model.architecture == "wan2.2-t2v-a14b"
    theirs = made.models().theirs
    scheduler = diffusers.UniPCMultistepScheduler(**(made.UNIPC | {"flow_shift": sampler.shift}))
    pipeline = diffusers.WanPipeline(
        None, None, theirs["vae"], scheduler, theirs["transformer"], experts.low_theirs(), experts.BOUNDARY
    )
    prompt, negative = embeds()
    turns = []
    networks = {"high": theirs["transformer"], "low": experts.low_theirs()}
    hooks = [net.register_forward_hook(lambda *_, w=which: turns.append(w)) for which, net in networks.items()]
    expected = pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        height=16,
        width=32,
        num_frames=5,
        num_inference_steps=6,
        max_sequence_length=made.WAN.text_len,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).frames
    for hook in hooks:
        hook.remove()
    assert 2 <= turns.count("high") <= 10 and turns == sorted(turns), "both have steps"
    assert 0.1 < expected.std() < 10
    for memory in ("all", "low"):
        found = latents_of(tmp_path / "b", memory, steps=6)
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


def test_lightning_with_a_lora_for_each_gives_the_formula(tmp_path: Path) -> None:
    """Strength 0.125 as its authors say, one LoRA for both, and plain Euler through the published times."""
    folder = experts.write_original(tmp_path / "Wan2.2-T2V-A14B-small")
    states = {"high": made.models().state("transformer"), "low": experts.low()}
    options: list[object] = []
    for seed, name, sides in ((1, "high_noise_model", ["high"]), (2, "low_noise_model", ["low"]), (3, "style", states)):
        lora, file = lora_files.random_lora(seed=seed), tmp_path / f"{name}.safetensors"
        save_file(lora.tensors(), file)
        options += ["--lora", f"{file}=0.125"]
        states |= {side: lora.merged(states[side], 0.125) for side in sides}
    done = export([folder], tmp_path / "b", "--preset", "lightning", *options)
    assert done.exit_code == 0, done.output
    assert "high_noise_model.safetensors is for the high-noise transformer" in done.stderr
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert [lora["file"].split("_")[0] for lora in manifest["provenance"]["loras"]] == [
        "high", "style.safetensors", "low",
    ]  # fmt: skip
    assert manifest["sampler"] == {**presets()["lightning"].sampler, "boundary": 0.875}
    networks = {}
    for side, state in states.items():
        networks[side] = copy.deepcopy(made.models().theirs["transformer"])
        networks[side].load_state_dict({converted("transformer", name): w.float() for name, w in state.items()})
    x = torch.from_numpy(tmd_runtime.NoiseStream(SEED).normal(SHAPE))
    turns = []
    with torch.no_grad():
        for t, after in pairwise([1000, 937.5, 2500 / 3, 625, 0]):
            turns.append("high" if t >= 875 else "low")
            v = networks[turns[-1]](x, torch.tensor([float(t)]), embeds()[0], return_dict=False)[0]
            x = x + (after - t) / 1000 * v
    assert turns == ["high", "high", "low", "low"]
    np.testing.assert_allclose(latents_of(tmp_path / "b"), x.numpy(), rtol=0, atol=1e-4)


def test_precisions_that_need_a_calibration_are_refused(tmp_path: Path) -> None:
    paths = experts.write_files(tmp_path / "files")
    done = export(paths, tmp_path / "b", "--precision", "int8")
    assert done.exit_code == 1 and "cannot be calibrated yet" in done.output and not (tmp_path / "b").exists()
