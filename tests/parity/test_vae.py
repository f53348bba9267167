"""tmd_ref's VAEs against diffusers' own implementation with the same random weights, and against themselves."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.synthetic_checkpoints import vae_config
from tmd_export.checkpoints.names import converted
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4
CONFIGS = {
    "wan2.1": replace(WAN_VAE_CONFIGS["wan2.1"], dim=8),
    "wan2.2": replace(WAN_VAE_CONFIGS["wan2.2"], dim=8, decoder_dim=12),
}
SHAPES = [(1, 1, 2, 2), (2, 2, 2, 3), (1, 3, 3, 2), (1, 4, 2, 1)]  # batch, frames, height, width of latents


@pytest.fixture(scope="module", params=CONFIGS)
def models(request):
    torch.manual_seed(0)
    ours = WanVAE(CONFIGS[request.param]).eval().requires_grad_(False)
    for name, weight in ours.named_parameters():
        if name.endswith("gamma"):
            weight.add_(0.2 * torch.randn_like(weight))
        else:
            weight.normal_(std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
    theirs = diffusers.AutoencoderKLWan(**vae_config(ours.config)).eval()
    weights = {converted("vae", key): value for key, value in ours.state_dict().items()}
    assert len(weights) == 194 + 2 * ours.config.shortcuts
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs


def statistics(vae):
    """Mean and reciprocal deviation in the form of diffusers' pipeline."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    return torch.tensor(vae.config.latents_mean).view(shape), 1.0 / torch.tensor(vae.config.latents_std).view(shape)


def video_shape(config, shape):
    """Of the video `[B,3,T,H,W]` whose latents have that batch, those frames, height and width."""
    batch, frames, height, width = shape
    return (batch, 3, 4 * (frames - 1) + 1, height * config.spatial_stride, width * config.spatial_stride)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_latents_equal_diffusers(models, shape):
    ours, theirs = models
    video = torch.rand(video_shape(ours.config, shape), generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, scale = statistics(theirs)
    expected = (theirs.encode(video).latent_dist.mode() - mean) * scale
    latents = ours.encode(video)
    assert latents.shape == (shape[0], ours.config.z_dim, *shape[1:])
    assert 0.05 < expected.std() < 5
    assert (latents - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_video_equals_diffusers_and_is_the_same_frame_by_frame(models, shape):
    ours, theirs = models
    latents = torch.randn(shape[0], ours.config.z_dim, *shape[1:], generator=torch.Generator().manual_seed(2))
    mean, scale = statistics(theirs)
    expected = theirs.decode(latents / scale + mean).sample
    video = ours.decode(latents)
    assert video.shape == video_shape(ours.config, shape)
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


@pytest.mark.parametrize(("name", "parameters"), [("wan2.1", 126_892_531), ("wan2.2", 704_688_668)])
def test_the_official_size_has_its_parameter_count_and_statistics(name, parameters):
    with torch.device("meta"):
        ours = WanVAE(WAN_VAE_CONFIGS[name])
        theirs = diffusers.AutoencoderKLWan(**vae_config(ours.config))
    assert sum(weight.numel() for weight in ours.parameters()) == parameters
    shapes = {converted("vae", key): value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert list(ours.config.latents_mean) == theirs.config.latents_mean
    assert list(ours.config.latents_std) == theirs.config.latents_std


def test_a_video_that_does_not_fit_is_refused(models):
    with pytest.raises(ValueError, match="4k\\+1 frames"):
        models[0].encode(torch.zeros(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match=f"divisible by {models[0].config.spatial_stride}"):
        models[0].encode(torch.zeros(1, 3, 5, 16, 24 if models[0].config.shortcuts else 20))
