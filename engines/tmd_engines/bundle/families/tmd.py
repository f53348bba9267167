"""Transition Matching Distillation (arXiv 2601.09881): a student with an inner flow, made for a few outer steps."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..fields import Shift, StepCount
from ..sections import ModelInfo, SamplerInfo, check_allowed, check_cut
from .family import Calls, Family, listed
from .signature import CONTEXT, FEATURES, LATENTS, PROMPT, ROPE, TIME, Signature, update_signature


class TmdModel(ModelInfo):
    """`fusion` is how the flow head takes in the features."""

    fusion: Literal["gated", "concat"]

    _cut = model_validator(mode="after")(check_cut)


class TmdSampler(SamplerInfo):
    """Defaults, and the step counts that the student was trained for. Times are dimensionless, 0 is data."""

    rule: Literal["euler"]
    inner_steps: StepCount
    allowed_steps: Annotated[tuple[StepCount, ...], Field(min_length=1, max_length=64)]
    allowed_inner_steps: Annotated[tuple[StepCount, ...], Field(min_length=1, max_length=64)]
    shift: Shift
    inner_shift: Shift
    t_max: Annotated[float, Field(gt=0.0, le=1.0)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_allowed("steps", self.steps, self.allowed_steps)
        check_allowed("inner_steps", self.inner_steps, self.allowed_inner_steps)
        return self


class _Tmd(Family):
    name = "tmd"
    model, sampler = TmdModel, TmdSampler
    graphs = {  # noqa: RUF012  # read only
        "backbone": Signature(
            {"x": LATENTS, "t": TIME, "prompt_embeds": PROMPT, **ROPE}, {"features": FEATURES, "context": CONTEXT}
        ),
        "flow_head": Signature(
            {"y": LATENTS, "noise": LATENTS, "s": TIME, "r": TIME, "features": FEATURES, "context": CONTEXT, **ROPE},
            {"y_next": LATENTS},
        ),
        "update": update_signature(LATENTS),
    }

    def inner_steps(self, sampler: TmdSampler) -> int:
        return sampler.inner_steps

    def passes(self, sampler: TmdSampler) -> int:
        return 1  # a student has the guidance of its teacher inside

    def calls(self, steps: int, inner_steps: int, passes: int) -> Calls:
        return Calls(steps * passes, steps * inner_steps * passes)

    def describe_model(self, model: TmdModel) -> str:
        return f"{super().describe_model(model)} ({model.fusion})"

    def describe(self, sampler: TmdSampler) -> str:
        return (
            f"{sampler.rule}: {sampler.steps} steps (of {listed(sampler.allowed_steps)}), {sampler.inner_steps} inner "
            f"steps (of {listed(sampler.allowed_inner_steps)}), shift {sampler.shift:g}, inner shift "
            f"{sampler.inner_shift:g}, t_max {sampler.t_max:g}"
        )


TMD = _Tmd()
