"""The interface of what runs jobs, and what it says of its models and plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .board import Board


@dataclass(frozen=True)
class Wanted:
    """What a request asks of a model. `wishes` are keyword arguments of `Pipeline.settings`; `picture` is the uploaded
    file; `seconds` of the video stands in the place of frames."""

    prompt: str = ""
    wishes: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    preview: bool = False
    picture: bytes | None = None


@dataclass(frozen=True)
class Plan:
    """A request that can be granted: as `Job` has it, with the estimated seconds and bytes of memory."""

    request: dict[str, Any]
    resolved: dict[str, Any]
    group: str
    seconds: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class ModelCard:
    """A model for `GET /v1/models`. `options` is everything that a form for it needs."""

    id: str
    created: int
    options: dict[str, Any]

    @property
    def makes_stills(self) -> bool:
        return bool(self.options["kind"] == "image")


class Executor(Protocol):
    """Runs the jobs of a store, here or elsewhere."""

    @property
    def models(self) -> Sequence[ModelCard]:
        """The first one is what a request gets that names none."""

    @property
    def board(self) -> Board:
        """Where runs on this machine show their progress."""

    def plan(self, model: str, wanted: Wanted) -> Plan:
        """Completes and checks a request; runs nothing. Raises Refusal or tmd_runtime.UsageFailure."""

    def start(self) -> None: ...

    def wake(self) -> None:
        """A job was added."""

    def cancel(self, job_id: str) -> None:
        """Stops a job within a step, if it runs here. The store has noted it already."""

    def stop(self, grace_seconds: float) -> None:
        """Takes no job any more, and gives back what does not end in this time."""

    def is_ready(self) -> bool: ...

    def figures(self) -> dict[str, float]:
        """What `/metrics` shows of it: name -> value."""
