"""A Fréchet distance between sets of clips, and their diversity, in a fixed feature space that needs no download.

Features: a small 3-D convolutional network with random weights from a fixed seed, on colours and differences of
neighbouring frames; of every channel the mean over the clip and how much its spatial mean changes in time. It is no
substitute for a network trained on videos: it orders noise, blur, wrong colours and wrong motion of the rendered scenes
by their strength (`tests/unit/ref/test_frechet.py`), and says nothing about what people like. Values are comparable
only with the same number of clips.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 20260114
WIDTHS = (6, 24, 32, 32)
DIM = 2 * WIDTHS[-1]


def _network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(SEED)
    layers: list[nn.Module] = []
    for before, after, stride in zip(WIDTHS[:-1], WIDTHS[1:], ((1, 2, 2), (1, 2, 2), (2, 2, 2)), strict=True):
        conv = nn.Conv3d(before, after, (3, 5, 5), stride, padding=(1, 2, 2), padding_mode="replicate")
        with torch.no_grad():
            conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * (2 / conv.weight[0].numel()) ** 0.5)
            conv.bias.copy_(0.1 * torch.randn(after, generator=generator))  # type: ignore[union-attr]
        layers += [conv, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


@torch.no_grad()
def clip_features(clips: np.ndarray, batch: int = 16) -> np.ndarray:
    """uint8 `[B,F,H,W,3]` to float64 `[B, DIM]`. Raises ValueError for another shape."""
    if clips.ndim != 5 or clips.shape[4] != 3 or clips.shape[1] < 3:
        raise ValueError(f"clips are {clips.shape}: need [B,F,H,W,3] with at least 3 frames.")
    network, features = _network(), []
    for start in range(0, len(clips), batch):
        video = torch.from_numpy(clips[start : start + batch]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        change = F.pad(video.diff(dim=2), (0, 0, 0, 0, 1, 0))
        h = network(torch.cat([video, 2 * change], dim=1))
        in_time = h.mean(dim=(3, 4))
        features.append(torch.cat([in_time.mean(2), in_time.std(2)], dim=1))
    return torch.cat(features).double().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2·(Σ_a Σ_b)^½) of features `[n, d]`, in float64.

    The trace of the root is the sum of the roots of the eigenvalues of Σ_a^½ Σ_b Σ_a^½. Raises ValueError if either set
    has fewer than 2 clips.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} clips: a covariance needs at least 2.")
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def diversity(features: np.ndarray, scale: np.ndarray) -> float:
    """Mean distance between clips of the same caption, features `[captions, clips, d]` in units of `scale` `[d]`."""
    x = Tensor(features / scale)
    pairs = torch.cdist(x, x).sum(dim=(1, 2)) / (x.shape[1] * (x.shape[1] - 1))
    return float(pairs.mean())
