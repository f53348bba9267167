"""Training: resumable to the bit, stopped by bad numbers; the objectives against closed forms."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.distill_worker import SMALL, Data
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.evaluate import write_png
from tmd_ref.distill.parallel import World
from tmd_ref.distill.stage1 import sample_inner_times, tm_meanflow_loss
from tmd_ref.distill.state import fingerprint, read_checkpoint
from tmd_ref.distill.teacher import drop_condition
from tmd_ref.distill.trainer import Run, Schedule, TrainingError, fit, step_generator, train
from tmd_ref.meanflow import exact_jvp, finite_difference_jvp
from tmd_ref.samplers import shift_grid
from tmd_ref.student import TMDStudent


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


def two_networks(run, fail_at=None, micro=None, batch=8):
    """A pair that learns in turn, as in stage 2; samples' numbers are keyed, averages of both are kept."""
    torch.manual_seed(0)
    schedule = Schedule(steps=12, lr=0.05, warmup=2, ema=0.9)
    first, second = nn.Linear(3, 1), nn.Linear(3, 1)

    def objective(draws):
        if draws.step == fail_at:
            raise KeyboardInterrupt
        x = draws.normal((3,))
        if turn(draws.step) == ("second",):
            return (second(x) - first(x).detach()).square().mean(), {}
        return (first(x).squeeze(1) - x.sum(1)).square().mean(), {"other": second(x).detach().mean()}

    def turn(step):
        return ("second",) if step % 3 else ("first",)

    pair = {"first": (first, schedule), "second": (second, schedule)}
    settings = Run(run, batch=batch, micro=micro, log_every=1, save_every=4, report=lambda line: None)
    return train(pair, objective, settings, turn)


def weights(networks):
    return [p for network in networks.values() for p in network.parameters()]


def test_a_resumed_run_of_several_networks_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    whole = two_networks(tmp_path / "whole")
    for fail_at in (6, 11):
        with pytest.raises(KeyboardInterrupt):
            two_networks(tmp_path / "parts", fail_at=fail_at)
    parts = two_networks(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts), strict=True))
    state = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert state["identity"]["schedule"]["first"]["lr"] == 0.05 and len(state["code"]["sources"]) == 16
    again = two_networks(tmp_path / "whole")  # nothing left to do: the averages come back as they were
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    whole, parts = two_networks(tmp_path / "whole"), two_networks(tmp_path / "parts", micro=2)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(whole), weights(parts), strict=True))
    with pytest.raises(ValueError, match="does not divide"):
        two_networks(tmp_path / "odd", micro=3)


def test_a_full_disk_stops_training_and_keeps_the_checkpoint(tmp_path):
    """/dev/full is a disk without room: every write to it fails as a full disk's does."""
    with pytest.raises(KeyboardInterrupt):
        two_networks(tmp_path, fail_at=5)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt.partial").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"No space left.*is intact.*Make room"):
        two_networks(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "checkpoint.pt.partial").exists()
    two_networks(tmp_path)


def test_a_full_disk_keeps_the_picture_of_an_evaluation(tmp_path):
    picture = tmp_path / "evaluation.png"
    write_png(picture, np.zeros((8, 8, 3), np.uint8))
    before = picture.read_bytes()
    (tmp_path / "evaluation.png.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_png(picture, np.ones((8, 8, 3), np.uint8))
    assert picture.read_bytes() == before


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path):
    two_networks(tmp_path)
    with pytest.raises(TrainingError, match="another batch: 8, now 4"):
        two_networks(tmp_path, batch=4)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match="no checkpoint of this version"):
        two_networks(tmp_path)


def test_shifted_times_have_the_shifted_median():
    t = Draws(0, 0, 20000).times(3.0)
    assert t.min() >= 0.001 and t.max() <= 0.999
    assert t.median().item() == pytest.approx(0.75, abs=0.01)  # 3·½ / (2·½ + 1)


