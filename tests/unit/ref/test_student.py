"""The TMD student: what it computes at the start, its flow map, its derivative, its file."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from tmd_ref.meanflow import finite_difference_jvp
from tmd_ref.samplers import effective_nfe, inner_flow, shift_grid, tmd_sample
from tmd_ref.student import GatedFusion, TimeGrids, TMDStudent, flow_head_step, load_student, save_student
from tmd_ref.wan import WanConfig, WanTransformer

CONFIG = WanConfig(dim=48, ffn_dim=96, num_heads=3, num_layers=5, text_dim=20, text_len=6)
HEAD_BLOCKS = 2
UNREAD: tuple[Any, Any, Any, Any] = (None, None, None, None)
"""Features, context and rope tables of a head that reads none."""


def perturbed(model, size=0.1, seed=0):
    """No weight at zero or one, so that everything takes part in a comparison."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model.eval()


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return perturbed(WanTransformer(CONFIG))


@pytest.fixture
def student(teacher):
    return perturbed(TMDStudent.from_teacher(teacher, HEAD_BLOCKS), seed=1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(2, 16, 3, 4, 6, generator=generator),
        "y": torch.randn(2, 16, 3, 4, 6, generator=generator),
        "t": torch.rand(2, generator=generator),
        "prompt_embeds": torch.randn(2, 6, CONFIG.text_dim, generator=generator),
    }


@pytest.mark.parametrize("head_blocks", [1, 2, 4])
@torch.no_grad()
def test_a_closed_gate_and_s_equal_t_give_the_teachers_velocity_bit_for_bit(teacher, batch, head_blocks):
    student = TMDStudent.from_teacher(teacher, head_blocks)
    assert isinstance(student.head.fusion, GatedFusion)
    student.head.fusion.gate.fill_(-math.inf)
    x, t, prompt_embeds = batch["x"], batch["t"], batch["prompt_embeds"]
    expected = teacher(x, t, prompt_embeds)
    for r in (torch.zeros_like(t), t / 2, t):  # at the start the interval s - r plays no part
        assert torch.equal(student(x, t, prompt_embeds, y=batch["y"], s=t, r=r), expected)


@pytest.mark.parametrize(("fusion", "limit"), [("gated", 0.02), ("concat", 0.1)])
@torch.no_grad()
def test_a_fresh_student_is_close_to_its_teacher(teacher, batch, fusion, limit):
    student = TMDStudent.from_teacher(teacher, HEAD_BLOCKS, fusion)
    x, t, prompt_embeds = batch["x"], batch["t"], batch["prompt_embeds"]
    velocity = student(x, t, prompt_embeds, y=batch["y"], s=t, r=torch.zeros_like(t))
    expected = teacher(x, t, prompt_embeds)
    assert 0 < (velocity - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("inner_steps", [1, 2, 4])
@torch.no_grad()
def test_b_rollout_is_convex_combination_of_head_outputs(student, batch, inner_steps):
    outputs = []
    student.head.register_forward_hook(lambda module, args, output: outputs.append(output))
    cos, sin = student.rope(batch["x"])
    features, context = student.backbone(batch["x"], batch["t"], batch["prompt_embeds"], cos, sin)
    s = shift_grid(inner_steps, 10)
    y1 = batch["y"]
    velocity = inner_flow(student.head, y1, s, features, context, cos, sin)

    weights = [s[j] - s[j - 1] for j in range(inner_steps, 0, -1)]
    assert len(outputs) == inner_steps
    assert sum(weights) + (1 - s[-1]) == pytest.approx(1)
    expected = (1 - s[-1]) * y1 + sum(weight * output for weight, output in zip(weights, outputs, strict=True))
    torch.testing.assert_close(velocity, expected, rtol=0, atol=2e-6)


def velocity_of_inner_flow(student, batch):
    """u(y, s) = y1 - head(y, s, r) in float64 with everything else held."""
    student = student.double()
    x, y1 = batch["x"].double(), batch["y"].double()
    r = torch.full((len(x),), 0.2).double()
    with torch.no_grad():
        cos, sin = student.rope(x)
        held = (*student.backbone(x, batch["t"].double(), batch["prompt_embeds"].double(), cos, sin), cos, sin)
    return (lambda y, s: y1 - student.head(y, s, r, *held)), y1, r


def test_c_finite_difference_equals_exact_jvp(student, batch):
    u, y1, r = velocity_of_inner_flow(student, batch)
    y = torch.randn_like(y1)
    v = torch.randn_like(y1)
    s = torch.tensor([0.4, 0.9]).double()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(u, (y, s), (v, torch.ones_like(s)))[1]
    errors = []
    # The head embeds 1000·s, so δ = 5e-3 turns its fastest component by 5 radians: exactness needs a smaller step.
    for delta in (4e-5, 2e-5, 1e-6):
        difference = finite_difference_jvp(u, y, s, v, delta=delta, r=r)
        errors.append(((difference - exact).norm() / exact.norm()).item())
    assert errors[2] < 1e-6
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1), "a central difference has an error of order δ²"


