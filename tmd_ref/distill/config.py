"""Settings of a distillation as a YAML file: typed, checked before anything starts, every error with its line.

Three configs of distillations come with the package: `tiny` (the built-in model), `wan1.3b` and `wan14b` (the paper's
values); those of Transition Models are in `tim_config`. A config file may begin with `base: NAME` and give only what
differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from tmd_ref.distill.trainer import Schedule
from tmd_ref.student import TimeGrids
from tmd_ref.wan import WAN_CONFIGS, WanConfig

FOLDER = Path(__file__).parent / "configs"
MODELS = [name for name, wan in WAN_CONFIGS.items() if wan.in_channels == 16]  # data is encoded by Wan2.1's VAE
Share = Field(ge=0, le=1)
Kind = TypeVar("Kind", bound=BaseModel)
Shift = Field(ge=1)


class ConfigError(ValueError):
    """A config that cannot be used; the message names file, line and key."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(_Part):
    """A `Schedule` in all but the number of steps."""

    lr: float = Field(gt=0)
    warmup: int = Field(0, ge=0)
    final: float = Field(1.0, ge=0, le=1)  # 1: constant, as in the paper
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(10.0, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)

    def schedule(self, steps: int) -> Schedule:
        return Schedule(steps=steps, **self.model_dump())


class Data(_Part):
    size: tuple[PositiveInt, PositiveInt]  # height, width in pixels
    frames: PositiveInt
    fps: float = Field(16.0, gt=0)
    clips: PositiveInt | None = None  # rendered scenes; None: every video of the list
    shard: PositiveInt = 1000
    negative_prompt: str = ""
    seed: int = 4

    @model_validator(mode="after")
    def _fits(self) -> Data:
        if self.size[0] % 16 or self.size[1] % 16:
            raise ValueError(f"size {list(self.size)}: height and width must be multiples of 16")
        if self.frames % 4 != 1:
            raise ValueError(f"frames {self.frames}: must be 4k + 1, such as 17 or 81")
        return self

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(T, h, w) of the latents."""
        return 1 + (self.frames - 1) // 4, self.size[0] // 8, self.size[1] // 8


class Sources(_Part):
    """Weights that are given. A file name alone is looked up in the run folder; see `tmd_ref.distill.weights`.

    `student` is a few-step transformer (rCM, FastWan) that the student starts from; None: from the teacher.
    `pretrained` is what the training of a teacher or a Transition Model goes on from; None: from scratch.
    """

    teacher: str = "teacher.safetensors"
    student: str | None = None
    pretrained: str | None = None
    vae: str = "vae.safetensors"
    text_encoder: str = "umt5.safetensors"
    tokenizer: str = "tokenizer.model"


class Student(_Part):
    """What is distilled: a TMD student, or the DMD2-v baseline without flow head (head_blocks 0)."""

    head_blocks: int = Field(ge=0)
    fusion: Literal["gated", "concat"] = "gated"
    outer_steps: PositiveInt = 2  # M
    inner_steps: PositiveInt = 2  # N
    outer_shift: float = Shift
    inner_shift: float = Shift

    @property
    def is_tmd(self) -> bool:
        return self.head_blocks > 0

    @property
    def grids(self) -> TimeGrids:
        return TimeGrids(self.outer_steps, self.inner_steps, self.outer_shift, self.inner_shift)


class Teacher(_Part):
    steps: PositiveInt
    batch: PositiveInt
    optimizer: Optimizer
    shift: float = Shift
    dropout: float = Share
    adaptive: float | None = Field(None, gt=0)
    seed: int = 5


class Pairs(_Part):
    """Noise-clip pairs of the teacher for the one-step baseline's warm-up."""

    count: PositiveInt = 10_000
    sampler_steps: PositiveInt = 50
    shift: float = Shift
    guidance: float = Field(5.0, ge=0)
    skip_layers: tuple[int, ...] = ()
    seed: int = 11


class Stage1(_Part):
    """TM-MeanFlow, plain TM or, for the one-step baseline, knowledge distillation (`kd`)."""

    objective: Literal["meanflow", "tm", "kd"] = "meanflow"
    steps: PositiveInt
    batch: PositiveInt
    micro: PositiveInt | None = None
    optimizer: Optimizer
    guidance: float = Field(3.0, ge=0)
    dropout: float = Share
    instant_share: float = Share
    derivative: Literal["difference", "exact"] = "difference"
    delta: float = Field(5e-3, gt=0)
    weight_constant: float = Field(1.0, gt=0)
    average: Literal["noise", "state"] = "noise"
    shift: float = Shift
    pairs: Pairs | None = None
    seed: int = 6


