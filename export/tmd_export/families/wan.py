"""Wan transformers without inner flow, and what they share with the students that are made from them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tmd_engines.bundle.families.wan import SECOND

from ..errors import ExportError
from ..presets.wan import PRESETS, on_grid
from .family import ExportFamily, Request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..sources.source import Source
    from .family import Builder


MAX_STEPS = 6  # to calibrate on, of a model for any number of them: they go from noise to data as its 50 do


class Wan21(ExportFamily):
    """Of the models that are Wan transformers. Whether a checkpoint has an inner flow, its tensors say."""

    models: tuple[str, ...] = ("tiny", "wan1.3b", "wan14b")
    built_in: tuple[str, ...] = ("tiny",)
    videos = {"tiny": {"frames": 17, "width": 64, "height": 64, "fps": 8}}  # noqa: RUF012
    # Wan itself computes its time embedding and its output layer in float32.
    exact = r"(time|interval|delta)_(embedding|projection)|patch_embedding|head\.head"
    products = r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])"
    any_size = True
    fusion: str | None  # of random weights
    flow_map = False  # likewise

    def open(self, request: Request) -> Source:
        from ..sources.decoders import WithDecoder

        source = self._open(request)
        return source if request.decoder is None else WithDecoder(source, request.decoder)

    def _open(self, request: Request) -> Source:
        from tmd_ref.flow_map import GATE
        from tmd_ref.wan import WAN_CONFIGS

        from ..checkpoints.experts import experts_of
        from ..sources.experts import TwoTransformers
        from ..sources.folder import FolderSource
        from ..sources.random_wan import RandomSource
        from ..sources.source import FILE_OF, built_in_folder
        from ..sources.wan import WanSource
        from ..sources.wan21 import check_architecture

        model, paths = request.model, request.checkpoints
        if request.text_encoder is not None:
            raise ExportError(
                f"--text-encoder is for tim-t2i: the text encoder of {model or 'Wan'} comes with its --checkpoint, so "
                "leave it out."
            )
        if model is None:
            own = len(paths) == 1 and (paths[0] / FILE_OF["student"]).is_file()
            if own or (experts := experts_of(paths)) is None:
                return FolderSource(paths[0]) if own else WanSource(paths)
            return TwoTransformers(experts)
        if request.seed is not None:
            if paths:
                raise ExportError("a checkpoint has its own weights: give either --checkpoint or --random-weights.")
            return RandomSource(model, request.seed, fusion=self.fusion, gate=GATE if self.flow_map else None)
        if len(paths) == 1 and (paths[0] / FILE_OF["student"]).is_file():
            source = FolderSource(paths[0], model)
            check_architecture(source.wan, WAN_CONFIGS[model], model, paths[0])
            return source
        if paths:
            return TwoTransformers(experts, model) if (experts := experts_of(paths)) else WanSource(paths, model)
        if model not in self.built_in:
            raise ExportError(f"{model} has no built-in weights: give --checkpoint PATH, or --random-weights SEED.")
        if not built_in_folder().is_dir():
            raise ExportError(
                f"the built-in weights are missing from this installation ({built_in_folder()}): install tmd again, or "
                "give --checkpoint PATH or --random-weights SEED."
            )
        return FolderSource(built_in_folder(), model, "built-in weights")


class _Wan(Wan21):
    name = "wan"
    is_wan = True
    models = (*Wan21.models, "wan2.2-ti2v-5b")
    presets = PRESETS
    known_by = "is a Wan transformer without inner flow"
    fusion = None

    def on_grid(self, sampler: Mapping[str, Any], grid: str) -> dict[str, Any]:
        if sampler["times"] is not None:
            raise ExportError(
                f"--grid {grid} is for a model of any number of steps, and the preset of this one has a list of times: "
                "leave it out."
            )
        return {**sampler, "grid": on_grid(sampler["rule"], grid)}

    def samplings(self, sampler: Any) -> list[tuple[int, int]]:
        """Every number of steps that the model is made for; of one for any number its default, or fewer."""
        return [(steps, 1) for steps in sampler.allowed_steps or (min(sampler.steps, MAX_STEPS),)]

    def builders(self) -> dict[str, Builder]:
        from ..graphs.wan import backbone, flow_head

        first = {"backbone": backbone, "flow_head": flow_head}
        second = {SECOND[name]: partial(build, name=SECOND[name]) for name, build in first.items()}
        return {**super().builders(), **first, **second}


WAN = _Wan()