@torch.no_grad()
def test_c_finite_difference_is_one_sided_at_the_ends():
    """d/ds of s² is 2s; central differences find it exactly, one-sided ones are off by ±δ."""
    delta = 5e-3
    s = torch.tensor([0.5, 0.003, 0.5, 0.502, 0.996, 0.998], dtype=torch.float64)
    r = torch.tensor([0.0, 0.0, 0.499, 0.499, 0.5, 0.997], dtype=torch.float64)
    expected_offset = torch.tensor([0, delta, delta, delta, -delta, -delta], dtype=torch.float64)
    y = torch.zeros(6, 1, 1).double()
    derivative = finite_difference_jvp(lambda y, s: (s**2).view(-1, 1, 1), y, s, y, delta=delta, r=r)
    torch.testing.assert_close(derivative.flatten() - 2 * s, expected_offset, rtol=0, atol=1e-12)


@torch.no_grad()
def test_c_finite_difference_never_leaves_the_times_of_training():
    seen = []

    def watched(y, s):
        seen.append(s)
        return y

    s = torch.linspace(1e-3, 0.999, 200)
    y = torch.zeros(200, 1)
    finite_difference_jvp(watched, y, s, y, r=s * 0)
    times = torch.cat(seen)
    assert times.min() > 1e-3 - 1e-6
    assert times.max() < 0.999 + 1e-6


@torch.no_grad()
def test_c_finite_difference_moves_y_along_v():
    """fn = a·y² has the derivative 2·a·y·v, whatever s."""
    y, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    s = torch.tensor([0.3, 0.5, 0.7]).double()
    torch.testing.assert_close(finite_difference_jvp(lambda y, s: 5 * y**2, y, s, v), 10 * y * v)


def test_c_finite_difference_refuses_a_step_of_zero():
    with pytest.raises(ValueError, match="must be positive"):
        finite_difference_jvp(lambda y, s: y, torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 1), delta=0)


@pytest.mark.parametrize(("outer_steps", "inner_steps"), [(1, 1), (1, 4), (2, 2), (3, 4)])
@torch.no_grad()
def test_d_blocks_run_equal_layers_times_effective_nfe(student, batch, outer_steps, inner_steps):
    count = 0

    def counted(*_):
        nonlocal count
        count += 1

    for block in (*student.backbone.blocks, *student.head.blocks):
        block.register_forward_hook(counted)
    tmd_sample(student, batch["y"], batch["prompt_embeds"], outer_steps, inner_steps)
    nfe = effective_nfe(outer_steps, inner_steps, HEAD_BLOCKS, CONFIG.num_layers)
    assert count == pytest.approx(nfe * CONFIG.num_layers)


def test_f_exact_head_carries_y_from_s_to_r():
    """With head = y, the average velocity is noise - y and the flow map moves along y_s = (1 - s)·y + s·noise."""
    generator = torch.Generator().manual_seed(3)
    y, noise = torch.randn(2, 3, 16, 2, 4, 4, generator=generator, dtype=torch.float64)
    s, r = torch.tensor([0.999, 0.7, 0.3]).double(), torch.tensor([0.0, 0.4, 0.3]).double()

    def at(time):
        return (1 - time).view(-1, 1, 1, 1, 1) * y + time.view(-1, 1, 1, 1, 1) * noise

    y_r = flow_head_step(lambda *_: y, at(s), noise, s, r, *UNREAD)
    torch.testing.assert_close(y_r, at(r), rtol=0, atol=1e-14)


def test_one_step_from_noise_is_the_heads_prediction():
    """N = 1, s = 1, r = 0: noise - (noise - head) = head, the teacher's own forward pass (the sign of TMD Eq. 13)."""
    noise, output = torch.randn(2, 1, 16, 1, 2, 2, dtype=torch.float64)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    y = flow_head_step(lambda *_: output, noise, noise, one, zero, *UNREAD)
    torch.testing.assert_close(y, output)


