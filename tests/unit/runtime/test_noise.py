"""The noise is torch's, within 1e-6, and has the same bits everywhere."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType

import mpmath
import numpy as np
import pytest

from tmd_runtime.sampling.noise import NoiseStream, exact_log, exact_sin_cos

GOLDEN = Path(__file__).parents[3] / "runtime" / "golden"
SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1]


def make_noise() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_noise", GOLDEN / "make_noise.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_draws(seed: int, counts: list[int]) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator).numpy() for count in counts]


def tolerance() -> float:
    torch = pytest.importorskip("torch")
    # Torch's plain kernel rounds the angle differently from its own vectorised ones (noise.py says by how much).
    return 1e-6 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 3e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_one_draw_is_torchs(seed: int) -> None:
    for count in (1, 2, 7, 15, 16, 17, 31, 32, 33, 100, 1000, 16 * 5 * 8 * 8, 100_003):
        (expected,) = torch_draws(seed, [count])
        actual = NoiseStream(seed).normal(count)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance(), err_msg=f"{count} values")


@pytest.mark.parametrize("seed", SEEDS)
def test_successive_draws_are_torchs(seed: int) -> None:
    # Odd small draws leave a kept sine; draws of blocks in between must not use or lose it.
    counts = [1, 20, 3, 16, 0, 1, 17, 5, 31, 1, 2, 100, 15, 5120, 5120, 1, 33]
    stream = NoiseStream(seed)
    for count, expected in zip(counts, torch_draws(seed, counts), strict=True):
        np.testing.assert_allclose(stream.normal(count), expected, rtol=0, atol=tolerance(), err_msg=f"{count} values")


def test_a_million_values_are_torchs() -> None:
    # Among so many are radii above 5, where a careless angle would show.
    (expected,) = torch_draws(11, [16 * 21 * 60 * 104])
    actual = NoiseStream(11).normal((1, 16, 21, 60, 104))
    assert np.abs(expected).max() > 5
    assert np.abs(actual.ravel() - expected).max() <= tolerance()


def test_shape_and_out() -> None:
    expected = NoiseStream(3).normal(5120)
    out = np.empty((1, 16, 5, 8, 8), np.float32)
    assert NoiseStream(3).normal(out.shape, out=out) is out
    assert np.array_equal(out.ravel(), expected)
    with pytest.raises(ValueError, match="C-contiguous float32"):
        NoiseStream(3).normal(4, out=np.empty(4, np.float64))
    with pytest.raises(ValueError, match="C-contiguous float32"):
        NoiseStream(3).normal((4, 4), out=np.empty((4, 4), np.float32).T)


def test_high_bits_of_the_seed_do_not_count_as_in_torch() -> None:
    assert np.array_equal(NoiseStream(5).normal(64), NoiseStream(2**32 + 5).normal(64))
    (low,), (high,) = torch_draws(5, [64]), torch_draws(2**32 + 5, [64])
    assert np.array_equal(low, high)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", None, True])
def test_other_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="seed"):
        NoiseStream(seed)  # type: ignore[arg-type]


def test_golden_values_are_what_this_machine_computes() -> None:
    golden = (GOLDEN / "noise.txt").read_text(encoding="ascii")
    assert make_noise().golden_text() == golden, "the noise changed: old seeds would give other videos"


def test_golden_file_reads_as_documented() -> None:
    """A reader written from the file's own header, as a C++ test will have one."""
    text = (GOLDEN / "noise.txt").read_text(encoding="ascii")
    tokens = iter(" ".join(line.split("#")[0] for line in text.splitlines()).split())
    fnv1a = make_noise().fnv1a
    stream, draws, hashes = NoiseStream(0), 0, 0
    for token in tokens:
        if token == "stream":
            stream = NoiseStream(int(next(tokens)))
            continue
        bits = stream.normal(int(next(tokens))).view(np.uint32)
        if token == "draw":
            assert [int(next(tokens), 16) for _ in bits] == bits.tolist()
            draws += 1
        else:
            assert token == "hash"
            assert int(next(tokens), 16) == fnv1a(bits.astype("<u4").tobytes())
            hashes += 1
    assert draws >= 10 and hashes >= 3


def test_fnv1a_is_the_published_hash() -> None:
    assert make_noise().fnv1a(b"foobar") == 0x85944171F73967E8


def test_logarithm_is_within_two_ulp() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.random(400), 1 - 2.0 ** -np.arange(1, 54), 2.0 ** -np.arange(0, 60), [0.70710678, 0.7071068]]
    )
    x = x[x > 0]
    expected = [mpmath.log(mpmath.mpf(float(value))) for value in x]
    for value, log, exact in zip(x, exact_log(x), expected, strict=True):
        assert abs(float(log - exact)) <= 2 * np.spacing(abs(float(exact))), f"log({value!r})"


def test_sine_and_cosine_are_within_1e_15() -> None:
    rng = np.random.default_rng(0)
    quarters = np.arange(9) * np.pi / 4
    near = np.concatenate([np.nextafter(quarters, 9), np.nextafter(quarters[1:], 0)])
    angle = np.concatenate([rng.random(400) * 2 * np.pi, quarters, near])
    sine, cosine = exact_sin_cos(angle)
    for value, s, c in zip(angle, sine, cosine, strict=True):
        exact = mpmath.mpf(float(value))
        assert abs(float(s - mpmath.sin(exact))) < 1e-15 and abs(float(c - mpmath.cos(exact))) < 1e-15, value


def test_full_size_latents_take_well_under_a_second() -> None:
    # 0.06 s on one core of the machine where this was written; the limit only catches a return to plain Python.
    start = time.perf_counter()
    NoiseStream(0).normal((1, 16, 21, 60, 104))
    assert time.perf_counter() - start < 5
