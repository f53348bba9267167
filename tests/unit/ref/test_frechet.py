"""The Fréchet distance against scipy and a closed form; that it orders known corruptions; diversity."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from tmd_ref.distill.frechet import DIM, clip_features, diversity, frechet_distance
from tmd_ref.scenes import render, sample_scene

COUNT = 96
FIXED = 40.35254  # sum of the features of the first four clips


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [np.stack([render(sample_scene(rng, held_out=True), 9) for _ in range(COUNT)]) for _ in range(2)]


@pytest.fixture(scope="module")
def reference(clips):
    return clip_features(clips[0])


def blurred(clips, width):
    video = torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float().flatten(0, 1)
    video = F.avg_pool2d(F.pad(video, [width // 2] * 4, mode="replicate"), width, 1)
    return video.unflatten(0, clips.shape[:2]).permute(0, 1, 3, 4, 2).round().to(torch.uint8).numpy()


def noisy(clips, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, clips.shape)
    return np.clip(clips + noise, 0, 255).astype(np.uint8)


def in_part(change):
    """The corruption of a share of the clips."""

    def corrupt(clips, share):
        out, count = clips.copy(), int(share * len(clips))
        out[:count] = change(out[:count])
        return out

    return corrupt


CORRUPTIONS = {
    "noise": (noisy, (10, 25, 60)),
    "blur": (blurred, (3, 7, 15)),
    "no motion": (in_part(lambda x: x[:, :1]), (0.3, 0.6, 1.0)),
    "red and blue exchanged": (in_part(lambda x: x[..., ::-1]), (0.3, 0.6, 1.0)),
    "frames in disorder": (in_part(lambda x: x[:, [4, 0, 8, 2, 6, 1, 7, 3, 5]]), (0.3, 0.6, 1.0)),
    "gray": (in_part(lambda x: x.mean(-1, keepdims=True).astype(np.uint8)), (0.3, 0.6, 1.0)),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stronger_corruption_is_farther_from_rendered_clips(name, clips, reference):
    corrupt, strengths = CORRUPTIONS[name]
    scale = reference.std(0)
    found = [
        frechet_distance(clip_features(corrupt(clips[1], strength)) / scale, reference / scale)
        for strength in strengths
    ]
    clean = frechet_distance(clip_features(clips[1]) / scale, reference / scale)
    assert clean < found[0] < found[1] < found[2], (clean, found)


def test_few_different_clips_are_farther_than_many(clips, reference):
    scale = reference.std(0)
    few = np.concatenate([clips[1][:6]] * (COUNT // 6))
    clean, found = (frechet_distance(clip_features(x) / scale, reference / scale) for x in (clips[1], few))
    assert found > 2 * clean


def test_the_distance_is_scipys_and_the_closed_form_for_diagonal_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (500, 8)), rng.normal(0.3, 2, (400, 8)) @ rng.normal(0, 1, (8, 8))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = scipy.linalg.sqrtm(cov_a @ cov_b).real
    gap = a.mean(0) - b.mean(0)
    assert frechet_distance(a, b) == pytest.approx(gap @ gap + np.trace(cov_a + cov_b - 2 * cross), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, 2 * a + 1) == pytest.approx(((a.mean(0) + 1) ** 2).sum() + np.trace(cov_a), rel=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(a[:1], b)


def test_features_are_fixed_and_diversity_counts_pairs(clips):
    features = clip_features(clips[0][:4])
    assert features.shape == (4, DIM) and np.array_equal(features, clip_features(clips[0][:4], batch=3)[:4])
    assert features.sum() == pytest.approx(FIXED, rel=1e-4), "another network would make published values incomparable"
    pairs = np.array([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert diversity(pairs, np.ones(2)) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="at least 3 frames"):
        clip_features(clips[0][:, :2])
