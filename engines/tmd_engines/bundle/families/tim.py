"""Transition Models (arXiv 2509.04394): stills, in jumps from any time to any earlier one."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..fields import Count, Text
from ..sections import ModelInfo, SamplerInfo
from .family import Calls, Family
from .signature import PASSED, PROMPT, ROPE, STILL, TIME, Signature, Tensor, update_signature

MAX_RHO = 10.0


class TimModel(ModelInfo):
    """All blocks are in `flow_head`. `rope` says what the rotary tables count; `classes`, how many numbered classes the
    model draws in place of a prompt (null: it takes a prompt)."""

    rope: Literal["index", "grid"]
    classes: Count | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.head_blocks != self.num_layers:
            raise ValueError(f"head_blocks {self.head_blocks} is not num_layers {self.num_layers}, as in family 'tim'")
        return self


class TimSampler(SamplerInfo):
    """Any number of steps, each a jump from t to the next time of a falling list.

    `guidance` g mixes F of the prompt and of none, F- + g·(F+ - F-), while low < t < high of `guidance_interval`; 1
    means one row per picture. `negative_prompt` null: the empty prompt. `rho` above 0 puts fresh noise in the place of
    some of x's in every step but the first and the last.
    """

    rule: Literal["flow_map"]
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


class _Tim(Family):
    name = "tim"
    model, sampler = TimModel, TimSampler
    makes_stills = True
    keeps_prompt_length = True
    graphs = {  # noqa: RUF012  # read only
        "backbone": Signature(
            {
                "prompt_embeds": Tensor(PROMPT.shape, when="prompt"),
                "labels": Tensor(("batch",), "int64", "classes"),
            },
            {"context": Tensor(PASSED)},
        ),
        "flow_head": Signature(
            {
                "x": STILL,
                "t": TIME,
                "r": TIME,
                "guidance": Tensor(("batch", "batch")),
                "context": Tensor(PASSED),
                **ROPE,
            },
            {"x_next": STILL},
        ),
        "update": update_signature(STILL),
    }

    def classes(self, model: TimModel) -> int | None:
        return model.classes

    def rows(self, sampler: TimSampler) -> tuple[int, ...]:
        return (1,) if sampler.guidance == 1 else (1, 2)

    def calls(self, steps: int, inner_steps: int, passes: int) -> Calls:
        return Calls(1, steps, rows=passes)

    def describe(self, sampler: TimSampler) -> str:
        low, high = sampler.guidance_interval
        rho = f", rho {sampler.rho:g}" if sampler.rho else ""
        guidance = f"guidance {sampler.guidance:g} for {low:g} < t < {high:g}"
        return f"{sampler.rule}: {sampler.steps} steps (of any number), {guidance}{rho}"


TIM = _Tim()
