"""tmd_ref's VAE against diffusers' independent implementation, with random weights carried over, and against itself."""

import pytest
import torch

from tmd_export.checkpoints.names import converted
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4
CONFIG = WanVAEConfig(dim=8)
SHAPES = [(1, 1, 16, 16), (2, 5, 16, 24), (1, 9, 24, 16), (1, 13, 16, 8)]  # batch, frames, height, width


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    ours = WanVAE(CONFIG).eval().requires_grad_(False)
    for name, weight in ours.named_parameters():
        if name.endswith("gamma"):
            weight.add_(0.2 * torch.randn_like(weight))
        else:
            weight.normal_(std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
    theirs = diffusers.AutoencoderKLWan(
        base_dim=CONFIG.dim,
        z_dim=CONFIG.z_dim,
        dim_mult=list(CONFIG.dim_mult),
        num_res_blocks=CONFIG.num_res_blocks,
        temperal_downsample=list(CONFIG.temporal_downsample),
    ).eval()
    weights = {converted("vae", key): value for key, value in ours.state_dict().items()}
    assert len(weights) == 194
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs


def statistics(vae):
    """Mean and reciprocal deviation in the form of diffusers' pipeline."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    return torch.tensor(vae.config.latents_mean).view(shape), 1.0 / torch.tensor(vae.config.latents_std).view(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_latents_equal_diffusers(models, shape):
    ours, theirs = models
    batch, *size = shape
    video = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, scale = statistics(theirs)
    expected = (theirs.encode(video).latent_dist.mode() - mean) * scale
    latents = ours.encode(video)
    assert latents.shape == (batch, 16, 1 + (shape[1] - 1) // 4, shape[2] // 8, shape[3] // 8)
    assert 0.05 < expected.std() < 5
    assert (latents - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_video_equals_diffusers_and_is_the_same_frame_by_frame(models, shape):
    ours, theirs = models
    batch, frames, height, width = shape
    size = (batch, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(2))
    mean, scale = statistics(theirs)
    expected = theirs.decode(latents / scale + mean).sample
    video = ours.decode(latents)
    assert video.shape == (batch, 3, frames, height, width)
    inside = (expected.abs() < 1).float().mean()
    assert expected.std() > 0.2 and inside > 0.3  # a video that is clamped everywhere would hide errors
    assert (video - expected).abs().max() <= TOLERANCE

    first, caches = ours.decode_first(latents[:, :, :1])
    assert len(caches) == 32
    chunks = [first]
    for k in range(1, latents.shape[2]):
        chunk, caches = ours.decode_step(latents[:, :, k : k + 1], caches)
        chunks.append(chunk)
    assert (torch.cat(chunks, dim=2).clamp(-1, 1) - video).abs().max() <= 1e-5


def test_the_official_size_has_its_parameter_count_and_statistics():
    with torch.device("meta"):
        ours = WanVAE(WAN_VAE_CONFIGS["wan2.1"])
        theirs = diffusers.AutoencoderKLWan()
    assert sum(weight.numel() for weight in ours.parameters()) == 126_892_531
    shapes = {converted("vae", key): value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert list(ours.config.latents_mean) == theirs.config.latents_mean
    assert list(ours.config.latents_std) == theirs.config.latents_std


def test_a_video_that_does_not_fit_is_refused(models):
    with pytest.raises(ValueError, match="4k\\+1 frames"):
        models[0].encode(torch.zeros(1, 3, 4, 16, 16))
