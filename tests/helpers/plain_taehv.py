"""TAEHV written a second time, functional and for all frames of a clip at once; the tensors of a published file."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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


# That for Wan2.2's latents of 48 channels, which makes squares of 2x2 pixels.
PUBLISHED22 = PUBLISHED | {
    "decoder.1.weight": (256, 48, 3, 3),
    "decoder.22.weight": (12, 64, 3, 3),
    "decoder.22.bias": (12,),
}


def random_weights(published: dict[str, tuple[int, ...]] = PUBLISHED) -> dict[str, torch.Tensor]:
    """Values for `published` that keep the size of activations and leave the video between black and white."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in published.items():
        spread = (0.6 if ".conv.4." in name else 1.0) * torch.Size(shape[1:]).numel() ** -0.5 if shape[1:] else 0.1
        weights[name] = torch.randn(shape, generator=generator) * spread
    weights["decoder.22.weight"] *= 0.3
    weights["decoder.22.bias"].fill_(0.5)
    return weights


def whole_clip(weights: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """Video `[B,3,1+4k,H,W]` in 0..1 of `[B,C,1+k,h,w]`: past frames by a shift along time, trimmed at the end."""

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
    x = conv(F.relu(x), "decoder.22")
    video = (x if x.shape[1] == 3 else F.pixel_shuffle(x, 2)).unflatten(0, (batch, -1)).movedim(2, 1)
    return video[:, :, 3:].clamp(0, 1)