@pytest.mark.parametrize("fusion", ["gated", "concat"])
def test_gradients_pass_through_the_whole_rollout(teacher, batch, fusion):
    """Nothing is detached, neither the features nor y between inner steps: the gradient along a random direction of all
    weights equals the difference quotient, in float64, and every weight gets one."""
    student = perturbed(TMDStudent.from_teacher(teacher, HEAD_BLOCKS, fusion), seed=1).double()
    if fusion == "gated":
        torch.nn.init.zeros_(student.head.fusion.gate)  # open, so that y of the first step matters to the second
    x, y1, t, prompt_embeds = (batch[name].double() for name in ("x", "y", "t", "prompt_embeds"))
    cos, sin = student.rope(x)
    target = torch.randn_like(x)

    def loss():
        features, context = student.backbone(x, t, prompt_embeds, cos, sin)
        velocity = inner_flow(student.head, y1, shift_grid(2, 2), features, context, cos, sin)
        return (velocity * target).mean()

    loss().backward()
    assert [name for name, weight in student.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    weights = list(student.parameters())
    direction = [torch.randn_like(weight) for weight in weights]
    expected = sum((weight.grad * d).sum() for weight, d in zip(weights, direction, strict=True))
    step = 1e-6
    with torch.no_grad():
        values = []
        for move in (step, -2 * step):
            for weight, d in zip(weights, direction, strict=True):
                weight.add_(move * d)
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_head_sees_the_interval_once_its_embedder_is_trained(student, batch):
    arguments = batch["x"], batch["t"], batch["prompt_embeds"], batch["y"], torch.full((2,), 0.9)
    assert not torch.allclose(student(*arguments, torch.zeros(2)), student(*arguments, torch.full((2,), 0.5)))


def test_the_teacher_stays_as_it_is(teacher, batch):
    before = copy.deepcopy(teacher.state_dict())
    student = TMDStudent.from_teacher(teacher, HEAD_BLOCKS)
    perturbed(student, seed=5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_patch_and_time_embedding_are_shared_and_counted_once(student):
    assert student.head.patch_embedding.weight is student.backbone.patch_embedding.weight
    assert student.head.time_embedding[0].weight is student.backbone.time_embedding[0].weight
    dim, ffn = CONFIG.dim, CONFIG.ffn_dim
    teacher = sum(weight.numel() for weight in WanTransformer(CONFIG).parameters())
    fusion = 2 * dim * ffn + ffn + dim + 3 * dim + 1
    interval = (256 + 1) * dim + (dim + 1) * dim + (dim + 1) * 6 * dim
    assert sum(weight.numel() for weight in student.parameters()) == teacher + fusion + interval


@pytest.mark.parametrize("head_blocks", [0, 5, 6, -1])
def test_a_cut_that_leaves_a_part_empty_is_refused(head_blocks):
    with pytest.raises(ValueError, match="choose 1 to 4"):
        TMDStudent(CONFIG, head_blocks)


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="gated, concat"):
        TMDStudent(CONFIG, HEAD_BLOCKS, "sum")


@pytest.mark.parametrize("fusion", ["gated", "concat"])
@torch.no_grad()
def test_a_saved_student_comes_back_equal_and_still_shared(tmp_path, teacher, batch, fusion):
    grids = TimeGrids(3, 2, 3.0, 8.0)
    student = perturbed(TMDStudent.from_teacher(teacher, HEAD_BLOCKS, fusion, grids), seed=1)
    save_student(tmp_path / "student.safetensors", student)
    loaded = load_student(tmp_path / "student.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]
    assert (loaded.config, loaded.head_blocks, loaded.fusion, loaded.grids) == (CONFIG, HEAD_BLOCKS, fusion, grids)
    assert loaded.head.patch_embedding.weight is loaded.backbone.patch_embedding.weight
    noise = torch.randn(2, *batch["x"].shape)
    samples = [
        tmd_sample(model, batch["x"], batch["prompt_embeds"], 2, 2, inner_noise=noise) for model in (student, loaded)
    ]
    assert torch.equal(*samples)
    by_hand = tmd_sample(student, batch["x"], batch["prompt_embeds"], 2, 2, 3.0, 8.0, inner_noise=noise)
    assert torch.equal(samples[0], by_hand)


@pytest.mark.parametrize("wrong", [{"outer_steps": 0}, {"inner_steps": 1.5}, {"outer_shift": 0.5}, {"steps": 2}])
def test_time_grids_that_are_none_are_refused(tmp_path, student, wrong):
    from safetensors import safe_open

    save_student(tmp_path / "student.safetensors", student)
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["grids"] |= wrong
    weights = load_file(tmp_path / "student.safetensors")
    save_file(weights, tmp_path / "wrong.safetensors", {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=f"no student configuration.*{next(iter(wrong))}"):
        load_student(tmp_path / "wrong.safetensors")


def test_a_file_without_configuration_is_refused(tmp_path, student):
    save_student(tmp_path / "student.safetensors", student)
    save_file(load_file(tmp_path / "student.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="no student configuration"):
        load_student(tmp_path / "bare.safetensors")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_file_with_other_weights_is_refused_by_name(tmp_path, student, change):
    from safetensors import safe_open

    save_student(tmp_path / "student.safetensors", student)
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = load_file(tmp_path / "student.safetensors")
    if change == "missing":
        del weights["head.fusion.gate"]
    else:
        weights["head.fusion.gate2"] = torch.zeros(1)
    save_file(weights, tmp_path / "changed.safetensors", metadata)
    with pytest.raises(ValueError, match=r"head\.fusion\.gate"):
        load_student(tmp_path / "changed.safetensors")


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="tmd-distill"):
        load_student(tmp_path / "absent.safetensors")
