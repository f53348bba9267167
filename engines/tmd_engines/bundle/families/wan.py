"""Wan transformers without inner flow: a few-step checkpoint of another method, or the teacher itself."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ..fields import Shift, StepCount, Text, TimeLevel
from ..sections import ModelInfo, SamplerInfo, check_allowed, check_cut
from .family import Calls, Family, listed
from .rules import RULES
from .signature import CONTEXT, FEATURES, HELD, HOLDS, LATENTS, PROMPT, ROPE, TIME, Signature, update_signature

if TYPE_CHECKING:
    from ..manifest import Manifest

SECOND = {"backbone": "backbone_2", "flow_head": "flow_head_2"}
"""Graphs of a transformer -> those of the second one, if a model has two that take turns."""


def _known_rule(rule: str) -> str:
    if rule not in RULES:
        raise ValueError(f"must be one of {', '.join(RULES)}")
    return rule


class WanModel(ModelInfo):
    """Both graphs are the transformer, cut in two."""

    _cut = model_validator(mode="after")(check_cut)


class HoldingModel(WanModel):
    """With `first_frame` the graphs can hold a picture as the first latent frame of a video (Wan2.2-TI2V-5B)."""

    first_frame: bool = False


class WanSampler(SamplerInfo):
    """How to sample a model whose output is the velocity at the time it was asked for.

    `times` (noise to data, 0 left out): n steps go through the first n of them, then to 0; null: n times of `grid`,
    warped by `shift`; `grid` is Wan's own or that of a scheduler of diffusers. `allowed_steps` null: any number.
    `time_rounding` is what the network is told of 1000·t; the update itself uses t as it is. `init_scale` multiplies
    the first noise. `guidance` 1 means one pass per step, anything else a second one with `negative_prompt` (null: the
    empty prompt). A model of two transformers has a `boundary`: steps from below it, by what the network is told, are
    the second one's, with `guidance_2` (null: the same).
    """

    rule: Annotated[str, AfterValidator(_known_rule)]
    allowed_steps: Annotated[tuple[StepCount, ...], Field(min_length=1, max_length=1000)] | None = None
    shift: Shift
    grid: Literal["wan", "diffusers-unipc", "diffusers-euler"] = "wan"
    times: Annotated[tuple[TimeLevel, ...], Field(min_length=1, max_length=1000)] | None = None
    time_rounding: Literal["none", "integer", "nearest", "bfloat16"]
    init_scale: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    guidance: Annotated[float, Field(ge=0.0, le=1000.0)]
    negative_prompt: Text | None = None
    boundary: TimeLevel | None = None
    guidance_2: Annotated[float, Field(ge=0.0, le=1000.0)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allowed_steps is not None:
            check_allowed("steps", self.steps, self.allowed_steps)
        if self.times is not None:
            if any(later >= earlier for earlier, later in pairwise(self.times)):
                raise ValueError("times must be descending without repeats")
            if self.allowed_steps is None or max(self.allowed_steps) > len(self.times):
                raise ValueError(f"allowed_steps must be given, up to {len(self.times)}: there are as many times")
        if self.guidance_2 is not None and self.boundary is None:
            raise ValueError("guidance_2 is for a model with a boundary")
        if self.guidance_2 is not None and (self.guidance == 1) != (self.guidance_2 == 1):
            raise ValueError("guidance and guidance_2 must both be 1, or neither")
        return self


_TRANSFORMER = {
    "backbone": Signature(
        {"x": LATENTS, "t": TIME, "prompt_embeds": PROMPT, **ROPE, **HELD}, {"features": FEATURES, "context": CONTEXT}
    ),
    "flow_head": Signature(
        {"x": LATENTS, "t": TIME, "features": FEATURES, "context": CONTEXT, **ROPE, **HELD}, {"velocity": LATENTS}
    ),
}


class _Wan(Family):
    name = "wan"
    model, sampler = HoldingModel, WanSampler
    graphs = {  # noqa: RUF012  # read only
        **_TRANSFORMER,
        **{SECOND[name]: signature for name, signature in _TRANSFORMER.items()},
        "update": update_signature(LATENTS, holds=True),
    }

    def flags(self, manifest: Manifest) -> set[str]:
        holds = manifest.model.first_frame  # type: ignore[attr-defined]
        return super().flags(manifest) | ({HOLDS} if holds else set())

    def check(self, manifest: Manifest) -> None:
        super().check(manifest)
        second = [name for name in SECOND.values() if name in manifest.graphs]
        if second and manifest.sampler.boundary is None:  # type: ignore[attr-defined]
            raise ValueError(f"graph '{second[0]}' needs a sampler.boundary, which says when it takes over")

    def describe_model(self, model: HoldingModel) -> str:
        return super().describe_model(model) + (", takes a picture as the first frame" if model.first_frame else "")

    def calls(self, steps: int, inner_steps: int, passes: int) -> Calls:
        return Calls(steps * passes, steps * passes)

    def describe(self, sampler: WanSampler) -> str:
        grid = f"times {'/'.join(f'{t:g}' for t in sampler.times)}" if sampler.times else f"shift {sampler.shift:g}"
        if sampler.grid != "wan":
            grid += f" on the grid {sampler.grid}"
        allowed = listed(sampler.allowed_steps)
        guidance, second = f"guidance {sampler.guidance:g}", ""
        if sampler.boundary is not None:
            second = f", two transformers that change at {sampler.boundary:g}"
            guidance += "" if sampler.guidance_2 is None else f" and {sampler.guidance_2:g}"
        return f"{sampler.rule}: {sampler.steps} steps (of {allowed}), {grid}, {guidance}{second}"


WAN = _Wan()
