"""Training of a small Wan VAE on rendered scenes.

Wan's VAE itself is given; this makes the built-in model's. Loss: L1 with more weight on the shape (a twentieth of the
picture), plus a small KL term. Steps see windows of a clip instead of all of it: short ones around the shape, short
ones of the whole picture (the attention in the middle must meet its real size), and long ones around the shape. A first
phase sees mostly short windows, which are cheap, a second one mostly long ones, for the later frames; a third trains
the decoder alone.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.distill.trainer import Loss, step_generator
from tmd_ref.scenes import BACKGROUNDS, COLORS, coverage, sample_scene, tracks
from tmd_ref.vae import WanVAE

SHAPE_WEIGHT = 4.0
KL_WEIGHT = 1e-4
NOISE = 0.2  # in units of each latent channel's deviation
CELL = 8  # pixels per latent
# (clips, frames, pixels) of the windows, in turn. Never one clip alone: batch 1 trains three times slower.
SHORT_WINDOWS = ((4, 5, 32), (4, 5, 32), (2, 5, 64), (4, 5, 32), (4, 5, 32), (2, 17, 32))
LONG_WINDOWS = ((2, 17, 32), (4, 5, 32), (2, 17, 32), (2, 9, 64))


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 `[B,F,H,W,3]` -> float32 `[B,3,F,H,W]` in -1..1."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1).contiguous()


def to_frames(video: Tensor) -> np.ndarray:
    """float `[B,3,F,H,W]` in -1..1 -> uint8 `[B,F,H,W,3]`, rounded to nearest."""
    return (video.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def render_crops(seed: int, step: int, count: int, frames: int, crop: int, size: tuple[int, int]) -> np.ndarray:
    """`count` random windows of `frames` frames and `crop` x `crop` pixels, near the shape; uint8 `[B,F,h,w,3]`."""
    rng = np.random.default_rng([seed, step])
    clips = []
    for _ in range(count):
        scene = sample_scene(rng)
        start = rng.integers(0, 17 - frames + 1)
        radius, x, y, angle = (track[start : start + frames] for track in tracks(scene, 17, size))
        middle = frames // 2
        # on the grid of the latents, as in a whole picture
        left, top = (CELL * round(np.clip(v[middle] - crop / 2 + rng.uniform(-crop / 2, crop / 2), 0, size[0] - crop)
                                  / CELL) for v in (x, y))  # fmt: skip
        cover = coverage(scene.shape, radius, x - left, y - top, angle, (crop, crop))[..., None]
        back, front = np.array(BACKGROUNDS[scene.background], np.float32), np.array(COLORS[scene.color], np.float32)
        clips.append(np.rint(back + (front - back) * cover).astype(np.uint8))
    return np.stack(clips)


def init_vae(vae: WanVAE, log_variance: float = -6.0) -> None:
    """Initial weights from which a narrow VAE learns at once.

    Kaiming weights, where torch's default loses the signal over forty layers; large first biases, because an RMS norm
    forgets how bright a flat picture is unless a bias gives it something to compare with; and little noise in the
    latents, where the usual variance of 1 takes hundreds of steps to fight.
    """
    weights = dict(vae.named_parameters())
    for name, weight in weights.items():
        if name.endswith(".weight"):
            nn.init.kaiming_normal_(weight)
        elif name.endswith(".bias"):
            nn.init.zeros_(weight)
    for part in ("encoder", "decoder"):
        nn.init.uniform_(weights[f"{part}.conv1.bias"], -1, 1)
    nn.init.constant_(weights["conv1.bias"][vae.config.z_dim :], log_variance)


def vae_loss(
    vae: WanVAE, seed: int, windows: tuple[tuple[int, int, int], ...], size: tuple[int, int] = (64, 64)
) -> Loss:
    """The loss of one step on one of `windows`, in turn."""

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_video(render_crops(seed, step, *windows[step % len(windows)], size))
        mean, log_variance = vae.posterior(video)
        log_variance = log_variance.clamp(-20, 5)
        noise = torch.randn(mean.shape, generator=step_generator(seed, step))
        deviation = (log_variance.exp() + _added_noise(mean).square()).sqrt()
        decoded = vae.decoder(vae.conv2(mean + deviation * noise))
        l1, scalars = reconstruction(decoded, video)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return l1 + KL_WEIGHT * kl, {**scalars, "kl": kl}

    return loss


def decoder_loss(
    vae: WanVAE, seed: int, windows: tuple[tuple[int, int, int], ...], size: tuple[int, int] = (64, 64)
) -> Loss:
    """As `vae_loss` with the encoder fixed: the latent space stays, so a transformer may already train on it.

    The latents get a little noise, because those of a sampler are never quite those of the encoder.
    """

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_video(render_crops(seed, step, *windows[step % len(windows)], size))
        with torch.no_grad():
            mean, _ = vae.posterior(video)
            noise = torch.randn(mean.shape, generator=step_generator(seed, step))
        decoded = vae.decoder(vae.conv2(mean + _added_noise(mean) * noise))
        return reconstruction(decoded, video)

    return loss


def _added_noise(mean: Tensor) -> Tensor:
    """Deviation of the noise that a decoder must bear, per channel of latents `[B,C,T,h,w]`: a sampler's latents are
    never quite those of the encoder."""
    return NOISE * mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)


def reconstruction(decoded: Tensor, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted L1 of `[B,3,F,H,W]`, and it and the mean squared error by name.

    Every picture here is mostly background: pixels of the shape and around it (or its corners would cost less than what
    fills the corners' gaps) weigh more, and pale shapes as much as bright ones.
    """
    median = video.flatten(2).median(dim=2).values[:, :, None, None, None]
    difference = (video - median).abs()
    contrast = difference.mean(dim=1, keepdim=True).amax(dim=(2, 3, 4), keepdim=True).clamp_min(0.2)
    shape = (difference.amax(dim=1, keepdim=True) > 0.05).float()
    near = F.max_pool3d(shape, (1, 7, 7), 1, (0, 3, 3))
    l1 = ((decoded - video).abs() * (1 + SHAPE_WEIGHT * near) / contrast).mean()
    return l1, {"l1": l1, "mse": (decoded - video).square().mean()}