class Stage2Settings(_Part):
    """DMD2-v with rollout."""

    steps: PositiveInt
    batch: PositiveInt
    micro: PositiveInt | None = None
    generator: Optimizer
    fake: Optimizer
    discriminator: Optimizer
    guidance: float = Field(5.0, ge=0)
    gan_weight: float = Field(0.03, ge=0)  # 0: no discriminator
    depths: tuple[int, ...]
    reduction: PositiveInt = 1
    ratio: int = Field(4, ge=1)
    normaliser: Literal["x0", "score"] = "score"
    rollout: bool = True  # False: one inner step in training whatever inner_steps says (the paper's ablation)
    shift: float = Shift
    seed: int = 10


class Evaluate(_Part):
    captions: PositiveInt = 208
    seed: int = 7
    teacher_steps: PositiveInt = 50
    shift: float = Shift
    guidance: float = Field(ge=0)


class Machine(_Part):
    """How the work is spread; no part of the recipe's result beyond rounding."""

    bf16: bool = False
    recompute: bool = False  # activation checkpointing
    compile: bool = False  # of the teacher's training, unless it is sharded
    shard: bool = True  # weights over several processes; false: each holds all of them, which is faster for a small one
    log_every: PositiveInt = 50
    save_every: PositiveInt = 250


class Config(_Part):
    """A whole distillation."""

    model: str
    data: Data
    sources: Sources = Sources()
    student: Student
    teacher: Teacher | None = None  # None: the teacher is given
    stage1: Stage1
    stage2: Stage2Settings
    evaluate: Evaluate
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.model not in MODELS:
            raise ValueError(f"model {self.model!r}: choose one of {', '.join(MODELS)}")
        layers = self.wan.num_layers
        if self.student.head_blocks >= layers:
            raise ValueError(f"student.head_blocks {self.student.head_blocks}: {self.model} has {layers} blocks")
        if not self.stage2.depths or not all(0 <= depth < layers for depth in self.stage2.depths):
            raise ValueError(f"stage2.depths {list(self.stage2.depths)}: blocks of {self.model} are 0 to {layers - 1}")
        if self.stage1.objective == "kd" and self.student.is_tmd:
            raise ValueError("stage1.objective kd belongs to the baseline (student.head_blocks 0)")
        if self.stage1.objective == "kd" and (self.stage1.pairs is None or self.student.outer_steps != 1):
            raise ValueError("stage1.objective kd needs stage1.pairs and student.outer_steps 1")
        return self

    @property
    def wan(self) -> WanConfig:
        return WAN_CONFIGS[self.model]


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """A packaged config by name or a YAML file by path, with overrides "stage2.steps=100" applied.

    Raises ConfigError.
    """
    return validated(Config, *read_values(name, overrides))


def read_values(name: str, overrides: Sequence[str]) -> tuple[Path, dict[str, Any], dict[tuple[str, ...], str]]:
    """The file that `name` means, its values with `overrides`, and the place of every key. Raises ConfigError."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ConfigError(f"there is no config {name!r}: give a YAML file or one of {known}.")
    values, lines = _read(path)
    base = values.pop("base", None)
    if base is not None:
        inherited, _ = _read(
            FOLDER / f"{base}.yaml" if (FOLDER / f"{base}.yaml").is_file() else path.parent / str(base)
        )
        values = _merge(inherited, values)
    places = {keys: f"{path}, line {line}" for keys, line in lines.items()}
    for override in overrides:
        values = _merge(values, _parse(override))
        given = tuple(override.partition("=")[0].split("."))
        places = {keys: place for keys, place in places.items() if keys[: len(given)] != given}
        places[given] = f"--set {override}"
    return path, values, places


def validated(kind: type[Kind], path: Path, values: dict[str, Any], places: Mapping[tuple[str, ...], str]) -> Kind:
    """A config of `kind` from the values of a file and of `--set`. Raises ConfigError that names the line, or which."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        keys = tuple(str(key) for key in found["loc"])
        where = next((places[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in places), str(path))
        message = {"extra_forbidden": "unknown key", "missing": "missing"}.get(found["type"], found["msg"])
        given = f" (given: {found['input']!r})" if found["type"] not in ("missing",) and keys else ""
        raise ConfigError(f"{where}: {'.'.join(keys) or 'config'}: {message}{given}.") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The values of a YAML file and the line of every key. Raises ConfigError, also for a key given twice."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                place = (*at, str(key.value))
                if place in lines:
                    raise ConfigError(f"{path}, line {key.start_mark.line + 1}: {'.'.join(place)} is given twice.")
                lines[place] = key.start_mark.line + 1
                walk(value, place)

    try:
        text = path.read_text()
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            walk(root, ())
        values = yaml.safe_load(text)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(values).__name__}.")
    return values, lines


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse(override: str) -> dict[str, Any]:
    """ "stage2.steps=100" to {"stage2": {"steps": 100}}."""
    keys, equals, text = override.partition("=")
    if not equals or not keys:
        raise ConfigError(f"--set {override!r}: write KEY=VALUE, such as stage2.steps=100.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {error}") from error
    for key in reversed(keys.split(".")):
        value = {key: value}
    return value
