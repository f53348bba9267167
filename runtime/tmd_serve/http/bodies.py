"""What requests may say, as the OpenAPI document shows it. Fields of OpenAI's API first, then ours."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tmd_runtime.settings import MAX_FPS, MAX_SEED, MAX_STEPS


def _listed(value: Any) -> Any:
    """A list out of a form's text: JSON, or numbers with commas between them."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(",")]
        except (ValueError, RecursionError):
            raise ValueError("must be a list of numbers") from None
    return value


def _number(value: Any) -> Any:
    """Refuses true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Size = Annotated[str, Field(pattern=r"^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto)$", examples=["832x480"])]


class ImageReference(BaseModel):
    """A picture inside the request, as OpenAI's clients send it. Addresses elsewhere are not followed."""

    model_config = ConfigDict(extra="forbid")

    image_url: str | None = Field(None, description="data:image/png;base64,...")
    file_id: str | None = Field(None, description="Not known here.")


class Wishes(BaseModel):
    """What both kinds of requests may ask for. Null leaves it to the model, and the seed to chance."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field("", description="What to show. Required unless the model draws numbered classes.")
    model: str | None = Field(None, description="A name from /v1/models; null: the first one.")
    size: Size | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto.")
    steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] | None = None
    inner_steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] | None = None
    seed: Annotated[Whole, Field(ge=0, le=MAX_SEED)] | None = None
    guidance: Annotated[Real, Field(ge=0, le=1000)] | None = None
    negative_prompt: str | None = None
    shift: Annotated[Real, Field(ge=1, le=1000)] | None = None
    schedule: (
        Annotated[
            list[Annotated[Real, Field(ge=0, le=1)]],
            Field(min_length=2, max_length=MAX_STEPS + 1),
            BeforeValidator(_listed),
        ]
        | None
    ) = Field(None, description="Times from 1 to 0; in a form as JSON or with commas.")
    deadline: Annotated[Real, Field(gt=0, le=86400)] | None = None
    label: Annotated[Whole, Field(ge=0)] | None = None
    rho: Annotated[Real, Field(ge=0, le=10)] | None = None

    def granted(self) -> dict[str, Any]:
        """Keyword arguments of `Pipeline.settings`, as far as they are given."""
        names = ("steps", "inner_steps", "seed", "guidance", "negative_prompt", "shift", "schedule", "deadline")
        found = {name: getattr(self, name) for name in (*names, "label", "rho")}
        if self.size not in (None, "auto"):
            width, height = str(self.size).split("x")
            found["size"] = int(width), int(height)
        return {name: value for name, value in found.items() if value is not None}


class VideoRequest(Wishes):
    """One video."""

    seconds: Annotated[Real, Field(gt=0, le=3600)] | None = Field(
        None, description="Length; the nearest number of frames that the model can make."
    )
    input_reference: ImageReference | str | None = Field(None, description="A picture to start from.")
    frames: Annotated[Whole, Field(ge=1, le=100_000)] | None = None
    fps: Annotated[Whole, Field(ge=1, le=MAX_FPS)] | None = Field(None, description="Frames per second of the file.")
    preview: bool = Field(False, description="Send previews among the events.")
    strength: Annotated[Real, Field(gt=0, le=1)] | None = None

    def granted(self) -> dict[str, Any]:
        found = super().granted()
        return found | {
            name: getattr(self, name) for name in ("frames", "fps", "strength") if getattr(self, name) is not None
        }


class ImageRequest(Wishes):
    """Stills, at once. The fields that OpenAI's clients send beside these must have their plain values."""

    n: Annotated[Whole, Field(ge=1, le=10)] | None = 1
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(None, description="Not used.")
