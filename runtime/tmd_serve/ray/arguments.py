"""What `serve run tmd_serve.ray:build` and a Serve config file can set."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tmd_runtime import UsageFailure

from ..command.options import NAME, place_name
from ..settings import Limits


def _from_words(value: Any) -> Any:
    """On a command line everything is a string: `NAME=VALUE,...`, or JSON as in a config file."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("is not JSON") from None
    found: dict[str, str] = {}
    for word in value.split(","):
        name, equals, meant = word.partition("=")
        if not equals or name in found:
            raise ValueError("must be NAME=VALUE,NAME=VALUE with each name once, or JSON")
        found[name] = meant
    return found


def _bundles(value: Any) -> Any:
    """As `tmd-serve --bundle` has them, with commas between them: a bundle without a name has its folder's."""
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        words = (word if "=" in word else f"{place_name(word)}={word}" for word in value.split(","))
        value = ",".join(words)
    found = _from_words(value)
    for name in found if isinstance(found, Mapping) else ():
        if not NAME.fullmatch(str(name)):
            raise ValueError(f"{name!r} cannot be the name of a model: write NAME=FOLDER")
    return found


def _absolute(data: Path) -> Path:
    """Replicas begin in folders of their own, so a relative path would be another place for each."""
    if not data.is_absolute():
        raise ValueError("must begin with a slash")
    return data


def _size(value: Any) -> Any:
    """`WIDTHxHEIGHT`, as for `tmd-serve`."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value) if isinstance(value, str) else None
    return value if match is None else match.groups()


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Replicas(_Part):
    """Of one deployment: at least `least`, and at most `most` while jobs wait. Each has `gpus` GPUs (a fraction shares
    one). `cpus` is what Ray counts of a machine's cores for it, so that a small machine has room for all four; what an
    engine takes is bounded by `threads`."""

    least: Annotated[int, Field(ge=0)] = 1
    most: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0
    cpus: Annotated[float, Field(gt=0)] = 0.25

    @property
    def limit(self) -> int:
        """How many there may be: `most`, or `least` where that is more."""
        return max(self.least, self.most)


Whole = Annotated[int, Field(ge=1)]
Group = Annotated[Replicas, BeforeValidator(_from_words)]


class Arguments(_Part):
    """`bundles` are names and folders, which every machine has at the same place, as it has the folder `data`: a file
    system that all share. `database` is a PostgreSQL URL; without one a SQLite file in `data`, for one ingress.

    `in_flight` is how many jobs one ingress keeps going (None: its share of two for each denoiser that there may be,
    so that texts and decoders work beside them). `require_key` false is for an ingress that only this machine reaches.
    """

    data: Annotated[Path, AfterValidator(_absolute)]
    bundles: Annotated[dict[str, str], BeforeValidator(_bundles), Field(min_length=1)] = {"tiny": "builtin:tiny"}
    database: str | None = None
    ingress: Group = Replicas()
    text_encoders: Group = Replicas()
    denoisers: Group = Replicas()
    decoders: Group = Replicas()
    in_flight: Whole | None = None
    engine: str = "auto"
    device: str = "auto"
    threads: Whole | None = None
    memory: Literal["all", "low"] = "all"
    max_loaded: Whole | None = None
    max_size: Annotated[tuple[Whole, Whole], BeforeValidator(_size)] = (1280, 720)
    max_frames: Whole = 161
    max_steps: Whole = 100
    max_seconds: Annotated[float, Field(gt=0)] = 3600.0
    max_waiting: Whole = 1000
    attempts: Whole = 3
    keep_days: Annotated[float, Field(gt=0)] = 7.0
    keep_bytes: Whole = 1 << 40
    require_key: bool = True

    @classmethod
    def read(cls, words: Mapping[str, Any]) -> Arguments:
        """The arguments that Ray got from a command line or a file. Raises UsageFailure for the first wrong one."""
        try:
            return cls.model_validate(words)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UsageFailure(f"there is no argument {name}: see tmd_serve.ray.arguments for those that there are.")
        if first["type"] == "missing":
            raise UsageFailure(f"the argument {name} is missing: give it, as {name}=... or in the config file.")
        why = first["msg"].removeprefix("Value error, ")
        raise UsageFailure(f"the argument {name} is refused: {why[:1].lower()}{why[1:]}.")

    @property
    def limits(self) -> Limits:
        width, height = self.max_size
        return Limits(width * height, self.max_frames, self.max_steps, self.max_seconds, waiting=self.max_waiting)

    @property
    def slots(self) -> int:
        return self.in_flight or max(2 * self.denoisers.limit // max(self.ingress.least, 1), 1)
