"""Wan transformers without inner flow: a few-step checkpoint of another method, or the teacher itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ..fields import Shift, StepCount, Text, TimeLevel
from ..sections import ModelInfo, SamplerInfo, check_allowed, check_cut
from .family import Calls, Family, listed
from .rules import RULES
from .signature import CONTEXT, FEATURES, LATENTS, PROMPT, ROPE, TIME, Signature, update_signature


def _known_rule(rule: str) -> str:
    if rule not in RULES:
        raise ValueError(f"must be one of {', '.join(RULES)}")
    return rule


class WanModel(ModelInfo):
    """Both graphs are the transformer, cut in two."""

    _cut = model_validator(mode="after")(check_cut)


class WanSampler(SamplerInfo):
    """How to sample a model whose output is the velocity at the time it was asked for.

    `times` (noise to data, 0 left out): n steps go through the first n of them, then to 0; null: n times of `grid`,
    warped by `shift`; `grid` is Wan's own or that of a scheduler of diffusers. `allowed_steps` null: any number.
    `time_rounding` is what the network is told of 1000·t; the update itself uses t as it is. `init_scale` multiplies
    the first noise. `guidance` 1 means one pass per step, anything else a second one with `negative_prompt` (null: the
    empty prompt).
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allowed_steps is not None:
            check_allowed("steps", self.steps, self.allowed_steps)
        if self.times is not None:
            if any(later >= earlier for earlier, later in pairwise(self.times)):
                raise ValueError("times must be descending without repeats")
            if self.allowed_steps is None or max(self.allowed_steps) > len(self.times):
                raise ValueError(f"allowed_steps must be given, up to {len(self.times)}: there are as many times")
        return self


class _Wan(Family):
    name = "wan"
    model, sampler = WanModel, WanSampler
    graphs = {  # noqa: RUF012  # read only
        "backbone": Signature(
            {"x": LATENTS, "t": TIME, "prompt_embeds": PROMPT, **ROPE}, {"features": FEATURES, "context": CONTEXT}
        ),
        "flow_head": Signature(
            {"x": LATENTS, "t": TIME, "features": FEATURES, "context": CONTEXT, **ROPE}, {"velocity": LATENTS}
        ),
        "update": update_signature(LATENTS),
    }

    def calls(self, steps: int, inner_steps: int, passes: int) -> Calls:
        return Calls(steps * passes, steps * passes)

    def describe(self, sampler: WanSampler) -> str:
        grid = f"times {'/'.join(f'{t:g}' for t in sampler.times)}" if sampler.times else f"shift {sampler.shift:g}"
        if sampler.grid != "wan":
            grid += f" on the grid {sampler.grid}"
        allowed = listed(sampler.allowed_steps)
        return f"{sampler.rule}: {sampler.steps} steps (of {allowed}), {grid}, guidance {sampler.guidance:g}"


WAN = _Wan()
