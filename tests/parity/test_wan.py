"""tmd_ref's Wan transformer against diffusers' independent implementation, with random weights carried over."""

import pytest
import torch

from tmd_export.checkpoints.names import converted
from tmd_ref.first_frame import FirstFrameWan
from tmd_ref.wan import WAN_CONFIGS, WanConfig, WanTransformer, rope_tables

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4

# A head of 28 splits into 12 + 8 + 8 for (t, h, w), so that no two axes can be exchanged unnoticed.
CONFIG = WanConfig(dim=84, ffn_dim=160, num_heads=3, num_layers=3, text_dim=48, text_len=12)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    ours = WanTransformer(CONFIG).eval()
    with torch.no_grad():
        for name, weight in ours.named_parameters():  # also what starts at zero or one must matter
            weight.add_(0.1 * torch.randn_like(weight))
            if name.endswith("norm_q.weight"):
                weight.mul_(2)  # sharper attention
    theirs = diffusers.WanTransformer3DModel(
        patch_size=CONFIG.patch_size,
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        in_channels=CONFIG.in_channels,
        out_channels=CONFIG.out_channels,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=CONFIG.eps,
        rope_max_seq_len=64,
    ).eval()
    weights = {converted("transformer", key): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width", "text"),
    [(2, 5, 8, 8, 12), (1, 3, 6, 10, 12), (3, 1, 12, 4, 7), (2, 7, 4, 14, 12), (1, 4, 10, 6, 1)],
)
@torch.no_grad()
def test_velocity_equals_diffusers(models, batch, frames, height, width, text):
    ours, theirs = models
    generator = torch.Generator().manual_seed(batch * frames + width)
    x = torch.randn(batch, 16, frames, height, width, generator=generator)
    t = torch.rand(batch, generator=generator)
    prompt_embeds = torch.randn(batch, text, CONFIG.text_dim, generator=generator)
    prompt_embeds[:, text // 2 + 1 :] = 0

    velocity = ours(x, t, prompt_embeds)
    expected = theirs(x, 1000 * t, prompt_embeds, return_dict=False)[0]

    assert velocity.shape == x.shape
    scale = expected.std()
    assert 0.3 < scale < 3, f"the comparison wants outputs of scale about 1, this is {scale:.2f}"
    assert (velocity - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("held", [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]], ids=str)
@torch.no_grad()
def test_times_per_frame_equal_times_per_token_of_diffusers(models, held):
    """As WanImageToVideoPipeline tells them: 0 for every token of a held frame."""
    ours, theirs = models
    holding = FirstFrameWan(CONFIG).eval()
    holding.load_state_dict(ours.state_dict())
    x, t, prompt_embeds = torch.randn(2, 16, 4, 6, 8), torch.rand(2), torch.randn(2, 12, CONFIG.text_dim)
    mask = 1 - torch.tensor(held, dtype=torch.float32)
    velocity = holding(x, t, prompt_embeds, 1 - mask)
    times = 1000 * t[:, None] * mask.repeat_interleave(3 * 4)
    expected = theirs(x, times, prompt_embeds, return_dict=False)[0]
    assert (velocity - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_rope_given_equals_rope_computed(models):
    x, t, prompt_embeds = torch.randn(1, 16, 3, 6, 8), torch.rand(1), torch.randn(1, 5, CONFIG.text_dim)
    rope = rope_tables(3, 3, 4, CONFIG.head_dim)
    assert torch.equal(models[0](x, t, prompt_embeds, rope=rope), models[0](x, t, prompt_embeds))


@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_rope_tables_equal_complex_powers(head_dim):
    """exp(i·position·10000^(-2k/d)) per axis, multiplied out in complex128 as Wan's own code does it."""
    grid = (3, 2, 5)
    d_space = 2 * (head_dim // 6)
    expected = []
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                row = [
                    torch.polar(torch.tensor(1.0).double(), torch.tensor(position * 10000.0 ** (-2 * k / d)).double())
                    for position, d in ((t, head_dim - 2 * d_space), (h, d_space), (w, d_space))
                    for k in range(d // 2)
                ]
                expected.append(torch.stack(row))
    table = torch.stack(expected)
    cos, sin = rope_tables(*grid, head_dim)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (30, head_dim // 2)
    torch.testing.assert_close(cos, table.real.float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, table.imag.float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "parameters", "keys"), [("wan1.3b", 1_418_996_800, 825), ("wan14b", 14_288_491_584, 1095)]
)
def test_parameter_count_is_that_of_the_official_checkpoint(name, parameters, keys):
    with torch.device("meta"):
        model = WanTransformer(WAN_CONFIGS[name])
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


def test_patch_embedding_has_the_shape_of_the_official_checkpoint(models):
    assert models[0].state_dict()["patch_embedding.weight"].shape == (CONFIG.dim, 16, 1, 2, 2)


@pytest.mark.parametrize("shape", [(1, 16, 2, 5, 8), (1, 16, 2, 8, 5)])
def test_odd_sides_are_refused_with_what_to_do(models, shape):
    with pytest.raises(ValueError, match="16 for Wan2"):
        models[0](torch.randn(shape), torch.rand(1), torch.randn(1, 4, CONFIG.text_dim))


def test_bfloat16_autocast_keeps_residual_and_output_close():
    """Training under autocast: gradients reach every weight and the velocity stays within bfloat16's error."""
    torch.manual_seed(1)
    model = WanTransformer(CONFIG)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    x, t, prompt_embeds = torch.randn(2, 16, 3, 4, 6), torch.rand(2), torch.randn(2, 5, CONFIG.text_dim)
    exact = model(x, t, prompt_embeds)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model(x, t, prompt_embeds)
    assert velocity.dtype == torch.float32
    assert (velocity - exact).norm() / exact.norm() < 4e-3  # measured 3e-3, more if the residual stream rounds
    velocity.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
