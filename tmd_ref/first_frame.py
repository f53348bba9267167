"""A Wan transformer that holds latent frames as they are and denoises the rest: Wan2.2-TI2V-5B with a picture as the
first frame of its video.

A held frame is told the time 0, which is data, and all others are told t. Nothing else differs: with no frame held, all
of this is `WanTransformer`. Who samples puts the held frames back after every step. Source: `i2v` in
wan/textimage2video.py of Wan2.2, which gives every token its own time; tokens of one latent frame share it, so a table
of times per frame is enough.

Letters in shapes as in `tmd_ref.wan`; `held` `[T]` is 1 for a held latent frame and 0 for the others.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tmd_ref.split import SplitWan, VelocityHead
from tmd_ref.student import Backbone
from tmd_ref.wan import WanTransformer, embed_time, time_sinusoid


def embed_frames(module: nn.Module, t: Tensor, held: Tensor, freq_dim: int) -> tuple[Tensor, Tensor]:
    """The embeddings of 0 where a frame is held and of t elsewhere, by the layers of `module`.

    t `[B]` in 0..1, held `[T]`. Returns e `[B, T, D]` and e0 `[B, T, 6, D]`. They are selected and not mixed: a factor
    is exactly 0 or 1.
    """
    layers: Any = module
    layers = layers.time_embedding, layers.time_projection
    moving = embed_time(time_sinusoid(t, freq_dim), *layers)
    still = embed_time(_sinusoid_of_0(freq_dim, moving[0]), *layers)
    e, e0 = (
        now.unsqueeze(1) * _along_frames(1 - held, now) + data.unsqueeze(1) * _along_frames(held, data)
        for now, data in zip(moving, still, strict=True)
    )
    return e, e0


def _sinusoid_of_0(freq_dim: int, like: Tensor) -> Tensor:
    """`time_sinusoid` of 0, `[1, freq_dim]`: a constant, so that an engine can embed it when it loads the graph."""
    half = freq_dim // 2
    return torch.tensor([[1.0] * half + [0.0] * half], dtype=like.dtype, device=like.device)


def _along_frames(held: Tensor, embedded: Tensor) -> Tensor:
    """`[T]` with as many dimensions behind it as an embedding `[B, ...]` has behind its batch."""
    return held.view(-1, *(1,) * (embedded.ndim - 1))


class FirstFrameWan(WanTransformer):
    """`WanTransformer` that is told which latent frames are held."""

    def forward(  # type: ignore[override]  # it is told more
        self, x: Tensor, t: Tensor, prompt_embeds: Tensor, held: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """As `WanTransformer.forward`; x has the held frames in it, and their velocity means nothing."""
        return self.velocity(x, embed_frames(self, t, held, self.config.freq_dim), prompt_embeds, rope)


class FirstFrameBackbone(Backbone):
    """`Backbone` that is told which latent frames are held."""

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, prompt_embeds: Tensor, cos: Tensor, sin: Tensor, held: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Backbone.forward`."""
        _, e0 = embed_frames(self, t, held, self.config.freq_dim)
        return self.features(x, e0, prompt_embeds, cos, sin)


class FirstFrameHead(VelocityHead):
    """`VelocityHead` that is told which latent frames are held."""

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, features: Tensor, context: Tensor, cos: Tensor, sin: Tensor, held: Tensor
    ) -> Tensor:
        """As `VelocityHead.forward`."""
        return self.velocity(x, embed_frames(self, t, held, self.config.freq_dim), features, context, cos, sin)


class SplitFirstFrame(SplitWan):
    """`SplitWan` of a transformer that holds frames."""

    parts = FirstFrameBackbone, FirstFrameHead

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, prompt_embeds: Tensor, held: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """As `FirstFrameWan.forward`."""
        cos, sin = rope or self.rope(x)
        features, context = self.backbone(x, t, prompt_embeds, cos, sin, held)
        velocity: Tensor = self.head(x, t, features, context, cos, sin, held)
        return velocity
