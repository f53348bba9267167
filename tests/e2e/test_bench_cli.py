"""`tmd-bench` as a user types it, on the built-in model, and the rivals' arithmetic. Nothing here judges a time."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file

import tmd_runtime
from benchmarks.contest import PLAN
from tmd_bench.cli import MODELS, command
from tmd_bench.contest import BenchError, contest
from tmd_bench.ours import BundleRun
from tmd_bench.published import write
from tmd_bench.rivals import WORDS, DiffusersRun, TorchRun, noise_of, source_of
from tmd_bench.sdcpp import StableDiffusionCpp
from tmd_bench.spec import Work
from tmd_engines import Bundle
from tmd_engines.cost.sizing import estimate
from tmd_export import RandomSource
from tmd_export.families import models
from tmd_export.parts import parse_precision
from tmd_export.sources.source import built_in_folder
from tmd_ref.samplers import effective_nfe, tmd_sample
from tmd_ref.student import load_student
from tmd_runtime.built_in import BUILT_IN

WORK = Work(str(BUILT_IN), "fp32", 64, 64, 17, 2, 2, threads=1, model="tiny", stages=("denoise",))


def bench(*arguments):
    code = "import sys; from tmd_bench.cli import main; sys.argv[0] = 'tmd-bench'; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_a_bundle_is_measured_stage_by_stage_beside_another_engine(tmp_path):
    done = bench(
        "--rounds", "2", "--engine", "onnxruntime", "--compare", "openvino", "--json", str(tmp_path / "b.json")
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    ours, theirs = (found["contenders"][name] for name in ("onnxruntime", "openvino"))
    assert set(ours["seconds"]) == {"text", "backbone", "flow_head", "decode", "denoise", "host", "cpu"}
    assert len(ours["rounds"]) == 2 and "load" in ours["cold_seconds"]
    expected = {stage: theirs["seconds"][stage]["median"] / ours["seconds"][stage]["median"]
                for stage in ("text", "denoise", "decode", "cpu")}  # fmt: skip
    assert found["ratio"] == {"openvino": expected}
    assert all(0 < one["cpu"] < 2 * one["denoise"] for one in ours["rounds"] + theirs["rounds"])  # one thread
    loop = [sum(one[stage] for stage in ("backbone", "flow_head", "host")) for one in ours["rounds"]]
    assert loop == pytest.approx([one["denoise"] for one in ours["rounds"]])
    needed = estimate(Bundle.open(BUILT_IN), width=64, height=64, frames=17, steps=2, inner_steps=2).stages
    assert ours["flops"]["denoise"] == 2 * needed["backbone"].flops + 4 * needed["flow_head"].flops
    assert found["limit_flops"] > 0 and min(ours["peak_bytes"], theirs["peak_bytes"]) > 2**24
    assert all(2**24 < one["peak_anonymous_bytes"] < one["peak_bytes"] for one in (ours, theirs))
    assert "of our time: " in done.stdout and "of limit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--bundle", str(BUILT_IN), "--model", "tiny", "--keep", "x"), "leave --keep out"),
        (("--checkpoint", "x"), "name the model"),
        (("--model", "wan1.3b", "--blocks", "6"), "give --model and --random-weights too"),
        (("--compare", "numpy"), "choose some of torch"),
        (("--model", "tiny", "--precision", "bf16,decoder=fp33"), "there is no precision 'fp33': choose among fp32"),
        (("--bundle", str(BUILT_IN), "--compare", "torch"), "give --model"),
        (("--size", "10x10"), "16"),
        (("--bundle", "builtin:tiny", "--model", "tiny", "--size", "10x10"), "16"),
    ],
)
def test_bad_usage_is_one_sentence(arguments, said):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("line", PLAN, ids=lambda line: line.name)
def test_the_contest_asks_for_what_tmd_bench_takes(line):
    command.make_context("tmd-bench", ["--model", "wan1.3b", "--random-weights", "0", *line.export()])
    parse_precision(dict(pairwise(line.export())).get("--precision", "fp32"))


def test_a_bundle_that_is_none_and_a_contender_that_fails_are_named(tmp_path):
    done = bench("--bundle", str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("tmd-bench: ") and "Traceback" not in done.stderr
    with pytest.raises(BenchError, match=r"^nonsense cannot load: UsageFailure: There is no engine"):
        contest(["nonsense"], WORK, 1)


@pytest.mark.long
def test_a_shortened_model_keeps_the_share_of_its_flow_head(tmp_path):
    from tmd_bench.random_model import random_model

    whole, short = RandomSource("wan1.3b", 0), random_model("wan1.3b", 0, "tmd", 6)
    assert (short.wan.num_layers, short.head_blocks) == (6, 1) and whole.head_blocks * 6 == whole.wan.num_layers
    assert {**vars(short.wan), "num_layers": 30} == vars(whole.wan)
    done = bench("--model", "tiny", "--random-weights", "0", "--blocks", "2", "--compare", "torch", "--rounds", "1",
                 "--size", "64x64", "--frames", "17", "--keep", str(tmp_path / "kept"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "kept").manifest.model.num_layers == 2 and "of our time: " in done.stdout
    done = bench("--model", "tiny", "--random-weights", "0", "--blocks", "9")
    assert done.returncode == 1 and "tiny cannot have 9 blocks: choose 2 to 8" in done.stderr
    assert "Traceback" not in done.stderr


@torch.no_grad()
def test_rivals_have_the_same_weights():
    """The torch one draws what the built-in student draws; diffusers' has the velocity of its two halves."""
    rival, theirs = TorchRun(WORK, compiled=False), DiffusersRun(WORK)
    rival.load()
    theirs.load()
    student = load_student(built_in_folder() / "student.safetensors").float().eval()
    noise, embeds = rival.noise, rival.embeds
    inner = torch.randn(2, *noise.shape)
    latents = [tmd_sample(model, noise, embeds, 2, 2, inner_noise=inner) for model in (rival.module, student)]
    assert torch.equal(*latents)

    cos, sin = rival.module.rope(torch.zeros_like(noise))
    t = torch.tensor([0.7])
    backbone = rival.module.backbone
    features, context = backbone(noise, t, embeds, cos, sin)
    from tmd_ref.wan import embed_time, rotary_operands, time_sinusoid, token_grid, unpatchify

    head = rival.module.head
    e, e0 = embed_time(time_sinusoid(t, student.config.freq_dim), backbone.time_embedding, backbone.time_projection)
    for block in head.blocks:
        features = block(features, e0, context, rotary_operands(cos, sin, 1))
    size = student.config.patch_size
    velocity = unpatchify(head.head(features, e), token_grid(noise, size), size)
    found = theirs.model(noise, 1000 * t, embeds, return_dict=False)[0]
    assert (found - velocity).abs().max() <= 1e-4


