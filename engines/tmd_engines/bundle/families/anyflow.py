"""Wan transformers that are flow maps: steps from any time to any earlier one (AnyFlow, arXiv 2605.13724)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..fields import Shift, Text
from ..sections import SamplerInfo
from .family import Calls, Family
from .signature import CONTEXT, FEATURES, LATENTS, PROMPT, ROPE, TIME, Signature, update_signature
from .wan import WanModel


class AnyFlowSampler(SamplerInfo):
    """Any number of steps x + (r - t)·u, through times that fall from 1 to 0 in equal parts, warped by `shift`.

    `guidance` 1 means one pass per step, anything else a second one with `negative_prompt` (null: the empty prompt).
    """

    rule: Literal["euler"]
    shift: Shift
    guidance: Annotated[float, Field(ge=0.0, le=1000.0)]
    negative_prompt: Text | None = None


class _AnyFlow(Family):
    name = "anyflow"
    model, sampler = WanModel, AnyFlowSampler
    graphs = {  # noqa: RUF012  # read only
        "backbone": Signature(
            {"x": LATENTS, "t": TIME, "prompt_embeds": PROMPT, **ROPE, "r": TIME},
            {"features": FEATURES, "context": CONTEXT},
        ),
        "flow_head": Signature(
            {"x": LATENTS, "t": TIME, "features": FEATURES, "context": CONTEXT, **ROPE, "r": TIME},
            {"velocity": LATENTS},
        ),
        "update": update_signature(LATENTS),
    }

    def calls(self, steps: int, inner_steps: int, passes: int) -> Calls:
        return Calls(steps * passes, steps * passes)

    def describe(self, sampler: AnyFlowSampler) -> str:
        return (
            f"flow map: {sampler.steps} steps (of any number), shift {sampler.shift:g}, guidance {sampler.guidance:g}"
        )


ANYFLOW = _AnyFlow()
