"""tmd_ref's TAEHV against the same network written a second time: functional, all frames of a clip at once."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.plain_taehv import PUBLISHED, PUBLISHED22, random_weights, whole_clip
from tmd_export.weights.precision import lower
from tmd_ref.taehv import TAEHV, TAEHV_CONFIGS

FILES = {"wan2.1": PUBLISHED, "wan2.2": PUBLISHED22}


@pytest.mark.parametrize(
    ("name", "shape"),
    [("wan2.1", (1, 1, 4, 6)), ("wan2.1", (2, 3, 6, 4)), ("wan2.1", (1, 5, 3, 3)), ("wan2.2", (2, 3, 2, 3))],
)
@torch.no_grad()
def test_frame_by_frame_equals_the_whole_clip(name: str, shape: tuple[int, int, int, int]) -> None:
    model = TAEHV(TAEHV_CONFIGS[name]).eval()
    weights = random_weights(FILES[name])
    model.load_state_dict(weights, strict=True)
    batch, frames, height, width = shape
    channels, stride = {"wan2.1": (16, 8), "wan2.2": (48, 16)}[name]
    latents = 2 * torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(1))
    expected = whole_clip(weights, latents)
    video = model.decode(latents)
    assert video.shape == (batch, 3, 4 * frames - 3, stride * height, stride * width)
    inside = ((expected > 0) & (expected < 1)).float().mean()
    assert inside > 0.9 and expected.std() > 0.02  # a video that is clamped or flat would hide errors
    assert ((video + 1) / 2 - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "parameters"), [("wan2.1", 9_844_611), ("wan2.2", 9_923_532)])
def test_the_published_size_has_its_names_shapes_and_parameter_count(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = TAEHV(TAEHV_CONFIGS[name])
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == FILES[name]
    assert sum(weight.numel() for weight in model.parameters()) == parameters


@torch.no_grad()
def test_nine_caches_carry_the_past() -> None:
    model = TAEHV().eval()
    model.load_state_dict(random_weights())
    latents = torch.randn(1, 16, 2, 2, 3, generator=torch.Generator().manual_seed(2))
    _, caches = model.decode_first(latents[:, :, :1])
    sizes = [(256, 2, 3)] * 3 + [(128, 4, 6)] * 3 + [(64, 8, 12)] * 3
    assert [tuple(cache.shape) for cache in caches] == [(1, c, 1, h, w) for c, h, w in sizes]
    video, _ = model.decode_step(latents[:, :, 1:], caches)
    for k in range(9):  # each of them matters
        changed = [*caches[:k], caches[k] + 1, *caches[k + 1 :]]
        assert (model.decode_step(latents[:, :, 1:], changed)[0] - video).abs().max() > 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 1e-2)])
@torch.no_grad()
def test_in_low_precision_pictures_stay_float32_and_caches_have_16_bits(precision: str, tolerance: float) -> None:
    model = TAEHV().eval()
    model.load_state_dict(random_weights())
    latents = torch.randn(1, 16, 2, 3, 2, generator=torch.Generator().manual_seed(4))
    expected = model.decode(latents)
    lower(model, precision)
    kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert kept == {f"decoder.{place}.{kind}" for place in (1, 22) for kind in ("weight", "bias")}
    video, caches = model.decode_first(latents[:, :, :1])
    video, caches = model.decode_step(latents[:, :, 1:], caches)
    assert video.dtype == torch.float32 and {cache.dtype for cache in caches} == {torch.float16}
    error = (video.clamp(-1, 1) - expected[:, :, 1:]).abs().max()
    assert 0 < error <= tolerance
    assert len(video.unique()) > 256  # bfloat16 alone would leave steps that can be seen
