"""The few numbers that drive the loops: time grids and RoPE tables.

The same formulas stand in the PyTorch reference (`tmd_ref`), which is the oracle of the tests; the runtime may not
import torch.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ROPE_BASE = 10000.0
# Wan's table has this many positions per axis; no model has seen more.
ROPE_POSITIONS = 1024


def shift_grid(steps: int, shift: float, t_max: float = 0.999) -> NDArray[np.float64]:
    """Time grid of a few-step sampler, data to noise: 0 = t_0 < ... < t_steps = t_max.

    Equispaced times k/steps warped by t = shift·t' / ((shift − 1)·t' + 1)  (TMD §3.2; Esser et al. 2024), the last
    one held at `t_max` because Wan was trained up to 0.999 and not 1 (TMD, A.2).

    Returns float64 `[steps + 1]`, dimensionless. Raises ValueError if steps < 1, shift < 1, t_max is not in (0, 1], or
    so many steps do not fit below t_max.
    """
    if steps < 1:
        raise ValueError(f"a time grid needs at least one step, not {steps}")
    if shift < 1 or not 0 < t_max <= 1:
        raise ValueError(f"a time grid needs a shift of at least 1 and t_max in (0, 1], not {shift} and {t_max}")
    t = np.arange(steps + 1) / steps
    grid: NDArray[np.float64] = shift * t / ((shift - 1) * t + 1)
    grid[-1] = t_max
    if grid[-2] >= t_max:
        raise ValueError(
            f"{steps} steps with shift {shift} reach {grid[-2]:.6f}, beyond t_max {t_max}: use fewer steps"
        )
    return grid


def wan_grid(steps: int, shift: float) -> NDArray[np.float64]:
    """Wan2.1's own grid, noise to data: `steps` equispaced times from 0.999 (0 left out), warped as above, then 0.

    Returns float64 `[steps + 1]`, descending, dimensionless. Raises ValueError if steps < 1 or shift < 1.
    """
    if steps < 1 or shift < 1:
        raise ValueError(f"a time grid needs at least one step and a shift of at least 1, not {steps} and {shift}")
    t = np.linspace(0.999, 0.0, steps + 1)[:-1]
    return np.append(shift * t / ((shift - 1) * t + 1), 0.0)


def unipc_grid(steps: int, shift: float) -> NDArray[np.float64]:
    """The grid of diffusers' UniPCMultistepScheduler with flow sigmas, noise to data, which ends in 0.

    `steps` equispaced times from 1 towards 0.001, that left out, warped as above and rounded to float32; the first is
    1 - 1e-6, where the solver's logarithm is finite (diffusers 0.42, scheduling_unipc_multistep.py, `set_timesteps`).

    Returns float64 `[steps + 1]`, descending, dimensionless. Raises ValueError if steps < 1 or shift < 1.
    """
    return _warped_grid(steps, shift, (0.001 - 1.0) / max(steps, 1), first=1.0 - 1e-6)


def euler_grid(steps: int, shift: float) -> NDArray[np.float64]:
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler, noise to data, which ends in 0.

    `steps` equispaced times from 1 to the warped 0.001, both counted, warped again and rounded to float32 (diffusers
    0.42, scheduling_flow_match_euler_discrete.py, `set_timesteps`: the end of its table is warped when it is made).

    Returns float64 `[steps + 1]`, descending, dimensionless. Raises ValueError if steps < 1 or shift < 1.
    """
    last = shift * 0.001 / ((shift - 1) * 0.001 + 1)
    return _warped_grid(steps, shift, (last - 1.0) / max(steps - 1, 1), first=1.0)


def _warped_grid(steps: int, shift: float, step: float, first: float) -> NDArray[np.float64]:
    """`steps` times from 1 in distances of `step`, warped; the first one is `first`, and 0 follows."""
    if steps < 1 or shift < 1:
        raise ValueError(f"a time grid needs at least one step and a shift of at least 1, not {steps} and {shift}")
    warped = [shift * t / ((shift - 1) * t + 1) for t in (1.0 + k * step for k in range(1, steps))]
    return np.array([first, *warped, 0.0], np.float32).astype(np.float64)


GRIDS = {"diffusers-unipc": unipc_grid, "diffusers-euler": euler_grid}
"""`sampler.grid` of a manifest, where it is not Wan's own -> (steps, shift) -> times, noise to data."""


