"""Reads a clip back: colour, shape, motion and background, measured from pixels by geometry.

The judge of models trained on `tmd_ref.scenes`. It knows the palette and the shapes, nothing of the models: background
from the border, colour from the pixels that differ most from it, motion from the tracks of centre, area and angle,
shape by drawing every candidate at the measured place and size and taking the one that overlaps best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tmd_ref.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, area, coverage

ATTRIBUTES = ("shape", "color", "background", "motion")
_FOLDS = {"triangle": 3, "square": 4, "star": 5}
_MIN_AREA = 12.0  # square pixels: less is no object but noise


@dataclass(frozen=True)
class Reading:
    """What a clip shows; None where nothing could be measured. `overlap` (0..1) is the fit of the drawn shape."""

    shape: str | None
    color: str | None
    background: str
    motion: str | None
    overlap: float = 0.0

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Which attributes are as the scene says."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


def read_clip(frames: np.ndarray) -> Reading:
    """Measure a clip. frames uint8 `[F,H,W,3]`, RGB. Raises ValueError for another shape or fewer than 3 frames."""
    if frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 3:
        raise ValueError(f"frames are {frames.shape}: the oracle reads [F,H,W,3] with at least 3 frames")
    video = frames.astype(np.float32)
    border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1).reshape(-1, 3)
    back = np.median(border, axis=0)
    background = _nearest(back, BACKGROUNDS)

    offset = video - back
    difference = np.linalg.norm(offset, axis=-1)
    strong = np.quantile(difference, 0.995)
    if strong < 40:
        return Reading(None, None, background, None)
    core = video[difference > 0.75 * strong]
    color_value = np.median(core, axis=0)
    color = _nearest(color_value, COLORS)
    direction = color_value - back
    alpha = np.clip(offset @ direction / (direction @ direction), 0, 1)
    alpha[alpha < 0.2] = 0  # ringing and compression around the object

    areas = alpha.sum(axis=(1, 2))
    if np.median(areas) < _MIN_AREA or areas.min() <= 1:
        return Reading(None, color, background, None)
    x, y = _centres(alpha)
    shape, overlap = _shape(alpha, x, y, areas)
    return Reading(shape, color, background, _motion(alpha, x, y, areas, shape), overlap)


def _nearest(value: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.sum((value - np.array(palette[name])) ** 2)))


def _centres(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre of mass of each frame in pixels, x and y `[F]`."""
    total = alpha.sum(axis=(1, 2))
    rows, columns = (np.arange(n) + 0.5 for n in alpha.shape[1:])
    return (alpha.sum(axis=1) @ columns) / total, (alpha.sum(axis=2) @ rows) / total


def _phase(alpha: np.ndarray, x: np.ndarray, y: np.ndarray, fold: int) -> np.ndarray:
    """Orientation of an object of n-fold symmetry in each frame, radians modulo 2 pi / n, `[F]`.

    The angle of the n-th circular harmonic of the mass around the centre, the outside weighted by its distance.
    """
    rows, columns = (np.arange(n) + 0.5 for n in alpha.shape[1:])
    dx = columns[None, None, :] - x[:, None, None]
    dy = rows[None, :, None] - y[:, None, None]
    harmonic = (alpha * np.hypot(dx, dy) ** 2 * np.exp(1j * fold * np.arctan2(dy, dx))).sum(axis=(1, 2))
    return np.angle(harmonic) / fold


def _shape(alpha: np.ndarray, x: np.ndarray, y: np.ndarray, areas: np.ndarray) -> tuple[str, float]:
    """The shape whose drawing overlaps best, over the largest frames, upright or turned as measured."""
    chosen = np.argsort(areas)[-5:]
    alpha, x, y, areas = alpha[chosen], x[chosen], y[chosen], areas[chosen]
    scores = {}
    for shape in SHAPES:
        radius = np.sqrt(areas / area(shape))
        angles = [np.zeros(len(chosen))]
        if shape in _FOLDS:
            # a tip of the drawing points up (a square's between its tips) at angle 0
            upright = -np.pi / 2 + (np.pi / 4 if shape == "square" else 0.0)
            angles.append(_phase(alpha, x, y, _FOLDS[shape]) - upright)
        overlaps = []
        for angle in angles:
            drawn = coverage(shape, radius, x, y, angle, alpha.shape[1:])
            joint = np.minimum(drawn, alpha).sum(axis=(1, 2))
            overlaps.append(joint / np.maximum(drawn, alpha).sum(axis=(1, 2)))
        scores[shape] = float(np.maximum.reduce(overlaps).mean())
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


def _motion(alpha: np.ndarray, x: np.ndarray, y: np.ndarray, areas: np.ndarray, shape: str) -> str | None:
    """The motion of the track; thresholds are about half of the slowest motion rendered, in picture heights."""
    height = alpha.shape[1]
    ends = max(1, len(x) // 6)

    def change(track: np.ndarray) -> float:
        return float(track[-ends:].mean() - track[:ends].mean())

    growth = np.log(areas[-ends:].mean() / areas[:ends].mean())
    dx, dy = change(x), change(y)
    moved = max(abs(dx), abs(dy)) / height
    if abs(growth) > 0.6 and moved < 0.15:
        return "growing" if growth > 0 else "shrinking"
    if moved > 0.08:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    if np.ptp(y) / height > 0.15:
        return "bouncing"
    if shape in _FOLDS:
        fold = _FOLDS[shape]
        turned = np.unwrap(_phase(alpha, x, y, fold) * fold) / fold
        if abs(turned[-1] - turned[0]) > np.pi / 4:
            return "spinning"
    return None