def test_dropped_prompts_become_the_negative_prompt():
    prompts, null = torch.ones(4000, 2, 3), torch.zeros(2, 3)
    out, dropped = drop_condition(prompts, null, 0.1, Draws(0, 0, 4000))
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (out[dropped] == 0).all() and (out[~dropped] == 1).all()


@pytest.mark.parametrize("inner_steps", [1, 2, 4])
def test_inner_times_go_to_the_node_of_the_students_grid_below(inner_steps):
    s, r = sample_inner_times(Draws(0, 0, 4000), inner_steps)
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


def drawn(data, batch, step=5, instant_share=0.75, seed=3):
    """The numbers of a stage 1 step: x, prompts, x1, y1, and t, s, r as `[B,1,1,1,1]`."""
    draws = Draws(seed, step, batch)
    x, prompts = data.sample(draws)
    draws.uniform()  # the condition dropout
    x1, y1 = draws.normal(x.shape[1:]), draws.normal(x.shape[1:])
    t = torch.from_numpy(shift_grid(2, 10.0)).float()[1 + draws.integers(2)]
    s, r = sample_inner_times(draws, 2, instant_share)
    return x, prompts, x1, y1, *(v.view(-1, 1, 1, 1, 1) for v in (t, s, r))


def test_stage1_with_r_equal_s_and_no_guidance_is_flow_matching_of_the_head():
    """At r = s, which plain TM always has, the target is head -> x1 - x; the weighted loss has a closed form."""
    student, data, batch = small_student(), Data(), 6
    objective = tm_meanflow_loss(student, data, 2, 2, guidance=1.0, dropout=0.0, instant_share=1.0)
    value, scalars = objective(Draws(3, 5, batch))
    x, prompts, x1, y1, t, s, _ = drawn(data, batch, instant_share=1.0)
    head = student((1 - t) * x + t * x1, t.flatten(), prompts, (1 - s) * (x1 - x) + s * y1, s.flatten(), s.flatten())
    squared = (head - (x1 - x)).square().flatten(1).sum(1)
    assert value.item() == pytest.approx((squared / (squared + x[0].numel())).mean().item(), rel=1e-5)
    assert scalars["instant"].item() == pytest.approx((squared / x[0].numel()).mean().item(), rel=1e-5)
    assert "interval" not in scalars


class LinearStudent:
    """A head that is linear in y, s and r: its derivative is known, and a finite difference gives it exactly."""

    config = SMALL

    class head:
        fusion = None

        def __new__(cls, y, s, r, *features):
            return 0.3 * y + (2 * s + r).view(-1, 1, 1, 1, 1)

    def backbone(self, x, t, prompt_embeds, cos, sin):
        return x, prompt_embeds


@pytest.mark.parametrize("delta", [5e-3, None], ids=["difference", "exact"])
def test_stage1_with_r_below_s_is_the_meanflow_identity(delta):
    """u' = v - (s - r)·du/ds with du/ds = -(0.3·v + 2) for u = y1 - head, v = y1 - y  (TMD Eq. 8-10)."""
    data, batch = Data(), 6
    objective = tm_meanflow_loss(LinearStudent(), data, 2, 2, guidance=1.0, dropout=0.0, instant_share=0.0, delta=delta)
    value, scalars = objective(Draws(3, 5, batch))
    x, _, x1, y1, _, s, r = drawn(data, batch, instant_share=0.0)
    assert (r < s).any()
    y = x1 - x
    v = y1 - y
    u = y1 - (0.3 * ((1 - s) * y + s * y1) + 2 * s + r)
    squared = (u - (v + (s - r) * (0.3 * v + 2))).square().flatten(1).sum(1)
    assert value.item() == pytest.approx((squared / (squared + x[0].numel())).mean().item(), rel=1e-4)
    assert scalars["interval"].item() == pytest.approx((squared / x[0].numel()).mean().item(), rel=1e-4)


