"""ComfyUI's values and ours. Its latents are a VAE's own, ours have mean 0 and deviation 1; its images are 0..1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tmd_engines import Manifest

Conditioning = list[tuple[torch.Tensor, dict[str, Any]]]
Latent = dict[str, Any]
_OURS = "tmd"


class _Exact(NamedTuple):
    """Latents as a run left them, beside the samples that were made of them, so that no bit is lost on their way."""

    latents: NDArray[np.float32]
    samples: torch.Tensor


def latent_of(latents: NDArray[np.float32], manifest: Manifest) -> Latent:
    """ComfyUI's LATENT of our latents `[1, C, T, h, w]`: what its own VAE of the same model decodes."""
    mean, deviation = _statistics(manifest)
    samples = torch.from_numpy(latents * deviation + mean)
    return {"samples": samples, _OURS: _Exact(latents, samples)}


def latents_of(latent: Latent, manifest: Manifest) -> NDArray[np.float32]:
    """Our latents of a LATENT. The samples of a still may be `[1, C, h, w]`, as ComfyUI has them for pictures."""
    samples, exact = latent["samples"], latent.get(_OURS)
    if isinstance(exact, _Exact) and exact.samples is samples:
        return exact.latents
    if samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if samples.ndim != 5 or samples.shape[0] != 1 or samples.shape[1] != manifest.latents.channels:
        raise ValueError(
            f"these latents are {list(latent['samples'].shape)}, and this bundle takes one video of "
            f"[1, {manifest.latents.channels}, frames, height, width]: connect latents of the same kind of model."
        )
    mean, deviation = _statistics(manifest)
    found: NDArray[np.float32] = (samples.detach().cpu().float().numpy() - mean) / deviation
    return found


def _statistics(manifest: Manifest) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean, deviation = (
        np.asarray(values, np.float32).reshape(1, -1, 1, 1, 1)
        for values in (manifest.latents.mean, manifest.latents.std)
    )
    return mean, deviation


def conditioning_of(embeds: NDArray[np.float32]) -> Conditioning:
    """ComfyUI's CONDITIONING of a prompt's embeddings `[1, text, E]`."""
    return [(torch.from_numpy(np.array(embeds)), {})]


def embeds_of(conditioning: Conditioning, name: str) -> NDArray[np.float32]:
    """The embeddings in a CONDITIONING, which must be one prompt's."""
    if len(conditioning) != 1:
        raise ValueError(f"{name} holds {len(conditioning)} prompts: these models take one, so connect one directly.")
    found: NDArray[np.float32] = conditioning[0][0].detach().cpu().float().numpy()
    return found


def image_of(frames: NDArray[np.uint8]) -> torch.Tensor:
    """ComfyUI's IMAGE, float32 `[F, H, W, 3]` in 0..1, of frames uint8 `[F, H, W, 3]`."""
    return torch.from_numpy(frames.astype(np.float32) / 255)


def picture_of(image: torch.Tensor) -> NDArray[np.uint8]:
    """The first picture of an IMAGE, uint8 `[H, W, 3]`."""
    found: NDArray[np.uint8] = image[0, :, :, :3].clamp(0, 1).mul(255).round().byte().cpu().numpy()
    return found
