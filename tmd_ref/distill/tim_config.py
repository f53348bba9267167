"""Settings of the training of a Transition Model, as a YAML file with a section `tim`; what goes for all configs goes
for these (`tmd_ref.distill.config`).

`tim-tiny` is the small model of stills; `tim-tiny-flow` and `tim-tiny-meanflow` train the same network for the same
number of steps by plain flow matching and by MeanFlow, to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from tmd_ref.distill.config import Config, Data, Machine, Optimizer, Sources, _Part, read_values, validated
from tmd_ref.tim.model import TIM_CONFIGS, TiMConfig


class Guided(_Part):
    """The target with guidance built in: velocity·truth + weight·F(prompt) + the rest·F(null), of averaged weights."""

    weight: float = Field(ge=0)  # the guidance scale is 1 + weight, if truth is 1
    truth: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    after: int = Field(0, ge=0)  # training steps without


class Training(_Part):
    """One training run; the defaults are the paper's for text-to-image."""

    steps: PositiveInt
    batch: PositiveInt
    micro: PositiveInt | None = None
    optimizer: Optimizer
    dropout: float = Field(0.1, ge=0, le=1)
    mean: float = 0.0  # of the logit-normal times
    spread: float = Field(1.6, gt=0)
    instant_share: float = Field(0.5, ge=0, le=1)
    zero_share: float = Field(0.1, ge=0, le=1)
    derivative: Literal["difference", "exact"] = "difference"
    delta: float = Field(5e-3, gt=0)
    interval_weight: bool = True
    directional: bool = True
    adaptive: float | None = Field(1e-5, gt=0)  # c of L/(sg(L) + c); null: L itself
    guided: Guided | None = None
    seed: int = 12

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if self.instant_share + self.zero_share > 1:
            raise ValueError("instant_share and zero_share are shares of one batch: together at most 1")
        if self.guided is not None and not self.optimizer.ema:
            raise ValueError("guided takes its target from averaged weights: set optimizer.ema")
        return self


class Evaluation(_Part):
    captions: PositiveInt = 208
    seed: int = 7
    steps: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32, 64)
    guidance: float = Field(default=1.0, ge=0)
    interval: tuple[float, float] = (0.0, 1.0)  # of t with guidance, without its ends
    instant: bool = False  # ask for F at r = t: for a model that knows no other r


class TiMRun(_Part):
    """A whole training."""

    model: str
    data: Data
    sources: Sources = Sources()
    tim: Training
    evaluate: Evaluation = Evaluation()
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _fits(self) -> TiMRun:
        trained = [name for name, config in TIM_CONFIGS.items() if config.text_dim == 64]
        if self.model not in trained:
            raise ValueError(f"model {self.model!r}: choose one of {', '.join(trained)}")
        if self.data.frames != 1:
            raise ValueError(f"data.frames {self.data.frames}: a Transition Model makes stills, 1 frame")
        return self

    @property
    def network(self) -> TiMConfig:
        return TIM_CONFIGS[self.model]


def load_any(name: str, overrides: Sequence[str] = ()) -> Config | TiMRun:
    """As `config.load_config`, for either kind of config. Raises ConfigError."""
    path, values, places = read_values(name, overrides)
    kind: type[Any] = TiMRun if "tim" in values else Config
    found: Config | TiMRun = validated(kind, path, values, places)
    return found
