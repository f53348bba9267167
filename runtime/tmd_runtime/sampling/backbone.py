"""The graph `backbone` of a model that runs it once per step, and the buffers that its graphs share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .schedule import rope_tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from tmd_engines import Engine, Manifest

    from .family import LatentShape


class BoundBackbone:
    """The backbone tied to buffers for latents of `latent_shape` and prompts of `text_tokens` tokens.

    `step` runs it on `x`, `times` (`t`, and whatever else `told` names) and `prompt_embeds`. `outputs` (features,
    context) and `rope` are for the flow head; `dims` are the sizes behind the symbols of all graphs.
    """

    def __init__(
        self,
        backbone: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
        told: tuple[str, ...] = ("t",),
    ) -> None:
        batch, _, frames, height, width = latent_shape
        pt, ph, pw = manifest.model.patch_size
        grid = (frames // pt, height // ph, width // pw)
        self.dims = {"batch": batch, "frames": frames, "height": height, "width": width}
        self.dims |= {"tokens": grid[0] * grid[1] * grid[2], "text": text_tokens}
        self.x, self.prompt_embeds = (backbone.empty(name, **self.dims) for name in ("x", "prompt_embeds"))
        self.times = {name: backbone.empty(name, **self.dims) for name in told}
        self.t = self.times["t"]
        self.rope = {name: backbone.empty(name, **self.dims) for name in ("rope_cos", "rope_sin")}
        for buffer, table in zip(self.rope.values(), rope_tables(*grid, manifest.model.head_dim), strict=True):
            buffer[...] = table
        self.outputs = {name: backbone.empty(name, **self.dims) for name in ("features", "context")}
        self.features = self.outputs["features"]
        self._inputs = {"x": self.x, **self.times, "prompt_embeds": self.prompt_embeds, **self.rope}
        self.step = self.bind(backbone)

    def bind(self, backbone: Engine) -> Callable[[], None]:
        """The step of another graph with the same interface, on these buffers."""
        return backbone.bind(self._inputs, self.outputs)
