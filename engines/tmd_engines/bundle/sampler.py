"""How a manifest says that a model is sampled: one type per family of update rules."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .fields import Part, Shift, StepCount, Text, TimeLevel

MAX_RHO = 10.0


class TransitionSampler(Part):
    """How to sample a TMD student: defaults, and the step counts that it was trained for. Times are dimensionless, 0 is
    data."""

    rule: Literal["transition"]
    steps: StepCount
    inner_steps: StepCount
    allowed_steps: Annotated[tuple[StepCount, ...], Field(min_length=1, max_length=64)]
    allowed_inner_steps: Annotated[tuple[StepCount, ...], Field(min_length=1, max_length=64)]
    shift: Shift
    inner_shift: Shift
    t_max: Annotated[float, Field(gt=0.0, le=1.0)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_allowed("steps", self.steps, self.allowed_steps)
        _check_allowed("inner_steps", self.inner_steps, self.allowed_inner_steps)
        return self


class VelocitySampler(Part):
    """How to sample a model of kind "wan", whose output is the velocity at the time it was asked for.

    `times` (noise to data, 0 left out): n steps go through the first n of them, then to 0; null: Wan's own grid of n
    times, warped by `shift`. `allowed_steps` null: any number. `time_rounding` is what the network is told of 1000·t;
    the update itself uses t as it is. `init_scale` multiplies the first noise. `guidance` 1 means one pass per step,
    anything else a second one with `negative_prompt` (null: the empty prompt).
    """

    rule: Literal["euler", "renoise", "unipc"]
    steps: StepCount
    allowed_steps: Annotated[tuple[StepCount, ...], Field(min_length=1, max_length=1000)] | None = None
    shift: Shift
    times: Annotated[tuple[TimeLevel, ...], Field(min_length=1, max_length=1000)] | None = None
    time_rounding: Literal["none", "integer", "nearest", "bfloat16"]
    init_scale: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    guidance: Annotated[float, Field(ge=0.0, le=1000.0)]
    negative_prompt: Text | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allowed_steps is not None:
            _check_allowed("steps", self.steps, self.allowed_steps)
        if self.times is not None:
            if any(later >= earlier for earlier, later in pairwise(self.times)):
                raise ValueError("times must be descending without repeats")
            if self.allowed_steps is None or max(self.allowed_steps) > len(self.times):
                raise ValueError(f"allowed_steps must be given, up to {len(self.times)}: there are as many times")
        return self


class FlowMapSampler(Part):
    """How to sample a model of kind "tim": any number of steps, each a jump from t to the next time of a falling list.

    `guidance` g mixes F of the prompt and of none, F- + g·(F+ - F-), while low < t < high of `guidance_interval`; 1
    means one row per picture. `negative_prompt` null: the empty prompt. `rho` above 0 puts fresh noise in the place of
    some of x's in every step but the first and the last.
    """

    rule: Literal["flow_map"]
    steps: StepCount
    guidance: Annotated[float, Field(ge=0.0, le=1000.0)]
    guidance_interval: tuple[
        Annotated[float, Field(ge=0.0, le=1.0)],
        Annotated[float, Field(gt=0.0, le=2.0)],
    ] = (0.0, 1.0)
    negative_prompt: Text | None = None
    rho: Annotated[float, Field(ge=0.0, le=MAX_RHO)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval {[low, high]} is empty")
        return self


def _check_allowed(name: str, default: int, allowed: tuple[int, ...]) -> None:
    if list(allowed) != sorted(set(allowed)):
        raise ValueError(f"allowed_{name} must be ascending without repeats")
    if default not in allowed:
        raise ValueError(f"{name} {default} is not among allowed_{name} {list(allowed)}")


SamplerInfo = TransitionSampler | VelocitySampler | FlowMapSampler
RULES = ("transition", "euler", "renoise", "unipc", "flow_map")
KIND_OF_RULE = {"transition": "tmd", "flow_map": "tim"}  # all others: "wan"
