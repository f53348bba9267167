"""The sampling loop over two functions that compute backbone and flow head: what a run does, to calibrate on.

What it is not: the loop of a run, which is in the runtime. Where they differ: noise comes from numpy, and UniPC, whose
coefficients do not reach the network, is run as Euler on the same times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tmd_ref.samplers import shift_grid, wan_sigmas, wan_time

JUMPS = (1, 4, 16)
"""Numbers of steps of a Transition Model's samplings: its steps may have any length, and these have very different
ones."""

Arrays = dict[str, np.ndarray]
Graph = Callable[[Mapping[str, np.ndarray]], Arrays]


def rollout(
    backbone: Graph,
    flow_head: Graph,
    sampler: Mapping[str, Any],
    rng: np.random.Generator,
    noise: np.ndarray,
    prompt_embeds: np.ndarray,
    negative_embeds: np.ndarray,
    rope: Mapping[str, np.ndarray],
    steps: int,
    inner_steps: int = 1,
) -> np.ndarray:
    """Latents `[B, C, T, H, W]` from `noise` of that shape, as the manifest's `sampler` says, in `steps` steps.

    prompt_embeds and negative_embeds `[B, S, E]`, or class numbers `[B]`; `rope` holds rope_cos and rope_sin.
    """
    if "inner_steps" in sampler:
        return _transitions(backbone, flow_head, sampler, rng, noise, prompt_embeds, rope, steps, inner_steps)
    if sampler["rule"] == "flow_map":
        return _jumps(backbone, flow_head, sampler, noise, prompt_embeds, negative_embeds, rope, steps)

    def velocity(x: np.ndarray, time: np.ndarray, embeds: np.ndarray) -> np.ndarray:
        found = backbone({"x": x, "t": time, "prompt_embeds": embeds, **rope})
        return flow_head({"x": x, "t": time, **found, **rope})["velocity"]

    guidance = sampler["guidance"]
    x: np.ndarray = np.float32(sampler.get("init_scale", 1.0)) * noise
    for t, then in itertools.pairwise(_times(sampler, steps)):
        time = np.full(len(x), _told(t, sampler["time_rounding"]), np.float32)
        v = velocity(x, time, prompt_embeds)
        if guidance != 1:
            negative = velocity(x, time, negative_embeds)
            v = negative + np.float32(guidance) * (v - negative)
        if sampler["rule"] == "renoise" and then > 0:
            x = np.float32(1 - then) * (x - np.float32(t) * v) + np.float32(then) * _normal(rng, x.shape)
        else:
            x = x + np.float32(then - t) * v
    return x


def step_counts(sampler: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Every (steps, inner steps) that the model is made for; of a model for any number its default, and of one whose
    steps may have any length a few, from the shortest run to a long one."""
    if "inner_steps" in sampler:
        return list(itertools.product(sampler["allowed_steps"], sampler["allowed_inner_steps"]))
    if sampler["rule"] == "flow_map":
        return [(steps, 1) for steps in sorted({*JUMPS, sampler["steps"]})]
    return [(steps, 1) for steps in sampler.get("allowed_steps") or [sampler["steps"]]]


def _transitions(
    backbone: Graph,
    flow_head: Graph,
    sampler: Mapping[str, Any],
    rng: np.random.Generator,
    x: np.ndarray,
    prompt_embeds: np.ndarray,
    rope: Mapping[str, np.ndarray],
    steps: int,
    inner_steps: int,
) -> np.ndarray:
    t = shift_grid(steps, sampler["shift"], sampler["t_max"])
    s = shift_grid(inner_steps, sampler["inner_shift"], sampler["t_max"])
    for i in range(steps, 0, -1):
        found = backbone({"x": x, "t": _filled(x, t[i]), "prompt_embeds": prompt_embeds, **rope})
        y = noise = _normal(rng, x.shape)
        for j in range(inner_steps, 0, -1):
            inputs = {"y": y, "noise": noise, "s": _filled(x, s[j]), "r": _filled(x, s[j - 1])}
            y = flow_head({**inputs, **found, **rope})["y_next"]
        x = x - np.float32(t[i] - t[i - 1]) * y
    return x


def _jumps(
    backbone: Graph,
    flow_head: Graph,
    sampler: Mapping[str, Any],
    x: np.ndarray,
    condition: np.ndarray,
    null: np.ndarray,
    rope: Mapping[str, np.ndarray],
    steps: int,
) -> np.ndarray:
    """Equal jumps through 1..0, and from each time between also the one to 0, which ends a run with a deadline."""
    low, high = sampler.get("guidance_interval") or (0.0, 1.0)
    g, asked = sampler["guidance"], "labels" if condition.ndim == 1 else "prompt_embeds"
    contexts = [backbone({asked: given})["context"] for given in (condition, *([] if g == 1 else [null]))]
    both = [np.concatenate(contexts[:rows], 0 if asked == "labels" else 1) for rows in (1, 2)]

    def average_velocity(x: np.ndarray, t: float, r: float) -> np.ndarray:
        guided = g != 1 and low < t < high
        mix = np.kron([[g, 1 - g], [g, 1 - g]] if guided else [[1]], np.eye(len(x)))
        rows = np.concatenate((x, x)) if guided else x
        given = {"x": rows, "t": _filled(rows, t), "r": _filled(rows, r), "context": both[guided], **rope}
        # x - F, as if the step had length 1: a short one would hide from comparisons what F loses.
        moved = flow_head({**given, "guidance": (mix / (t - r)).astype(np.float32)})["x_next"]
        return (rows - moved)[: len(x)]

    passed = []
    for t, r in itertools.pairwise(1 - k / steps for k in range(steps + 1)):
        passed.append((x, t))
        x = x - np.float32(t - r) * average_velocity(x, t, r)
    for between, t in passed[1:-1]:
        average_velocity(between, t, 0.0)
    return x


def _times(sampler: Mapping[str, Any], steps: int) -> list[float]:
    listed = sampler.get("times")
    return [*listed[:steps], 0.0] if listed else [float(t) for t in wan_sigmas(steps, sampler["shift"])]


def _told(t: float, rounding: str) -> float:
    """What the network is told of t."""
    if rounding == "integer":
        return wan_time(t)
    if rounding == "nearest":
        return math.floor(1000 * t + 0.5) / 1000
    return float(torch.tensor(1000 * t).bfloat16()) / 1000 if rounding == "bfloat16" else t


def _filled(x: np.ndarray, value: float) -> np.ndarray:
    return np.full(len(x), value, np.float32)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)
