"""Multi-scale structural similarity of pictures (Wang, Simoncelli, Bovik 2003), in numpy and scipy.

For pictures as small as the built-in model's: with fewer scales than five, the weights of those that remain are
enlarged to the same sum.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Table 1 of the paper's experiments
WINDOW, SIGMA = 11, 1.5
K1, K2, LEVELS = 0.01, 0.03, 255.0


def ms_ssim(first: np.ndarray, second: np.ndarray, scales: int = 5) -> float:
    """Mean over pictures of `[N, H, W, C]` in 0..255; 1 for equal ones.

    Raises ValueError if the smallest scale is smaller than the window.
    """
    smallest = min(first.shape[1:3]) >> (scales - 1)
    if first.shape != second.shape or smallest < WINDOW:
        raise ValueError(
            f"{first.shape} and {second.shape}: need equal shapes of at least {WINDOW << (scales - 1)} pixels"
        )
    weights = np.array(WEIGHTS[:scales]) * (sum(WEIGHTS) / sum(WEIGHTS[:scales]))
    x, y = (pictures.astype(np.float64) for pictures in (first, second))
    product = np.ones((len(x), x.shape[3]))  # of every channel by itself
    for scale, weight in enumerate(weights):
        similarity, contrast = _ssim(x, y)
        product *= np.maximum(similarity if scale == scales - 1 else contrast, 0) ** weight
        x, y = _halved(x), _halved(y)
    return float(product.mean())


def _ssim(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the whole index and of its contrast and structure, `[N, C]` each."""
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean((1, 2)), contrast.mean((1, 2))


def _blurred(x: np.ndarray) -> np.ndarray:
    """Gaussian window, only where it lies inside the picture."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel /= kernel.sum()
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    return correlate1d(correlate1d(x, kernel, axis=1), kernel, axis=2)[:, inside, inside]


def _halved(x: np.ndarray) -> np.ndarray:
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return x[:, :height, :width].reshape(len(x), height // 2, 2, width // 2, 2, -1).mean((2, 4))
