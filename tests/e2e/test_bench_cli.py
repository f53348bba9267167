"""`tmd-bench` as a user types it, on the built-in model, and the rivals' arithmetic. Nothing here judges a time."""

import json
import subprocess
import sys

import pytest
import torch

from tmd_bench.cli import MODELS
from tmd_bench.contest import BenchError, contest
from tmd_bench.rivals import DiffusersRun, TorchRun
from tmd_bench.spec import Work
from tmd_engines import Bundle
from tmd_engines.cost.sizing import estimate
from tmd_export import RandomSource
from tmd_export.families import models
from tmd_ref.samplers import tmd_sample
from tmd_ref.student import load_student
from tmd_runtime.built_in import BUILT_IN

WORK = Work(str(BUILT_IN), "fp32", 64, 64, 17, 2, 2, threads=1, model="tiny")


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
    assert found["ratio"] == {"openvino": theirs["seconds"]["denoise"]["median"] / ours["seconds"]["denoise"]["median"]}
    assert all(0 < one["cpu"] < 2 * one["denoise"] for one in ours["rounds"] + theirs["rounds"])  # one thread
    loop = [sum(one[stage] for stage in ("backbone", "flow_head", "host")) for one in ours["rounds"]]
    assert loop == pytest.approx([one["denoise"] for one in ours["rounds"]])
    needed = estimate(Bundle.open(BUILT_IN), width=64, height=64, frames=17, steps=2, inner_steps=2).stages
    assert ours["flops"]["denoise"] == 2 * needed["backbone"].flops + 4 * needed["flow_head"].flops
    assert found["limit_flops"] > 0 and min(ours["peak_bytes"], theirs["peak_bytes"]) > 2**24
    assert all(2**24 < one["peak_anonymous_bytes"] < one["peak_bytes"] for one in (ours, theirs))
    assert "x our time" in done.stdout and "of limit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--bundle", "x", "--model", "tiny"), "leave --model out"),
        (("--checkpoint", "x"), "name the model"),
        (("--model", "wan1.3b", "--blocks", "6"), "give --model and --random-weights too"),
        (("--compare", "numpy"), "choose some of torch"),
        (("--bundle", str(BUILT_IN), "--compare", "torch"), "give --model"),
        (("--size", "10x10"), "16"),
    ],
)
def test_bad_usage_is_one_sentence(arguments, said):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_bundle_that_is_none_and_a_contender_that_fails_are_named(tmp_path):
    done = bench("--bundle", str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("tmd-bench: ") and "Traceback" not in done.stderr
    with pytest.raises(BenchError, match=r"^nonsense cannot load: UsageFailure: There is no engine"):
        contest(["nonsense"], WORK, 1)


def test_a_shortened_model_keeps_the_share_of_its_flow_head(tmp_path):
    from tmd_bench.shortened import shortened

    whole, short = RandomSource("wan1.3b", 0), shortened("wan1.3b", 0, "tmd", 6)
    assert (short.wan.num_layers, short.head_blocks) == (6, 1) and whole.head_blocks * 6 == whole.wan.num_layers
    assert {**vars(short.wan), "num_layers": 30} == vars(whole.wan)
    done = bench("--model", "tiny", "--random-weights", "0", "--blocks", "2", "--compare", "torch", "--rounds", "1",
                 "--size", "64x64", "--frames", "17", "--keep", str(tmp_path / "kept"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "kept").manifest.model.num_layers == 2 and "x our time" in done.stdout
    done = bench("--model", "tiny", "--random-weights", "0", "--blocks", "9")
    assert done.returncode == 1 and "tiny cannot have 9 blocks: choose 2 to 8" in done.stderr
    assert "Traceback" not in done.stderr


@torch.no_grad()
def test_rivals_have_the_same_weights():
    """The torch one draws what the built-in student draws; diffusers' has the velocity of its two halves."""
    rival, theirs = TorchRun(WORK, compiled=False), DiffusersRun(WORK)
    rival.load()
    theirs.load()
    student = load_student(rival._source.folder / "student.safetensors").float().eval()
    noise, embeds = rival._noise, rival._embeds
    inner = torch.randn(2, *noise.shape)
    latents = [tmd_sample(model, noise, embeds, 2, 2, inner_noise=inner) for model in (rival._module, student)]
    assert torch.equal(*latents)

    split = rival._source.module("student")  # meta: only its rope
    cos, sin = split.rope(torch.zeros_like(noise))
    t = torch.tensor([0.7])
    backbone = rival._module.backbone
    features, context = backbone(noise, t, embeds, cos, sin)
    from tmd_ref.wan import embed_time, rotary_operands, time_sinusoid, token_grid, unpatchify

    head = rival._module.head
    e, e0 = embed_time(time_sinusoid(t, student.config.freq_dim), backbone.time_embedding, backbone.time_projection)
    for block in head.blocks:
        features = block(features, e0, context, rotary_operands(cos, sin, 1))
    size = student.config.patch_size
    velocity = unpatchify(head.head(features, e), token_grid(noise, size), size)
    found = theirs._model(noise, 1000 * t, embeds, return_dict=False)[0]
    assert (found - velocity).abs().max() <= 1e-4


def test_models_are_those_of_the_exporter():
    assert set(MODELS) <= set(models())