def test_stage1_guides_the_target_against_the_negative_prompt():
    """With guidance g the target's velocity is y_neg + g·(y - y_neg), y_neg the head's own for the negative prompt."""
    data, batch = Data(), 6
    objective = tm_meanflow_loss(LinearStudent(), data, 2, 2, guidance=3.0, dropout=0.0, instant_share=1.0)
    value, _ = objective(Draws(3, 5, batch))
    x, _, x1, y1, _, s, _ = drawn(data, batch, instant_share=1.0)
    y = x1 - x
    head = 0.3 * ((1 - s) * y + s * y1) + 3 * s  # the same for either prompt
    squared = (3 * (head - y)).square().flatten(1).sum(1)
    assert value.item() == pytest.approx((squared / (squared + x[0].numel())).mean().item(), rel=1e-4)


def test_stage1_trains_backbone_and_head_alike():
    student = small_student()
    value, _ = tm_meanflow_loss(student, Data(), 2, 2)(Draws(0, 0, 4))
    value.backward()
    assert student.backbone.blocks[0].ffn[0].weight.grad.abs().sum() > 0
    assert student.head.fusion.gate.grad.abs().sum() > 0


@pytest.mark.long
def test_stage1_learns_a_single_clip():
    """With one clip and no guidance the head's target is x1 - x for a known x: the loss must fall."""
    data = Data()
    data.clips = data.clips[:1].expand(8, -1, -1, -1, -1)
    student = small_student()
    objective = tm_meanflow_loss(student, data, 2, 2, guidance=1.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    errors = []
    for step in range(120):
        value, scalars = objective(Draws(0, step, 16))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        errors.append(scalars["instant"].item())
    assert np.mean(errors[-10:]) < 0.75 * np.mean(errors[:5])


@pytest.mark.parametrize(("delta", "error"), [(1e-3, 0.2), (1e-4, 2e-3)])
def test_the_finite_difference_converges_to_the_exact_derivative(delta, error):
    """In float64, on a network of the built-in model's kind: error O(δ²), and at the paper's δ nothing is left of it.

    Times enter as 1000·s: a step of 5e-3 turns the fastest component of the embedding by 5 radians.
    """
    student = small_student().double()
    data = Data()
    x, prompts, x1, y1, t, s, r = (v.double() for v in drawn(data, 6, instant_share=0.0))
    features, context = student.backbone((1 - t) * x + t * x1, t.flatten(), prompts, *data.rope(SMALL))
    rope = data.rope(SMALL)

    def head(y, at):
        return student.head(y, at, r.flatten(), features, context, *rope)

    y = x1 - x
    at = (1 - s) * y + s * y1, s.flatten(), y1 - y
    exact = exact_jvp(head, *at)
    found = finite_difference_jvp(head, *at, delta, r=r.flatten())
    assert (found - exact).norm() < error * exact.norm()
    assert (finite_difference_jvp(head, *at, 5e-3, r=r.flatten()) - exact).norm() > 0.3 * exact.norm()


def test_another_input_of_the_same_size_has_another_fingerprint(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(bytes(5_000_000))
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    (folder / "a.safetensors").write_bytes(bytes(2_500_000) + b"x" + bytes(2_499_999))
    assert fingerprint(folder) != before and fingerprint(folder / "a.safetensors") != fingerprint(folder)


def test_a_checkpoint_made_from_another_input_is_refused(tmp_path):
    path, world = tmp_path / "checkpoint.pt", World()
    torch.save({"identity": {"seed": 1, "input teacher": "a"}}, path)
    assert read_checkpoint(path, {"seed": 1, "input teacher": "a"}, world) is not None
    assert read_checkpoint(path, {"seed": 1}, world) is not None, "an earlier version noted no inputs"
    with pytest.raises(TrainingError, match="made with another input teacher: a, now b"):
        read_checkpoint(path, {"seed": 1, "input teacher": "b"}, world)
