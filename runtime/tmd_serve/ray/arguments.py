"""What `serve run tmd_serve.ray:build` and a Serve config file can set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..settings import Limits


def _from_words(value: Any) -> Any:
    """On a command line everything is a string: `NAME=BUNDLE,...`, or JSON as in a config file."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    named = (word.partition("=") for word in value.split(","))
    return {name.removeprefix("builtin:"): bundle or name for name, _, bundle in named}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Replicas(_Part):
    """Of one deployment: at least `least`, and at most `most` while jobs wait. Each has `gpus` GPUs (a fraction shares
    one) and `cpus` cores to itself."""

    least: Annotated[int, Field(ge=0)] = 1
    most: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0
    cpus: Annotated[float, Field(gt=0)] = 1.0


Group = Annotated[Replicas, BeforeValidator(_from_words)]


class Arguments(_Part):
    """`bundles` are names and folders, which every machine has at the same place, as it has the folder `data`: a file
    system that all share. `database` is a PostgreSQL URL; without one a SQLite file in `data`, for one ingress.

    `in_flight` is how many jobs one ingress keeps going (None: two for each denoiser that there may be, so that texts
    and decoders work beside them). `require_key` false is for an ingress that only this machine reaches.
    """

    data: Path
    bundles: Annotated[dict[str, str], BeforeValidator(_from_words)] = {"tiny": "builtin:tiny"}
    database: str | None = None
    ingress: Group = Replicas()
    text_encoders: Group = Replicas()
    denoisers: Group = Replicas()
    decoders: Group = Replicas()
    in_flight: Annotated[int, Field(ge=1)] | None = None
    engine: str = "auto"
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    memory: Literal["all", "low"] = "all"
    max_loaded: Annotated[int, Field(ge=1)] | None = None
    max_size: tuple[int, int] = (1280, 720)
    max_frames: int = 161
    max_steps: int = 100
    max_seconds: Annotated[float, Field(gt=0)] = 3600.0
    max_waiting: int = 1000
    attempts: Annotated[int, Field(ge=1)] = 3
    keep_days: Annotated[float, Field(gt=0)] = 7.0
    keep_bytes: Annotated[int, Field(gt=0)] = 1 << 40
    require_key: bool = True

    @property
    def limits(self) -> Limits:
        width, height = self.max_size
        return Limits(width * height, self.max_frames, self.max_steps, waiting=self.max_waiting)

    @property
    def slots(self) -> int:
        return self.in_flight or max(2 * self.denoisers.most // max(self.ingress.least, 1), 1)
