"""The Transition Model that comes with the package: what the reference computes, and better with more steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import tmd_runtime
from tmd_engines import Bundle
from tmd_ref.checkpoint import load_model
from tmd_ref.distill.evaluate import held_out
from tmd_ref.distill.tim_evaluate import score
from tmd_ref.distill.tiny import SHIPPED
from tmd_ref.distill.vae import to_frames
from tmd_ref.text import Tokenizer
from tmd_ref.tim.model import TiM
from tmd_ref.tim.sampling import tim_sample, uniform_times
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE
from tmd_runtime import Pipeline
from tmd_runtime.built_in import BUNDLES

PROMPT = "a large cyan star on a navy background"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with tmd_runtime.load("builtin:tim-tiny", threads=1) as pipeline:
        yield pipeline


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 1.0), (3, 2.0)])
def test_the_runtime_computes_what_the_reference_computes(pipeline: Pipeline, steps: int, guidance: float) -> None:
    model = load_model(SHIPPED / "tim.safetensors", TiM).eval()
    encoder, vae = (
        load_model(SHIPPED / "umt5.safetensors", UMT5Encoder),
        load_model(SHIPPED / "vae.safetensors", WanVAE),
    )
    tokenizer = Tokenizer(SHIPPED / "tokenizer.model", model.config.text_len)
    with torch.no_grad():
        embeds, null = (encoder(*(torch.from_numpy(a) for a in tokenizer([text]))) for text in (PROMPT, ""))
        noise = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        latents = tim_sample(model, noise.squeeze(2), embeds, uniform_times(steps), null, guidance).unsqueeze(2)
        frames = to_frames(vae.decode(latents))[0]
    made = pipeline(PROMPT, seed=5, steps=steps, guidance=guidance)
    assert made.latents is not None
    # products are in float16
    assert np.abs(made.latents - latents.numpy()).max() <= 0.02
    assert np.abs(made.frames.astype(int) - frames.astype(int)).mean() <= 0.2


def test_more_steps_draw_more_shapes_right(pipeline: Pipeline) -> None:
    """A coarse check that the shipped weights are the trained ones; docs/tim-log.md has the measured table."""
    scenes, captions = held_out(208, seed=7)
    shape = {}
    for steps in (1, 8):
        stills = [pipeline(text, seed=seed, steps=steps).frames[0] for seed, text in enumerate(captions)]
        found = score(scenes, np.stack(stills))
        assert found["color"] >= 0.9 and found["background"] >= 0.98, (steps, found)
        shape[steps] = found["shape"]
    assert shape[8] >= 0.85 and shape[8] >= shape[1] + 0.04, shape


def test_every_graph_was_verified_and_the_bundle_stays_below_11_mb() -> None:
    folder = BUNDLES / "tim-tiny"
    graphs = Bundle.open(folder).manifest.graphs
    assert set(graphs) == {"text_encoder", "backbone", "flow_head", "update", "decoder_first", "encoder"}
    for name, graph in graphs.items():
        found = graph.accuracy
        assert found is not None, name
        assert found.max_abs_error <= 1e-4 if graph.precision == "fp32" else found.cosine >= 0.9999, name
    assert sum(Path(file).stat().st_size for file in folder.iterdir()) <= 11e6
