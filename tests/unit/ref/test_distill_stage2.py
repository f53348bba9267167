"""Stage 2's objective against one plain graph, its parts against closed forms, and the baseline's sampler."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.distill_worker import SMALL, Data, teacher
from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.discriminator import Discriminator, count_parameters, teacher_pass
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.kd import kd_loss, pair_noise, write_pairs
from tmd_ref.distill.stage2 import Stage2, predict_clip, rollout
from tmd_ref.samplers import dmd_sample, shift_grid, unipc_sample
from tmd_ref.student import GatedFusion, TMDStudent
from tmd_ref.wan import WAN_CONFIGS, rope_tables

ROPE = rope_tables(3, 2, 2, SMALL.head_dim)


def gate_of(made):
    assert isinstance(made.head.fusion, GatedFusion)
    return made.head.fusion.gate


def student():
    made = TMDStudent.from_teacher(teacher(), 1)
    with torch.no_grad():
        gate_of(made).fill_(0.0)  # half open, so that y matters
    return made


def networks(tmd=True):
    generator, fake = (student() if tmd else teacher()), teacher()
    with torch.no_grad():
        fake.head.head.weight.add_(0.05)
        if not tmd:
            generator.head.head.weight.sub_(0.05)
    torch.manual_seed(1)
    return generator, teacher().requires_grad_(False), fake, Discriminator(SMALL, 2)


def objective(parts, **options):
    generator, fixed, fake, discriminator = parts
    return Stage2(generator, fixed, fake, discriminator, Data(), 2, depths=(0, 2), **options)


@pytest.mark.parametrize("tmd", [True, False], ids=["TMD", "DMD2-v"])
@pytest.mark.parametrize("normaliser", ["x0", "score"])
def test_the_generators_gradient_is_that_of_the_whole_graph(tmd, normaliser):
    """DMD's pseudo target ½|x - sg(x - w)|² plus λ·softplus(-D), differentiated through everything at once."""
    parts = generator, fixed, fake, judge = networks(tmd)
    stage = objective(parts, normaliser=normaliser, gan_weight=0.5)
    draws = [Draws(3, 4, 4), Draws(3, 4, 4)]
    value, _ = stage(draws[0])
    value.backward()
    found = [p.grad.clone() for p in generator.parameters() if p.grad is not None]
    assert all(p.grad is None for network in (fixed, fake, judge) for p in network.parameters())

    generator.zero_grad()
    data, again = Data(), draws[1]
    x, prompts = data.sample(again)
    t = torch.from_numpy(shift_grid(2, 10.0)).float()[1 + again.integers(2)]
    x1, y1 = again.normal(x.shape[1:]), again.normal(x.shape[1:])
    t5 = t.view(-1, 1, 1, 1, 1)
    x_t = (1 - t5) * x + t5 * x1
    clip = (
        rollout(generator, x_t, t, x1, y1, prompts, ROPE, shift_grid(2, 10.0))
        if tmd
        else x_t - t5 * generator(x_t, t, prompts)
    )
    u, noise = again.times(5.0), again.normal(x.shape[1:])
    u5 = u.view(-1, 1, 1, 1, 1)
    noisy = (1 - u5) * clip + u5 * noise
    null = data.null_embeds.expand_as(prompts)
    positive, negative = fixed(noisy, u, prompts), fixed(noisy, u, null)
    by_teacher = (noisy - u5 * (negative + 5 * (positive - negative))).detach()
    by_fake = (noisy - u5 * fake(noisy, u, prompts)).detach()
    scale = by_fake - by_teacher if normaliser == "score" else (clip - by_teacher).detach()
    direction = (by_fake - by_teacher) / scale.abs().mean((1, 2, 3, 4), keepdim=True)
    vsd = 0.5 * F.mse_loss(clip, (clip - direction).detach())
    gan = F.softplus(-judge(teacher_pass(fixed, noisy, u, prompts, ROPE, (0, 2))[1])).mean()
    (vsd + 0.5 * gan).backward()
    expected = [p.grad for p in generator.parameters() if p.grad is not None]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-8 + 1e-3 * b.abs().max().item())


def test_turns_are_four_to_one_and_the_critics_leave_the_generator_alone():
    parts = generator, fixed, fake, judge = networks()
    stage = objective(parts)
    turns = [stage.turn(step) for step in range(10)]
    assert turns.count(("generator",)) == 2 and turns[4] == turns[9] == ("generator",)
    value, scalars = stage(Draws(3, 0, 4))
    value.backward()
    assert all(p.grad is None for network in (generator, fixed) for p in network.parameters())
    assert all(any(p.grad is not None for p in network.parameters()) for network in (fake, judge))
    assert scalars["gan_critic"].item() == pytest.approx(2 * np.log(2), rel=0.1)  # a judge that knows nothing


def test_without_a_discriminator_the_gradient_is_that_of_a_gan_without_weight():
    gradients = []
    for parts in (networks(), (*networks()[:3], None)):
        stage = objective(parts, gan_weight=0.0)
        value, scalars = stage(Draws(3, 4, 4))
        value.backward()
        gradients.append([p.grad for p in parts[0].parameters() if p.grad is not None])
        assert ("gan_size" in scalars) == (parts[3] is not None)
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert [stage.turn(step) for step in range(5)] == [("fake",)] * 4 + [("generator",)]
    score, scalars = stage(Draws(3, 0, 4))
    assert set(scalars) == {"fake_score"} and score == scalars["fake_score"]


