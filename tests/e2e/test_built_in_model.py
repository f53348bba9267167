"""The model that comes with the package: the runtime's result is the reference's, and it shows what the prompt says."""

from itertools import product

import numpy as np
import pytest
import torch

import tmd_runtime
from tmd_engines import Bundle
from tmd_ref.checkpoint import load_model
from tmd_ref.distill.tiny import SHIPPED
from tmd_ref.distill.vae import to_frames
from tmd_ref.oracle import read_clip
from tmd_ref.samplers import tmd_sample
from tmd_ref.scenes import BACKGROUNDS, COLORS
from tmd_ref.student import load_student
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE
from tmd_runtime.built_in import BUILT_IN

PROMPT = "a red circle moving right on a black background"


@pytest.fixture(scope="module")
def pipeline():
    with tmd_runtime.load() as pipeline:
        yield pipeline


@pytest.mark.parametrize(("steps", "inner_steps"), [(2, 2), (1, 4)])
def test_the_runtime_computes_what_the_reference_computes(pipeline, steps, inner_steps):
    student = load_student(SHIPPED / "student.safetensors").float().eval()
    encoder = load_model(SHIPPED / "umt5.safetensors", UMT5Encoder)
    vae = load_model(SHIPPED / "vae.safetensors", WanVAE)
    tokenizer = Tokenizer(SHIPPED / "tokenizer.model", student.config.text_len)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        embeds = encoder(*(torch.from_numpy(a) for a in tokenizer([PROMPT])))
        noise = torch.randn(1, 16, 5, 8, 8, generator=generator)
        latents = tmd_sample(
            student,
            noise,
            embeds,
            steps,
            inner_steps,
            inner_noise=lambda shape: torch.randn(shape, generator=generator),
        )
        frames = to_frames(vae.decode(latents))[0]

    ours = pipeline.encode(PROMPT)
    assert np.abs(ours - embeds.numpy()).max() <= 1e-4
    ours = pipeline.denoise(ours, seed=5, steps=steps, inner_steps=inner_steps)
    assert np.abs(ours - latents.numpy()).max() <= 1e-3  # a few 1e-5 per graph, four to eight graphs in a row
    ours = pipeline(PROMPT, seed=5, steps=steps, inner_steps=inner_steps).frames
    assert np.abs(ours.astype(int) - frames.astype(int)).max() <= 1


def test_openvino_draws_the_same_video_every_time(pipeline):
    """Compiled cold and read back from the cache: the same bits; and ONNX Runtime's frames but for rounding."""
    pytest.importorskip("openvino")
    runs = []
    for _ in range(2):
        with tmd_runtime.load(engine="openvino", threads=1) as other:
            runs += [other(PROMPT, seed=5).frames, other(PROMPT, seed=5).frames]
    assert all(np.array_equal(runs[0], frames) for frames in runs[1:])
    difference = np.abs(runs[0].astype(int) - pipeline(PROMPT, seed=5).frames.astype(int))
    # the graphs are in float16, and engines need not round at the same places
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2


def test_the_built_in_videos_show_the_colour_and_background_of_their_prompts(pipeline):
    """A coarse check that the shipped weights are the trained ones; docs/tiny.md has the measured table."""
    right = {"color": 0, "background": 0}
    wanted = list(product(COLORS, BACKGROUNDS))
    for seed, (color, background) in enumerate(wanted):
        reading = read_clip(pipeline(f"a {color} circle moving right on a {background} background", seed=seed).frames)
        right["color"] += reading.color == color
        right["background"] += reading.background == background
    assert right["color"] >= 0.7 * len(wanted) and right["background"] >= 0.9 * len(wanted), right


def test_every_graph_of_the_built_in_bundle_was_verified_when_written():
    graphs = Bundle.open(BUILT_IN).manifest.graphs
    assert set(graphs) == {"text_encoder", "backbone", "flow_head", "update", "decoder_first", "decoder_step"}
    for name, graph in graphs.items():
        found = graph.accuracy
        assert found is not None, name
        assert found.max_abs_error <= 1e-4 if graph.precision == "fp32" else found.cosine >= 0.9999, name


def test_weights_and_bundle_together_stay_below_25_mb():
    stills = SHIPPED / "tim.safetensors"  # the other model's
    files = {*SHIPPED.iterdir(), *BUILT_IN.iterdir()} - {stills}
    assert sum(file.stat().st_size for file in files) <= 25e6