def told_time(t: float, rounding: str) -> float:
    """The time that the network is told at time t: 1000·t as it is ("none"), cut off to an integer ("integer"), rounded
    to one ("nearest") or to bfloat16 ("bfloat16", nearest, ties to even), divided by 1000 again. Dimensionless."""
    if rounding == "integer":
        return math.floor(1000 * t) / 1000
    if rounding == "nearest":
        return math.floor(1000 * t + 0.5) / 1000
    if rounding == "bfloat16":
        bits = np.float32(1000 * t).view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return float(bits.view(np.float32)) / 1000
    return t


def warp(t: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """shift·t / (1 + (shift - 1)·t): times in 0..1, moved towards noise. 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def flow_map_grid(steps: int, shift: float) -> NDArray[np.float64]:
    """AnyFlow's grid, noise to data: 1 to 0 in `steps` equal steps, warped (diffusers 0.42,
    scheduling_flow_map_euler_discrete.py, `set_timesteps`). Returns float64 `[steps + 1]`, descending."""
    return warp(uniform_times(steps), shift)


def uniform_times(steps: int) -> NDArray[np.float64]:
    """TiM's grid, noise to data: 1 to 0 in `steps` equal steps. Returns float64 `[steps + 1]`, descending."""
    return 1 - np.arange(steps + 1) / steps


def tim_rope_tables(
    grid_h: int, grid_w: int, head_dim: int, rope: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tables of TiM's two-axis rotary embedding, for tokens row by row: half of a head per position.

    Token k has the positions (k mod grid_h, k div grid_h) for `rope` "index", as the released weights were trained, and
    (column, row) for "grid"; on a square that is the same. Computed in float64.

    Returns (cos, sin), each float32 `[grid_h·grid_w, head_dim/2]`. Raises ValueError for a grid beyond TiM's 1024
    positions, or if head_dim is not a multiple of 4.
    """
    if head_dim % 4 or min(grid_h, grid_w) < 1 or max(grid_h, grid_w) > ROPE_POSITIONS:
        raise ValueError(f"a token grid of {grid_h}x{grid_w} with heads of {head_dim} has no rotary table")
    token, side, half = np.arange(grid_h * grid_w), grid_h if rope == "index" else grid_w, head_dim // 2
    frequencies = ROPE_BASE ** (-2.0 * np.arange(half // 2) / half)
    angles = np.concatenate([np.multiply.outer(position, frequencies) for position in (token % side, token // side)], 1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope_tables(
    grid_t: int, grid_h: int, grid_w: int, head_dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine tables of Wan's three-axis rotary embedding, for tokens in the order t, h, w (w fastest).

    `grid_*` count latent patches. The head_dim/2 rotation pairs are divided among the axes (22, 21, 21 of 64 for
    Wan); each axis has its own complete ladder of angles position·10000^(−2i/dim_axis). Computed in float64: float32
    angles near 1000 rad would lose 4 digits.

    Returns (cos, sin), each float32 `[grid_t·grid_h·grid_w, head_dim/2]`. Raises ValueError if the grid is empty or
    longer than the 1024 positions of Wan's table, or head_dim is odd.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, not {head_dim}")
    if min(grid_t, grid_h, grid_w) < 1 or max(grid_t, grid_h, grid_w) > ROPE_POSITIONS:
        raise ValueError(
            f"a token grid of {grid_t}x{grid_h}x{grid_w} has no rotary table: "
            f"each axis needs 1 to {ROPE_POSITIONS} positions"
        )
    dim_hw = 2 * (head_dim // 6)
    dim_t = head_dim - 2 * dim_hw
    angles = np.empty((grid_t, grid_h, grid_w, head_dim // 2))
    start = 0
    for axis, (length, dim) in enumerate(((grid_t, dim_t), (grid_h, dim_hw), (grid_w, dim_hw))):
        frequencies = ROPE_BASE ** (-2.0 * np.arange(dim // 2) / dim) if dim else np.empty(0)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        angles[..., start : start + dim // 2] = np.multiply.outer(np.arange(length), frequencies).reshape(shape)
        start += dim // 2
    flat = angles.reshape(-1, head_dim // 2)
    return np.cos(flat).astype(np.float32), np.sin(flat).astype(np.float32)