def test_a_generator_like_its_data_and_teacher_like_the_fake_score_has_no_vsd_gradient():
    generator, fixed, _, judge = networks()
    stage = objective((generator, fixed, teacher(), judge), guidance=1.0, gan_weight=0.0, ratio=1)
    value, scalars = stage(Draws(3, 1, 4))
    value.backward()
    assert scalars["score_gap"] < 1e-10
    assert all(p.grad.abs().max() < 1e-9 for p in generator.parameters() if p.grad is not None)


def test_rollout_of_a_closed_gate_in_one_step_is_the_teachers_clip():
    """At s = t = 0.999 the student's head is the teacher, so x1 - y is x1 - v up to the 0.1 % of noise in s_N."""
    wan, made = teacher(), TMDStudent.from_teacher(teacher(), 1)
    with torch.no_grad():
        gate_of(made).fill_(-60.0)
    x, prompts, t = Data().clips[:2], Data().prompts[:2], torch.full((2,), 0.999)
    x1, y1 = torch.randn_like(x), torch.randn_like(x)
    x_t = 0.001 * x + 0.999 * x1
    found = rollout(made, x_t, t, x1, y1, prompts, ROPE, shift_grid(1, 10.0))
    assert torch.allclose(found, x1 - 0.999 * wan(x_t, t, prompts) - 0.001 * y1, atol=1e-4)


def test_teacher_pass_is_the_teachers_forward_and_can_leave_blocks_out():
    wan = teacher()
    x, prompts, t = Data().clips[:2], Data().prompts[:2], torch.tensor([0.3, 0.9])
    velocity, features = teacher_pass(wan, x, t, prompts, ROPE, (0, 2))
    assert torch.equal(velocity, wan(x, t, prompts))
    assert [tuple(f.shape) for f in features] == [(2, 6, 3, 4, 4)] * 2
    shorter = teacher()
    del shorter.blocks[1]
    assert torch.allclose(teacher_pass(wan, x, t, prompts, ROPE, skip=(1,))[0], shorter(x, t, prompts), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "reduction", "papers", "within"), [("wan1.3b", 1, 68e6, 0.003), ("wan14b", 2, 172e6, 0.1)]
)
def test_the_discriminator_has_about_the_papers_size(model, reduction, papers, within):
    assert count_parameters(WAN_CONFIGS[model], reduction=reduction) == pytest.approx(papers, rel=within)


def test_the_baselines_sampler_mixes_the_clip_with_the_noise_that_x_implies():
    wan, noise, prompts = teacher(), torch.randn(2, 16, 3, 4, 4), Data().prompts[:2]
    grid = shift_grid(2, 10.0)
    with torch.no_grad():
        found = dmd_sample(wan, noise, prompts, 2)
        clip = predict_clip(wan, noise, torch.full((2,), grid[2]).float(), prompts, ROPE)
        implied = (noise - (1 - grid[2]) * clip) / grid[2]
        x = (1 - grid[1]) * clip + grid[1] * implied
        last = predict_clip(wan, x.float(), torch.full((2,), grid[1]).float(), prompts, ROPE)
    assert torch.allclose(found, last, atol=1e-4)


def test_warm_up_pairs_are_the_teachers_samples_and_kd_learns_them(tmp_path, monkeypatch):
    class Stored(Data):
        shape = (16, 3, 4, 4)

        def __len__(self):
            return 8

        def embeds(self, n, phrasing=0):
            return self.prompts[n]

    wan, data = teacher().requires_grad_(False), Stored()
    write_pairs(tmp_path, wan, data, 5, 7, steps=3, guidance=2.0, batch=2, shard=3, report=lambda line: None)
    pairs = LatentDataset(tmp_path)
    assert len(pairs) == 5
    null = data.null_embeds.expand(5, -1, -1)
    truth = unipc_sample(wan, pair_noise(7, list(range(5)), data.shape), data.prompts[:5], null, 3, 5.0, 2.0)
    stored = torch.stack([pairs.latents(n) for n in range(5)])
    assert torch.allclose(stored, truth, atol=2e-3 * truth.abs().max().item())

    monkeypatch.setattr(pairs, "rope", data.rope)
    generator = teacher()
    loss, values = kd_loss(generator, pairs, 7), []
    optimizer = torch.optim.AdamW(generator.parameters(), lr=2e-3)
    for step in range(40):
        value, _ = loss(Draws(0, step, 4))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


def test_a_wrong_normaliser_is_refused():
    with pytest.raises(ValueError, match="choose one of x0, score"):
        objective(networks(), normaliser="l2")


def test_the_judge_takes_latents_smaller_than_its_scales():
    judge = Discriminator(SMALL, 1)
    assert isinstance(judge, nn.Module) and judge([torch.randn(2, 6, 3, 4, 4)]).shape == (1, 2)