@torch.no_grad()
def test_rivals_read_and_decode_with_the_same_weights():
    """transformers' encoder gives the embeddings of ours, diffusers' autoencoder the frames of the built-in bundle."""
    from tmd_ref.umt5 import UMT5Encoder

    source, rival = source_of(WORK), DiffusersRun(WORK)
    (encode, _), (decode, _) = rival.text(source), rival.decode(source)
    ours = UMT5Encoder(source.module("text_encoder").config)
    ours.load_state_dict({name: source.tensor("text_encoder", name).float() for name in ours.state_dict()})
    ids, mask = torch.zeros(2, 1, 32, dtype=torch.int64)
    ids[:, :WORDS], mask[:, :WORDS] = torch.arange(2, 2 + WORDS), 1
    assert (encode()[:, :WORDS] - ours(ids, mask)[:, :WORDS]).abs().max() <= 1e-4
    with tmd_runtime.load(BUILT_IN, engine="onnxruntime", threads=1) as pipeline:
        frames = pipeline.decode(noise_of(source, WORK).numpy())
    difference = np.abs(frames.astype(int) - decode()[0].permute(1, 2, 3, 0).numpy())
    assert difference.max() <= 2 and difference.mean() < 0.02  # the bundle's weights are float16


@pytest.mark.parametrize("stage", ["text", "decode"])
def test_a_stage_is_measured_alone(stage):
    work = replace(WORK, stages=(stage,))
    for contender in (BundleRun(work, "onnxruntime"), DiffusersRun(work)):
        contender.load()
        assert contender.run().keys() == {stage, "cpu"}


class TestStableDiffusionCpp:
    """With a stand-in for the package, which is built for each machine and is no dependency; docs/speed.md has runs of
    the real one."""

    WORK = Work(str(BUILT_IN), "bf16", 64, 64, 17, 2, 2, threads=1, model="tiny", published="there")

    def test_the_package_is_found_when_it_is_asked_for(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", None)
        with pytest.raises(ValueError, match="pip install stable-diffusion-cpp-python"):
            StableDiffusionCpp(self.WORK).load()

    def test_its_stages_end_when_it_logs_so(self, monkeypatch):
        given = {}

        class Model:
            listener: Callable[..., None]

            def __init__(self, **arguments):
                given.update(arguments)

            def generate_video(self, **arguments):
                given.update(arguments)
                for line in ("a.cpp:1 - get_learned_condition completed, taking 0.01s\n", "b.cpp:2 - sample 8x8x5\n",
                             "b.cpp:3 - sampling completed, taking 1.00s\n",
                             "b.cpp:4 - decode_first_stage completed, taking 2.00s\n"):  # fmt: skip
                    sleep(0.02)
                    self.listener(1, line.encode(), None)
                return [object()] * 17

        def listen(listener, data):
            Model.listener = staticmethod(listener)

        package = SimpleNamespace(
            StableDiffusion=Model, sd_log_callback=lambda function: function, sd_set_log_callback=listen
        )
        monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", package)
        rival = StableDiffusionCpp(self.WORK)
        rival.load()
        seconds = rival.run()
        assert (given["wtype"], given["n_threads"], given["cfg_scale"]) == ("f16", 1, 1.0)
        passes = effective_nfe(2, 2, 2, 8)  # the flow head has 2 of 8 blocks
        assert given["sample_steps"] == math.ceil(passes)
        assert seconds["text"] >= 0.02 and seconds["decode"] >= 0.02
        assert seconds["denoise"] >= 0.04 * passes / math.ceil(passes)

    def test_a_run_without_frames_is_an_error_that_says_so(self):
        rival = StableDiffusionCpp(self.WORK)
        rival._model = SimpleNamespace(generate_video=lambda **_: None)
        with pytest.raises(ValueError, match="drew 0 frames and finished start"):
            rival.run()

    def test_it_gets_the_weights_under_their_authors_names(self, tmp_path):
        write(replace(self.WORK, stages=("text", "denoise", "decode")), tmp_path)
        source = source_of(self.WORK)
        state = convert_wan_transformer_to_diffusers(load_file(tmp_path / "transformer.safetensors"))
        rival = DiffusersRun(replace(WORK, stages=("denoise",)))
        rival.load()
        expected = rival.model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name].float(), weight) for name, weight in expected.items())
        vae = convert_wan_vae_to_diffusers(load_file(tmp_path / "vae.safetensors"))
        assert len(vae) == len(source.module("vae").state_dict())
        assert "shared.weight" in load_file(tmp_path / "text_encoder.safetensors")


def test_models_are_those_of_the_exporter():
    assert set(MODELS) <= set(models())
