"""Two processes, with sharded (FSDP2 over gloo) or whole networks, against one; and the pieces that this rests on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import distill_worker
from tmd_ref.distill import cli
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.parallel import World, place
from tmd_ref.wan import WanTransformer

ROOT = Path(__file__).parents[3]


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_two_processes_give_the_curve_of_one_and_go_on_from_its_checkpoint(tmp_path):
    """Stage 1, sharded and whole, and a Transition Model from the start; stage 2 from a checkpoint of one process."""
    distill_worker.main(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        distill_worker.main(tmp_path / "two", stop_at=3)
    one_made = (tmp_path / "two" / "stage1" / "metrics.jsonl").rename(tmp_path / "once.jsonl")
    for name in ("stage1", "stage1-whole"):
        (tmp_path / "two" / name / "checkpoint.pt").unlink()

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(Path(distill_worker.__file__)), str(tmp_path / "two")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert one_made.read_text()

    for stage, first in (("stage1", 0), ("stage1-whole", 0), ("stage2", 2), ("tim", 0)):
        whole, shared = curve(tmp_path / "one" / stage), curve(tmp_path / "two" / stage)[-4 + first :]
        assert [line["step"] for line in shared] == list(range(first + 1, 5))
        for a, b in zip(whole[first:], shared, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"seconds_per_step"}:
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), (stage, a["step"], name)
        saved = [torch.load(tmp_path / run / stage / "checkpoint.pt", weights_only=True) for run in ("one", "two")]
        for name, network in saved[0]["networks"].items():
            for part in ("model", "average"):
                for key, weight in network[part].items():
                    other = saved[1]["networks"][name][part][key]
                    # Adam moves a weight whose gradient is rounding noise by up to lr in either direction
                    assert (weight - other).abs().mean() < 2e-4, (stage, name, part, key)


def test_the_documented_commands_for_torchrun_reach_tmd_distill():
    """torchrun takes an abbreviation such as --run for an option of its own, even after the program's name."""
    from torch.distributed.run import get_args_parser

    text = (ROOT / "docs" / "distill.md").read_text() + str(cli.main.__doc__)
    found = re.findall(r"torchrun (--nproc-per-node \d+ -m [^`\n#]*)", text)
    assert len(found) >= 5
    for command in found:
        parsed = get_args_parser().parse_args(command.split())
        assert parsed.module and parsed.training_script == "tmd_ref.distill", command
        assert parsed.training_script_args == command.split("tmd_ref.distill ")[1].split(), command


def test_a_samples_numbers_do_not_depend_on_who_draws_them():
    whole, part = Draws(5, 7, 6), Draws(5, 7, 6, [1, 4])
    for draw in (
        lambda d: d.normal((3, 2)),
        lambda d: d.integers(1000),
        lambda d: d.times(3.0),
        lambda d: d.first(0.5),
    ):
        assert torch.equal(draw(whole)[[1, 4]], draw(part))
    assert not torch.equal(Draws(5, 8, 6).normal((3,)), Draws(5, 7, 6).normal((3,)))


def test_every_sample_of_a_step_belongs_to_one_process():
    parts = [index for rank in range(4) for part in World(rank, 4).parts(16, 2) for index in part]
    assert sorted(parts) == list(range(16))
    with pytest.raises(ValueError, match="does not divide"):
        World(0, 3).parts(16, None)


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        wan = place(distill_worker.teacher(), World(), recompute)
        x, t = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.8])
        wan(x, t, distill_worker.Data().prompts[:2]).square().mean().backward()
        gradients.append([p.grad for p in wan.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_keeps_time_and_residual_stream_in_float32():
    """Under autocast the embedding of time is that of float32 to the bit, and the output float32."""
    wan: WanTransformer = distill_worker.teacher()
    t = torch.tensor([0.2, 0.7013])
    x, prompts = torch.randn(2, 16, 3, 4, 4), distill_worker.Data().prompts[:2]
    plain = wan.embed_time(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, wan.embed_time(t), strict=True))
        half = wan(x, t, prompts)
    full = wan(x, t, prompts)
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() < 0.05 * full.norm()


def test_cuda_without_a_gpu_is_refused_in_words():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="no NVIDIA GPU"):
        World.start("cuda")
