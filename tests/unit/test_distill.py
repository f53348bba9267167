"""Training: resumable to the bit, stopped by bad numbers; the objectives against closed forms."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tmd_ref.distill.stage1 import sample_inner_times, tm_meanflow_loss
from tmd_ref.distill.teacher import drop_condition, shifted_uniform
from tmd_ref.distill.trainer import Schedule, TrainingError, fit, step_generator
from tmd_ref.samplers import shift_grid
from tmd_ref.student import TMDStudent
from tmd_ref.wan import WanConfig, rope_tables

SMALL = WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=3, text_dim=8, text_len=4)


class Data:
    """Random latents and embeddings in place of a prepared shard."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(8, 16, 3, 4, 4, generator=generator)
        self.prompts = torch.randn(8, 4, 8, generator=generator)
        self.null_embeds = torch.randn(4, 8, generator=generator)

    def batch(self, count, generator):
        index = torch.randint(8, (count,), generator=generator)
        return self.latents[index], self.prompts[index]

    def rope(self, config):
        return rope_tables(3, 2, 2, config.head_dim)


def linear_problem(schedule, run, fail_at=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step):
        if step == fail_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=step_generator(1, step))
        return (model(x).squeeze(1) - x.sum(1)).square().mean(), {}

    return fit(model, loss, schedule, run, log_every=5, save_every=5, report=lambda line: None)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    schedule = Schedule(steps=20, lr=0.05, warmup=3, ema=0.9)
    whole = linear_problem(schedule, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        linear_problem(schedule, tmp_path / "parts", fail_at=12)
    parts = linear_problem(schedule, tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_learns_and_writes_one_line_per_interval(tmp_path):
    model = linear_problem(Schedule(steps=300, lr=0.1, warmup=3, weight_decay=0.0), tmp_path)
    assert torch.allclose(model.weight, torch.ones(1, 3), atol=0.05)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 301, 5))
    assert lines[-1]["loss"] < 0.01 < lines[0]["loss"]


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    linear_problem(Schedule(steps=5, lr=0.1), tmp_path)
    with pytest.raises(TrainingError, match="another schedule"):
        linear_problem(Schedule(steps=6, lr=0.1), tmp_path)


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_checkpoint(tmp_path):
    model = nn.Linear(1, 1)

    def loss(step):
        return model(torch.full((1, 1), float("nan") if step == 7 else 1.0)).sum(), {}

    with pytest.raises(TrainingError, match="step 7"):
        fit(model, loss, Schedule(steps=10, lr=0.1), tmp_path, save_every=5, report=lambda line: None)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 5


def test_shifted_times_have_the_shifted_median():
    t = shifted_uniform(20000, 3.0, torch.Generator().manual_seed(0))
    assert t.min() >= 0.001 and t.max() <= 0.999
    assert t.median().item() == pytest.approx(0.75, abs=0.01)  # 3·½ / (2·½ + 1)


def test_dropped_prompts_become_the_negative_prompt():
    prompts, null = torch.ones(4000, 2, 3), torch.zeros(2, 3)
    out, dropped = drop_condition(prompts, null, 0.1, torch.Generator().manual_seed(0))
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (out[dropped] == 0).all() and (out[~dropped] == 1).all()


@pytest.mark.parametrize("inner_steps", [1, 2, 4])
def test_inner_times_go_to_the_node_of_the_students_grid_below(inner_steps):
    s, r = sample_inner_times(4000, inner_steps, torch.Generator().manual_seed(0))
    grid = shift_grid(inner_steps, 10.0)
    apart = r < s
    assert apart.float().mean().item() == pytest.approx(0.25, abs=0.005)  # s may hit a node
    below = grid[np.searchsorted(grid, s[apart].numpy(), side="right") - 1]
    assert np.allclose(r[apart].numpy(), below)
    assert (r[~apart] == s[~apart]).all()


def small_student():
    torch.manual_seed(0)
    student = TMDStudent(SMALL, head_blocks=1)
    nn.init.normal_(student.head.head.head.weight, std=0.1)
    return student


