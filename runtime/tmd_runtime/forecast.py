"""How long the runs of a bundle will take, told before they start, and corrected by those that are over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .memory import ENCODER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tmd_engines import Bundle

    from .memory import MemoryChooser
    from .settings import Settings

_SHORTEST = 0.01  # seconds of a run that says something of the machine's speed
_WORK = ("text", "backbone", "flow_head", "decode", "encode")


class Forecast:
    """The seconds of runs of one bundle on one engine, with so many threads."""

    def __init__(self, bundle: Bundle, chooser: MemoryChooser, engine: str, threads: int | None) -> None:
        self._bundle, self._chooser, self._engine, self._threads = bundle, chooser, engine, threads

    def seconds(self, settings: Settings, encodes_image: bool = False) -> float | None:
        """Of a run with these settings, without loading; None where it has a deadline or cannot be counted.
        `encodes_image`: it takes a picture that is not encoded yet."""
        from tmd_engines.cost.speed import seconds_of

        flops = self._flops(settings, encodes_image)
        return None if flops is None else seconds_of(flops, self._bundle, self._engine, self._threads)

    def learn(self, settings: Settings, stage_seconds: Mapping[str, float], encodes_image: bool = False) -> None:
        """Takes note of a whole run that is over."""
        from tmd_engines.cost.speed import learn

        flops = self._flops(settings, encodes_image)
        took = sum(stage_seconds.get(stage, 0.0) for stage in _WORK)
        if flops is not None and took > _SHORTEST:
            learn(flops, took, self._bundle, self._engine, self._threads)

    def _flops(self, settings: Settings, encodes_image: bool) -> int | None:
        from tmd_engines import BundleError

        if settings.deadline is not None:
            return None
        try:
            found = self._chooser.estimate(settings)
        except BundleError:  # a graph that cannot be sized
            return None
        calls = self._bundle.manifest.family.calls(settings.steps, settings.inner_steps, settings.passes)
        counts = {"backbone": calls.backbone, "flow_head": calls.flow_head, "update": settings.steps}
        stages = {name: stage for name, stage in found.stages.items() if encodes_image or name not in ENCODER}
        return sum(stage.flops * counts.get(name, stage.calls) for name, stage in stages.items())
