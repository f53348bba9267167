"""Few-step presets against their samplers as other people's code states them, on made-up graphs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import tmd_runtime
from tests.helpers.synthetic import TEXT_DIM, TEXT_LENGTH, write_synthetic_bundle
from tmd_export.presets.wan import PRESETS
from tmd_runtime import NoiseStream
from tmd_runtime.sampling.schedule import rope_tables

SEED, SHAPE = 7, (1, 16, 2, 4, 6)
EMBEDS = np.random.default_rng(1).standard_normal((1, TEXT_LENGTH, TEXT_DIM), np.float32)


def sampled(preset: str, folder: Path) -> tuple[np.ndarray, Any]:
    """Latents of a run by a preset, and the network of the bundle: (x, what it is told, 0 to 1000) -> velocity."""
    bundle = write_synthetic_bundle(folder / "b", ("backbone", "flow_head", "update"), dict(PRESETS[preset].sampler))
    with tmd_runtime.load(bundle, engine="onnxruntime", threads=1) as pipeline:
        found = pipeline.denoise(EMBEDS, seed=SEED, frames=5, size=(48, 32))
    graphs = {name: ReferenceEvaluator(onnx.load(bundle / f"{name}.onnx")) for name in ("backbone", "flow_head")}
    cos, sin = rope_tables(2, 2, 3, 16)

    def network(x: torch.Tensor, told: float) -> torch.Tensor:
        t = np.array([told / 1000], np.float32)
        given: Any = {"x": x.float().numpy(), "t": t, "rope_cos": cos, "rope_sin": sin}
        features, context = graphs["backbone"].run(None, {**given, "prompt_embeds": EMBEDS})
        (velocity,) = graphs["flow_head"].run(None, {**given, "features": features, "context": context})
        return torch.from_numpy(np.asarray(velocity))

    return found, network


@pytest.mark.parametrize(("preset", "listed"), [("codmd", (1000, 900, 757, 522)), ("codmd-14b", (1000, 937, 833, 624))])
def test_codmd_predicts_data_and_makes_it_noisy_again(preset: str, listed: tuple[int, ...], tmp_path: Path) -> None:
    """Its FlowMatchScheduler: 1000 of 1001 equispaced sigmas, warped by 8; of each listed step the nearest one."""
    found, network = sampled(preset, tmp_path)
    sigmas = torch.linspace(1.0, 0.0, 1001)[:-1]
    sigmas = 8.0 * sigmas / (1 + 7.0 * sigmas)
    stream = NoiseStream(SEED)
    x = torch.from_numpy(stream.normal(SHAPE)).double()
    for number, step in enumerate(listed):
        data = x - sigmas[(1000 * sigmas - step).abs().argmin()] * network(x, step)
        if number == len(listed) - 1:
            break
        sigma = sigmas[(1000 * sigmas - listed[number + 1]).abs().argmin()]
        x = (1 - sigma) * data + sigma * torch.from_numpy(stream.normal(SHAPE))
    np.testing.assert_allclose(found, data.numpy(), rtol=0, atol=1e-4)


def test_the_distilled_13b_steps_by_euler_through_the_discrete_times_of_edge_dit(tmp_path: Path) -> None:
    """Its DiscreteScheduler: time steps 999 to 0 in equal parts, one more than each over 1000, warped by 3, then 0."""
    found, network = sampled("lightx2v-1.3b", tmp_path)
    steps = np.float32(999) - np.float32(999 / 7) * np.arange(8, dtype=np.float32)
    share = (steps + 1) / np.float32(1000)
    sigmas = [*(3 * share / (1 + 2 * share)).tolist(), 0.0]
    x = torch.from_numpy(NoiseStream(SEED).normal(SHAPE)).double()
    for sigma, after in pairwise(sigmas):
        data = x - sigma * network(x, 1000 * sigma)
        x = x + (x - data) / sigma * (after - sigma)
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=1e-4)
