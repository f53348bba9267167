"""Clips rendered from a description: the data of the built-in model.

A `Scene` says what is seen (shape, colour, background, motion, size, speed) and where; `tmd_ref.captions` says it in
words and `render` draws it, anti-aliased, from signed distances. Everything is a pure function of its arguments, so a
dataset is a seed and a count. This is a data source for a model that can be trained on two CPU cores and judged by
geometry; it is not a benchmark of video quality.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 50),
    "magenta": (220, 60, 210),
    "cyan": (60, 215, 225),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
}
BACKGROUNDS = {"black": (8, 8, 8), "gray": (110, 110, 110), "navy": (15, 20, 75)}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("left", "right", "up", "down", "growing", "shrinking", "spinning", "bouncing")
SIZES = {"small": 0.16, "medium": 0.185, "large": 0.21}  # radius / picture height; plain captions leave "medium" out
SPEEDS = {"slow": 0.6, "normal": 1.0, "fast": 1.5}  # and "normal"

# what is hard to learn, and how much oftener than others it is trained on
_OFTENER = (({"spinning"}, 5.0), ({"star"}, 1.5), ({"green", "gray"}, 3.0))

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# A shape as (fold symmetry n, tip radius, inner vertex radius) in units of the scene's radius. One edge, from the tip
# at angle 0 to the inner vertex at angle pi/n, gives the whole outline by symmetry. For a convex polygon the inner
# vertex is the middle of an edge. The radii give all four shapes a similar area.
_OUTLINES = {
    "square": (4, 1.25, 1.25 * np.cos(np.pi / 4)),
    "triangle": (3, 1.45, 1.45 * np.cos(np.pi / 3)),
    "star": (5, 1.5, 0.62),
}


@dataclass(frozen=True)
class Scene:
    """What a clip shows. `x`, `y`: middle of the path, in units of the picture's width and height."""

    shape: str
    color: str
    background: str
    motion: str
    size: str = "medium"
    speed: str = "normal"
    x: float = 0.5
    y: float = 0.5

    @property
    def combination(self) -> tuple[str, str, str, str]:
        """The attributes that decide whether a scene is held out for testing."""
        return self.shape, self.color, self.background, self.motion


@functools.cache
def combinations(held_out: bool) -> list[tuple[str, str, str, str]]:
    """All (shape, color, background, motion) of the training set, or of the one in eight held out for testing.

    Each value of each attribute occurs on both sides. A spinning circle looks like a still one and is left out.
    """
    chosen = []
    for shape, color, background, motion in product(SHAPES, COLORS, BACKGROUNDS, MOTIONS):
        if (shape, motion) == ("circle", "spinning"):
            continue
        index = SHAPES.index(shape) + list(COLORS).index(color) + 3 * list(BACKGROUNDS).index(background)
        if ((index + MOTIONS.index(motion)) % 8 == 0) == held_out:
            chosen.append((shape, color, background, motion))
    return chosen


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene: a combination of `combinations(held_out)`, the place one of nine around the middle.

    Held-out combinations come equally often; of those of training, the ones that are hard to learn come oftener.

    The places lie an eighth of the picture apart. At 64 x 64 that is one latent cell: a VAE sees the same shape in the
    same place within its cells, which is much less to learn than any place.
    """
    options = combinations(held_out)
    chance = None if held_out else _chances()
    shape, color, background, motion = options[rng.choice(len(options), p=chance)]
    size = str(rng.choice(list(SIZES)))
    speed = str(rng.choice(list(SPEEDS)))
    x, y = 0.5 + rng.integers(-1, 2, size=2) / 8
    return Scene(shape, color, background, motion, size, speed, float(x), float(y))


@functools.cache
def _chances() -> np.ndarray:
    """How often each of `combinations(held_out=False)` is trained on."""
    weights = [prod(n for hard, n in _OFTENER if hard <= {*attributes}) for attributes in combinations(held_out=False)]
    return np.array(weights) / sum(weights)


def coverage(shape: str, radius: np.ndarray, x: np.ndarray, y: np.ndarray, angle: np.ndarray, size: tuple[int, int]):
    """How much of each pixel the shape covers.

    `radius`, `x`, `y` in pixels and `angle` in radians, one value per frame `[F]`; `size` = (height, width).
    Returns float32 `[F, H, W]` in 0..1: the signed distance to the outline, clamped to one pixel.
    """
    height, width = size
    px = (np.arange(width) + 0.5)[None, None, :] - x[:, None, None]
    py = (np.arange(height) + 0.5)[None, :, None] - y[:, None, None]
    radius = radius[:, None, None]
    distance = np.hypot(px, py)
    if shape == "circle":
        return np.clip(radius - distance + 0.5, 0, 1).astype(np.float32)
    fold, tip, inner = _OUTLINES[shape]
    half = np.pi / fold
    # angle from the nearest tip, 0..half; a tip points up at angle 0 (a square stands on an edge)
    upright = -np.pi / 2 + (half if shape == "square" else 0.0)
    theta = np.arctan2(py, px) - upright - angle[:, None, None]
    theta = np.abs((theta + half) % (2 * half) - half)
    # signed distance to the line through (tip, 0) and inner*(cos half, sin half), positive outside
    edge = np.array([inner * np.cos(half) - tip, inner * np.sin(half)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    outside = distance * (np.cos(theta) * normal[0] + np.sin(theta) * normal[1]) - radius * tip * normal[0]
    return np.clip(0.5 - outside, 0, 1).astype(np.float32)


def area(shape: str) -> float:
    """Area of a shape of radius 1, in square units."""
    if shape == "circle":
        return float(np.pi)
    fold, tip, inner = _OUTLINES[shape]
    return float(fold * tip * inner * np.sin(np.pi / fold))


def tracks(scene: Scene, frames: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Radius, x, y (pixels) and angle (radians) of the shape in each frame, float64 `[frames]` each."""
    height, width = size
    time = np.linspace(-0.5, 0.5, frames)
    speed = SPEEDS[scene.speed]
    radius = np.full(frames, SIZES[scene.size] * height)
    x = np.full(frames, scene.x * width)
    y = np.full(frames, scene.y * height)
    angle = np.zeros(frames)
    if scene.motion in _STEPS:
        dx, dy = _STEPS[scene.motion]
        x, y = x + 0.22 * speed * width * dx * time, y + 0.22 * speed * height * dy * time
    elif scene.motion in ("growing", "shrinking"):
        sign = 1 if scene.motion == "growing" else -1
        radius = radius * np.exp(sign * time * (0.55 + 0.35 * speed))
    elif scene.motion == "spinning":
        angle = (time + 0.5) * speed * 0.6 * np.pi
    elif scene.motion == "bouncing":
        # one bounce when slow, two when fast: down from the top, up from the floor, back where it began
        bounces = 2 if scene.speed == "fast" else 1
        y = y + 0.3 * height * (np.abs(((time + 0.5) * bounces) % 1.0 * -2 + 1) * -1 + 0.5)
    return radius, x, y, angle


def render(scene: Scene, frames: int = 17, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Draw a scene. `size` = (height, width) in pixels. Returns uint8 `[frames, H, W, 3]`, RGB."""
    cover = coverage(scene.shape, *tracks(scene, frames, size), size)[..., None]
    back = np.array(BACKGROUNDS[scene.background], np.float32)
    front = np.array(COLORS[scene.color], np.float32)
    return np.rint(back + (front - back) * cover).astype(np.uint8)
