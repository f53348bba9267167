"""One run of one job on other machines: stage after stage, each on whichever replica is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError, TaskCancelledError

from tmd_runtime import Cancelled, StepInfo
from tmd_runtime.command.progress import steps_of

from ..local.meter import Meter
from ..local.worker import RunFailed, RunLost
from .messages import LOST, Broken, Made, Preview, Step

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from ..jobs import Job, Progress
    from ..local.model import Model


@dataclass(frozen=True)
class Handles:
    """The deployments of the stages."""

    text_encoder: DeploymentHandle[Any]
    denoiser: DeploymentHandle[Any]
    decoder: DeploymentHandle[Any]


class RayRunner:
    """Runs jobs on the replicas of `handles`. See `Runner`."""

    def __init__(self, models: Mapping[str, Model], handles: Handles) -> None:
        self._models, self._handles = models, handles
        self._seconds: dict[str, dict[str, float]] = {}  # group -> stage -> seconds of its latest run
        self._running: Any = None  # Serve's response that is being read

    def make(self, job: Job, show: Callable[[Progress], bool], on_preview: Callable[[bytes], object]) -> dict[str, Any]:
        """See `Runner.make`. Raises RunLost if a replica was lost, and RunFailed as a stage says."""
        start = perf_counter()
        model = self._models[job.model]
        settings = model.settings(job.request["wishes"])
        reads = settings.label is None
        totals = steps_of(model.manifest, settings, reads=reads)
        meter = Meter(totals, self._seconds.get(job.group), job.estimated_seconds, show)

        def follow(handle: DeploymentHandle[Any], *arguments: Any) -> Made:
            return self._follow(handle, arguments, meter, on_preview)

        embedded = follow(self._handles.text_encoder, job) if reads else Made()
        denoised = follow(self._handles.denoiser, job, embedded.box)
        decoded = follow(self._handles.decoder, job, denoised.box, replace(denoised, box=()))
        stages = _sum(embedded.seconds, denoised.seconds, decoded.seconds)
        self._seconds[job.group] = stages
        return {
            **decoded.about,
            "stage_seconds": {stage: round(value, 6) for stage, value in stages.items()},
            "total_seconds": round(perf_counter() - start, 6),
            "warnings": [*decoded.about["warnings"], *embedded.warnings, *denoised.warnings],
        }

    def interrupt(self, thread: int) -> None:
        """See `Runner.interrupt`."""
        running = self._running
        if running is not None:
            with suppress(Exception):  # over meanwhile
                running.cancel()

    def close(self) -> None:
        """The replicas are Ray's."""

    def _follow(
        self,
        handle: DeploymentHandle[Any],
        arguments: tuple[Any, ...],
        meter: Meter,
        on_preview: Callable[[bytes], object],
    ) -> Made:
        try:
            self._running = handle.options(stream=True).run.remote(*arguments)
            for message in self._messages():
                if isinstance(message, Made):
                    return message
                if isinstance(message, Broken) and message.code == LOST:
                    raise RunLost(message.message)
                if isinstance(message, Broken):
                    raise RunFailed(message.code, message.message)
                if isinstance(message, Preview):
                    on_preview(message.png)
                elif isinstance(message, Step) and meter(StepInfo(*vars(message).values())) is False:
                    raise Cancelled
            raise RunLost("a replica ended its answer early")
        finally:
            self.interrupt(0)
            self._running = None

    def _messages(self) -> Iterator[Any]:
        try:
            yield from self._running
        except TaskCancelledError:
            raise Cancelled from None
        except RayError as error:
            raise RunLost(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _sum(*stages: Mapping[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in stages:
        for stage, seconds in one.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total
