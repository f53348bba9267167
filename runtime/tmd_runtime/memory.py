"""Will a run fit, and how: every graph kept loaded ("all"), or one stage after the other ("low").

"low" has the encoder of a picture, the text encoder, then the graphs of the loop, then the decoder, each freed before
the next one loads; of a model of two transformers one at a time. "auto" takes it when "all" would not fit, and refuses
a run for which both are too large, before it starts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .errors import RuntimeFailure

if TYPE_CHECKING:
    from collections.abc import Collection

    from tmd_engines import Bundle
    from tmd_engines.cost.sizing import Estimate, Memory

    from .settings import Settings

MODES = ("auto", "all", "low")
READER, DENOISER = ("text_encoder",), ("backbone", "flow_head", "update")
SECOND = ("backbone_2", "flow_head_2")  # in place of the first two of DENOISER, where a model has two transformers
DECODER, ENCODER = ("decoder_first", "decoder_step"), ("encoder",)
TOGETHER = (READER, (*DENOISER, *SECOND), DECODER, ENCODER)
"""Graphs that are loaded at the same time in "low"; of DENOISER and SECOND the graphs of one transformer."""


class MemoryChooser:
    """Chooses the mode for runs of one bundle when nobody names one; remembers the latest size that it estimated."""

    def __init__(self, bundle: Bundle, engine: str = "auto", device: str = "auto") -> None:
        self._bundle, self._engine, self._device = bundle, engine, device
        self._latest: tuple[object, Estimate | None] = (None, None)

    def choose(self, settings: Settings, unused: Collection[str], loaded: Collection[str]) -> Memory:
        """The mode for this run.

        `unused` are graphs that it does not need, `loaded` those whose weights are in memory already, so that the
        figure for free memory does not count them. Where that is not told, "all". Raises RuntimeFailure if the run
        would fit in neither mode, BundleError if a graph cannot be sized: it could take any memory.
        """
        from tmd_engines.cost.sizing import BASE_BYTES, STAGES, available_bytes
        from tmd_engines.cost.system_memory import resident_bytes

        free = available_bytes()
        if free is None:
            return "all"
        found = self.estimate(settings)
        used = {name: stage for name, stage in found.stages.items() if not set(STAGES[name]) <= set(unused)}
        found = replace(found, stages=used)
        # What the process holds by now is not free any more, and is a part of what the run needs.
        free += min(resident_bytes(), BASE_BYTES)
        free += sum(stage.weight_bytes for name, stage in used.items() if set(STAGES[name]) & set(loaded))
        needs: dict[Memory, int] = {"all": found.peak("all"), "low": found.peak("low")}
        for mode, need in needs.items():
            if need <= free:
                return mode
        both = f"{_gigabytes(needs['all'])}, or {_gigabytes(needs['low'])} with one stage after the other"
        raise RuntimeFailure(
            f"there is not enough memory for {settings.frames} frames of {settings.width}x{settings.height}: the run "
            f"needs about {both}, and {_gigabytes(free)} are free. Choose fewer frames, a smaller size or a bundle of "
            "lower precision, free some memory, or try all the same with --memory low."
        )

    def estimate(self, settings: Settings) -> Estimate:
        """Of a run with the bundle's own steps, from a picture where the bundle can read one. Raises BundleError if a
        graph cannot be sized."""
        from tmd_engines.cost.sizing import estimate

        key = settings.frames, settings.width, settings.height, settings.passes
        if self._latest[0] != key:
            found = estimate(
                self._bundle, width=settings.width, height=settings.height, frames=settings.frames,
                guidance_passes=settings.passes, from_picture=True,
                engine=self._engine, device=self._device,
            )  # fmt: skip
            self._latest = key, found  # steps take time, not memory
        assert self._latest[1] is not None
        return self._latest[1]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
