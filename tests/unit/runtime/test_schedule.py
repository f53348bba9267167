"""Grids and tables of the runtime are those of the paper, of the PyTorch reference, and of complex arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tmd_engines.bundle.families import FAMILIES
from tmd_runtime.sampling.schedule import rope_tables, shift_grid


@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [
        (1, 10, [0, 0.999]),
        (2, 10, [0, 0.9091, 0.999]),
        (3, 10, [0, 0.8333, 0.9524, 0.999]),
        (4, 10, [0, 0.7692, 0.9091, 0.9677, 0.999]),
        (4, 5, [0, 0.625, 0.8333, 0.9375, 0.999]),
    ],
)
def test_grid_has_the_numbers_of_the_paper(steps: int, shift: float, expected: list[float]) -> None:
    np.testing.assert_allclose(shift_grid(steps, shift), expected, atol=5e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0, 10.0])
def test_grid_is_the_references(steps: int, shift: float) -> None:
    reference = pytest.importorskip("tmd_ref.samplers", exc_type=ImportError)
    assert np.array_equal(shift_grid(steps, shift), reference.shift_grid(steps, shift))


@pytest.mark.parametrize(
    ("steps", "shift", "t_max"), [(0, 10, 0.999), (2, 0.5, 0.999), (2, 10, 0), (2, 10, 1.1), (200, 10, 0.999)]
)
def test_impossible_grids_are_refused(steps: int, shift: float, t_max: float) -> None:
    with pytest.raises(ValueError, match=r"step|t_max"):
        shift_grid(steps, shift, t_max)


@pytest.mark.parametrize(
    ("steps", "inner_steps", "head_blocks", "layers", "nfe"),
    [(1, 2, 5, 30, 1.1667), (2, 2, 5, 30, 2.3333), (2, 4, 5, 30, 3.0), (1, 4, 5, 40, 1.375), (2, 1, 5, 40, 2.0)],
)
def test_nfe_has_the_numbers_of_the_paper(
    steps: int, inner_steps: int, head_blocks: int, layers: int, nfe: float
) -> None:
    model = SimpleNamespace(head_blocks=head_blocks, num_layers=layers)
    assert FAMILIES["tmd"].nfe(model, steps, inner_steps, 1) == pytest.approx(nfe, abs=5e-5)


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 4, 4), (3, 2, 7)])
@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_rope_tables_are_rotations_by_position_and_axis(grid: tuple[int, int, int], head_dim: int) -> None:
    cos, sin = rope_tables(*grid, head_dim)
    assert cos.shape == sin.shape == (np.prod(grid), head_dim // 2) and cos.dtype == sin.dtype == np.float32
    spatial = 2 * (head_dim // 6)
    dims = (head_dim - 2 * spatial, spatial, spatial)
    for row, position in enumerate(np.ndindex(*grid)):
        expected = np.concatenate(
            [np.exp(1j * p * 10000.0 ** (-np.arange(0, dim, 2) / dim)) for p, dim in zip(position, dims, strict=True)]
        )
        np.testing.assert_allclose(cos[row] + 1j * sin[row], expected, atol=1e-7)


def test_wan_splits_64_pairs_into_22_21_21() -> None:
    along_t, along_h, along_w = (rope_tables(*grid, 128)[1][1] != 0 for grid in ((2, 1, 1), (1, 2, 1), (1, 1, 2)))
    assert [int(axis.sum()) for axis in (along_t, along_h, along_w)] == [22, 21, 21]
    assert along_t[:22].all() and along_h[22:43].all() and along_w[43:].all()


@pytest.mark.parametrize(
    ("grid", "head_dim"), [((5, 4, 4), 32), ((3, 2, 7), 128), ((21, 30, 52), 128), ((2, 2, 2), 20)]
)
def test_rope_tables_are_the_references(grid: tuple[int, int, int], head_dim: int) -> None:
    reference = pytest.importorskip("tmd_ref.wan", exc_type=ImportError)
    for ours, theirs in zip(rope_tables(*grid, head_dim), reference.rope_tables(*grid, head_dim), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=6e-8)


@pytest.mark.parametrize(("grid", "head_dim"), [((0, 1, 1), 32), ((1, 1025, 1), 32), ((1, 1, 1), 31), ((1, 1, 1), 0)])
def test_impossible_tables_are_refused(grid: tuple[int, int, int], head_dim: int) -> None:
    with pytest.raises(ValueError, match=r"head_dim|rotary table"):
        rope_tables(*grid, head_dim)