def test_stage1_with_r_equal_s_and_no_guidance_is_flow_matching_of_the_head():
    """At r = s the target is head -> x1 - x; the weighted loss has a closed form in the plain error."""
    student, data, batch = small_student(), Data(), 6
    loss = tm_meanflow_loss(student, data, 3, batch, 2, 2, guidance=1.0, dropout=0.0, instant_share=1.0)
    value, scalars = loss(5)

    generator = step_generator(3, 5)
    x, prompts = data.batch(batch, generator)
    torch.rand(batch, generator=generator)  # the draw of the condition dropout
    x1, y1 = (torch.randn(x.shape, generator=generator) for _ in range(2))
    t = torch.from_numpy(shift_grid(2, 10.0)).float()[torch.randint(1, 3, (batch,), generator=generator)]
    s, _ = sample_inner_times(batch, 2, generator, instant_share=1.0)
    t5, s5 = t.view(-1, 1, 1, 1, 1), s.view(-1, 1, 1, 1, 1)
    head = student((1 - t5) * x + t5 * x1, t, prompts, (1 - s5) * (x1 - x) + s5 * y1, s, s)
    squared = (head - (x1 - x)).square().flatten(1).sum(1)
    expected = (squared / (squared + x[0].numel())).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert scalars["instant"].item() == pytest.approx((squared / x[0].numel()).mean().item(), rel=1e-5)


class LinearStudent:
    """A head that is linear in y, s and r: its derivative is known, and a finite difference gives it exactly."""

    config = SMALL

    class head:
        fusion = None

        def __new__(cls, y, s, r, *features):
            return 0.3 * y + (2 * s + r).view(-1, 1, 1, 1, 1)

    def backbone(self, x, t, prompt_embeds, cos, sin):
        return x, prompt_embeds


def test_stage1_with_r_below_s_is_the_meanflow_identity():
    """u' = v - (s - r)·du/ds with du/ds = -(0.3·v + 2) for u = y1 - head, v = y1 - y  (TMD Eq. 8-10)."""
    data, batch = Data(), 6
    value, _ = tm_meanflow_loss(LinearStudent(), data, 3, batch, 2, 2, guidance=1.0, dropout=0.0, instant_share=0.0)(5)

    generator = step_generator(3, 5)
    x, _ = data.batch(batch, generator)
    torch.rand(batch, generator=generator)
    x1, y1 = (torch.randn(x.shape, generator=generator) for _ in range(2))
    torch.randint(1, 3, (batch,), generator=generator)
    s, r = (v.view(-1, 1, 1, 1, 1) for v in sample_inner_times(batch, 2, generator, instant_share=0.0))
    assert (r < s).any()
    y = x1 - x
    v = y1 - y
    u = y1 - (0.3 * ((1 - s) * y + s * y1) + 2 * s + r)
    squared = (u - (v + (s - r) * (0.3 * v + 2))).square().flatten(1).sum(1)
    assert value.item() == pytest.approx((squared / (squared + x[0].numel())).mean().item(), rel=1e-4)


def test_stage1_guides_the_target_against_the_negative_prompt():
    """With guidance g the target's velocity is y_neg + g·(y - y_neg), y_neg the head's own for the negative prompt."""
    data, batch = Data(), 6
    value, _ = tm_meanflow_loss(LinearStudent(), data, 3, batch, 2, 2, guidance=3.0, dropout=0.0, instant_share=1.0)(5)

    generator = step_generator(3, 5)
    x, _ = data.batch(batch, generator)
    torch.rand(batch, generator=generator)
    x1, y1 = (torch.randn(x.shape, generator=generator) for _ in range(2))
    torch.randint(1, 3, (batch,), generator=generator)
    s = sample_inner_times(batch, 2, generator, instant_share=1.0)[0].view(-1, 1, 1, 1, 1)
    y = x1 - x
    head = 0.3 * ((1 - s) * y + s * y1) + 3 * s  # the same for either prompt
    squared = (3 * (head - y)).square().flatten(1).sum(1)
    assert value.item() == pytest.approx((squared / (squared + x[0].numel())).mean().item(), rel=1e-4)


def test_stage1_trains_backbone_and_head_alike():
    student = small_student()
    value, _ = tm_meanflow_loss(student, Data(), 0, 4, 2, 2)(0)
    value.backward()
    assert student.backbone.blocks[0].ffn[0].weight.grad.abs().sum() > 0
    assert student.head.fusion.gate.grad.abs().sum() > 0


def test_stage1_learns_a_single_clip():
    """With one clip and no guidance the head's target is x1 - x for a known x: the loss must fall."""
    data = Data()
    data.latents = data.latents[:1].expand(8, -1, -1, -1, -1)
    student = small_student()
    loss = tm_meanflow_loss(student, data, 0, 16, 2, 2, guidance=1.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    errors = []
    for step in range(120):
        value, scalars = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        errors.append(scalars["instant"].item())
    assert np.mean(errors[-10:]) < 0.75 * np.mean(errors[:5])
