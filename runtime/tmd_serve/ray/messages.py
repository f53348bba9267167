"""What a stage sends while it works: its steps and previews, and at last what came out or why nothing did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """A `StepInfo` of the pipeline."""

    stage: str
    done: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Preview:
    """What the run would give if it ended here, as a PNG file."""

    png: bytes


@dataclass(frozen=True)
class Made:
    """A stage is over. `box` holds references to large arrays, which stay in the object store until the next stage
    takes them; `about` is small."""

    box: tuple[Any, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Broken:
    """A stage failed: a code and a sentence for the job. Exceptions of Ray would bring a traceback along."""

    code: str
    message: str


LOST = "lost"
"""The code of a stage whose input went with the replica that had made it."""

Message = Step | Preview | Made | Broken
