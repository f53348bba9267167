"""The picture measure of docs/precision.md against pytorch-msssim 1.0.0, whose results on these arrays stand here."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ms_ssim import ms_ssim


def pictures(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Two of 176 x 192: smooth, and the same with noise."""
    rng = np.random.default_rng(0)
    smooth = np.clip(128 + np.cumsum(rng.normal(0, 12, (2, 176, 192, 3)), 1), 0, 255).round()
    return smooth, np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).round()


@pytest.mark.parametrize(("scales", "expected"), [(5, 0.9480513751127161), (3, 0.9301377857252003)])
def test_ms_ssim_is_that_of_pytorch_msssim(scales: int, expected: float) -> None:
    assert ms_ssim(*pictures(40), scales) == pytest.approx(expected, abs=1e-6)


def test_ms_ssim_of_equal_pictures_is_one_and_small_ones_are_refused() -> None:
    one, _ = pictures(0)
    assert ms_ssim(one, one) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="at least 176 pixels"):
        ms_ssim(one[:, :100], one[:, :100])
