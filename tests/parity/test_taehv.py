"""tmd_ref's TAEHV against the same network written a second time: functional, all frames of a clip at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tmd_export.graphs.precision import lower
from tmd_ref.taehv import TAEHV

# What a published file holds for the decoder, as name -> shape: written from its list of layers, not from our modules.
BLOCK_WIDTHS = {3: 256, 4: 256, 5: 256, 9: 128, 10: 128, 11: 128, 15: 64, 16: 64, 17: 64}
PUBLISHED = {
    "decoder.1.weight": (256, 16, 3, 3),
    "decoder.1.bias": (256,),
    "decoder.7.conv.weight": (256, 256, 1, 1),
    "decoder.8.weight": (128, 256, 3, 3),
    "decoder.13.conv.weight": (256, 128, 1, 1),
    "decoder.14.weight": (64, 128, 3, 3),
    "decoder.19.conv.weight": (128, 64, 1, 1),
    "decoder.20.weight": (64, 64, 3, 3),
    "decoder.22.weight": (3, 64, 3, 3),
    "decoder.22.bias": (3,),
}
for place, width in BLOCK_WIDTHS.items():
    for layer in (0, 2, 4):
        PUBLISHED[f"decoder.{place}.conv.{layer}.weight"] = (width, width if layer else 2 * width, 3, 3)
        PUBLISHED[f"decoder.{place}.conv.{layer}.bias"] = (width,)


def random_weights() -> dict[str, torch.Tensor]:
    """Values for `PUBLISHED` that keep the size of activations and leave the video between black and white."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in PUBLISHED.items():
        spread = (0.6 if ".conv.4." in name else 1.0) * torch.Size(shape[1:]).numel() ** -0.5 if shape[1:] else 0.1
        weights[name] = torch.randn(shape, generator=generator) * spread
    weights["decoder.22.weight"] *= 0.3
    weights["decoder.22.bias"].fill_(0.5)
    return weights


def whole_clip(weights: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """Video `[B,3,1+4k,8h,8w]` in 0..1 of `[B,16,1+k,h,w]`: past frames by a shift along time, trimmed at the end."""

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    batch = latents.shape[0]
    x = latents.movedim(1, 2).flatten(0, 1)
    x = F.relu(conv(3 * torch.tanh(x / 3), "decoder.1"))
    for start, growth in ((3, 1), (9, 2), (15, 2)):
        for place in range(start, start + 3):
            clip = x.unflatten(0, (batch, -1))
            shifted = F.pad(clip, (0, 0, 0, 0, 0, 0, 1, -1)).flatten(0, 1)  # frame t-1 beside frame t, zeros at first
            h = torch.cat([x, shifted], dim=1)
            for layer in (0, 2, 4):
                h = conv(h if layer == 0 else F.relu(h), f"decoder.{place}.conv.{layer}")
            x = F.relu(x + h)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = conv(x, f"decoder.{start + 4}.conv").reshape(growth * x.shape[0], -1, *x.shape[2:])
        x = conv(x, f"decoder.{start + 5}")
    video = conv(F.relu(x), "decoder.22").unflatten(0, (batch, -1)).movedim(2, 1)
    return video[:, :, 3:].clamp(0, 1)


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (2, 3, 6, 4), (1, 5, 3, 3)], ids=str)
@torch.no_grad()
def test_frame_by_frame_equals_the_whole_clip(shape: tuple[int, int, int, int]) -> None:
    model = TAEHV().eval()
    weights = random_weights()
    model.load_state_dict(weights, strict=True)
    batch, frames, height, width = shape
    latents = 2 * torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(1))
    expected = whole_clip(weights, latents)
    video = model.decode(latents)
    assert video.shape == (batch, 3, 4 * frames - 3, 8 * height, 8 * width)
    inside = ((expected > 0) & (expected < 1)).float().mean()
    assert inside > 0.9 and expected.std() > 0.02  # a video that is clamped or flat would hide errors
    assert ((video + 1) / 2 - expected).abs().max() <= 1e-5


def test_the_published_size_has_its_names_shapes_and_parameter_count() -> None:
    with torch.device("meta"):
        model = TAEHV()
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == PUBLISHED
    assert sum(weight.numel() for weight in model.parameters()) == 9_844_611


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
def test_in_low_precision_pictures_and_caches_stay_float32(precision: str, tolerance: float) -> None:
    model = TAEHV().eval()
    model.load_state_dict(random_weights())
    latents = torch.randn(1, 16, 2, 3, 2, generator=torch.Generator().manual_seed(4))
    expected = model.decode(latents)
    lower(model, precision)
    kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert kept == {f"decoder.{place}.{kind}" for place in (1, 22) for kind in ("weight", "bias")}
    video, caches = model.decode_first(latents[:, :, :1])
    video, caches = model.decode_step(latents[:, :, 1:], caches)
    assert {tensor.dtype for tensor in (video, *caches)} == {torch.float32}
    error = (video - expected[:, :, 1:]).abs().max()
    assert 0 < error <= tolerance
    assert len(video.unique()) > 256  # bfloat16 alone would leave steps that can be seen
