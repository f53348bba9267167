"""The TMD student: a Wan transformer cut in two, a backbone run once per outer step and a flow head run several times.

TMD is "Transition Matching Distillation" (arXiv 2601.09881). Where the paper leaves a choice open, the class that makes
the choice says so.

Letters in shapes as in `tmd_ref.wan`; y is the velocity (noise - data) that the inner flow moves from its noise at
s = 1 to its value at s = 0.
"""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tmd_ref.checkpoint import incomplete
from tmd_ref.ops import at_least_float32, cast_for, rotary_operands
from tmd_ref.partial import writing
from tmd_ref.wan import (
    WanConfig,
    WanTransformer,
    embed_time,
    feed_forward,
    init_linears,
    modulate,
    patchify,
    rope_tables,
    time_sinusoid,
    token_grid,
    unpatchify,
)


@dataclass(frozen=True)
class TimeGrids:
    """The steps and time grids that a student is distilled for; the shifts are `shift_grid`'s. Defaults: the paper's.

    A shift of 10 suits videos of 30,000 tokens (TMD A.2). Where there are few, neighbouring pixels tell less about each
    other, and the middle time of that grid, 0.91, leaves the second step nearly as much to do as the first.
    Raises ValueError for what is no grid.
    """

    outer_steps: int = 2
    inner_steps: int = 2
    outer_shift: float = 10.0
    inner_shift: float = 10.0

    def __post_init__(self) -> None:
        whole = (self.outer_steps, self.inner_steps)
        shifts = (self.outer_shift, self.inner_shift)
        if not all(type(n) is int and 1 <= n <= 1000 for n in whole) or not all(1 <= shift <= 1000 for shift in shifts):
            raise ValueError(f"{self}: steps are whole numbers and shifts numbers from 1 to 1000.")


class GatedFusion(nn.Module):
    """Token features of the backbone and tokens of y, mixed by one learned gate (TMD A.1).

    The tokens of y first pass an AdaLN feed-forward block like the second half of a Wan block: it takes the last three
    of the six modulation vectors of s and adds its own table. Then h = features + sigmoid(gate)·(block(p) - features).
    Choices: interpolation (the paper's body text; a caption says addition); the gate is one number and starts at -5, so
    that the student starts within 0.7 % of its teacher; the feed-forward width is the teacher's.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.ffn = feed_forward(config.dim, config.ffn_dim)
        init_linears(self.ffn)
        self.modulation = nn.Parameter(torch.randn(1, 3, config.dim) / config.dim**0.5)
        self.gate = nn.Parameter(torch.full((1,), -5.0))

    def forward(self, features: Tensor, tokens: Tensor, e0: Tensor) -> Tensor:
        """features and tokens `[B, N, D]`, e0 `[B, 6, D]` of s. Returns `[B, N, D]`."""
        shift, scale, gate = (at_least_float32(self.modulation) + e0[:, 3:]).chunk(3, dim=1)
        h = cast_for(self.ffn, modulate(tokens, shift, scale, self.eps))
        q = torch.addcmul(tokens, at_least_float32(self.ffn(h)), gate)
        return features + at_least_float32(self.gate).sigmoid() * (q - features)


class ConcatFusion(nn.Module):
    """The paper's ablation: one linear map of [features ‖ tokens of y], at first the identity on the features and
    normal(0.01) on the tokens (TMD B.3)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * config.dim, config.dim)
        with torch.no_grad():
            self.linear.weight[:, : config.dim] = torch.eye(config.dim)
            self.linear.weight[:, config.dim :].normal_(std=0.01)
            self.linear.bias.zero_()

    def forward(self, features: Tensor, tokens: Tensor, e0: Tensor) -> Tensor:
        """As `GatedFusion`; e0 plays no part."""
        return at_least_float32(self.linear(cast_for(self.linear, torch.cat((features, tokens), -1))))


FUSIONS = {"gated": GatedFusion, "concat": ConcatFusion}


class Backbone(nn.Module):
    """The first L - H blocks: noisy latents at t to token features."""

    def __init__(self, wan: WanTransformer, head_blocks: int) -> None:
        """Takes over modules of `wan`; it does not copy them."""
        super().__init__()
        self.config = wan.config
        self.patch_embedding = wan.patch_embedding
        self.text_embedding = wan.text_embedding
        self.time_embedding = wan.time_embedding
        self.time_projection = wan.time_projection
        self.blocks = wan.blocks[: wan.config.num_layers - head_blocks]

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x `[B, 16, T, H, W]`, t `[B]` in 0..1, prompt_embeds `[B, S, E]`, rope tables `[N, head_dim/2]`.

        Returns features `[B, N, D]` (of block L - H) and context `[B, S, D]` (the embedded text, for the flow head).
        """
        _, e0 = embed_time(time_sinusoid(t, self.config.freq_dim), self.time_embedding, self.time_projection)
        return self.features(x, e0, prompt_embeds, cos, sin)

    def features(self, x: Tensor, e0: Tensor, prompt_embeds: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` computes once the time is embedded: e0 `[B, 6, D]`."""
        operands = rotary_operands(cos, sin, x.shape[0])
        context = self.text_embedding(cast_for(self.text_embedding, prompt_embeds))
        features = patchify(x, self.patch_embedding)
        for block in self.blocks:
            features = block(features, e0, context, operands)
        return features, at_least_float32(context)


class FlowHead(nn.Module):
    """Fusion, the last H blocks and Wan's output head: predicts the outer velocity from the inner state y at s.

    It sees t only through the features (TMD A.1). Its time conditioning is embed(s) + embed'(s - r). `embed` is the
    backbone's own time embedding, the same parameters ("reuse the teacher's time embedding"); the patch embedding is
    shared as well. `embed'` is a second one whose output layers start at zero while its first layer starts as the
    teacher's (the paper says zero-initialised; with all weights zero the first layer would get no gradient, and the
    function at the start is the same). The output norm sees s + (s - r) too, as FastGen does it for its second time.
    """

    def __init__(self, wan: WanTransformer, head_blocks: int, fusion: str) -> None:
        """Takes over modules of `wan`, except the interval embedding, which is a copy."""
        super().__init__()
        self.config = wan.config
        self.patch_embedding = wan.patch_embedding
        self.time_embedding = wan.time_embedding
        self.time_projection = wan.time_projection
        self.interval_embedding = copy.deepcopy(wan.time_embedding)
        self.interval_projection = copy.deepcopy(wan.time_projection)
        for output_layer in (self.interval_embedding[2], self.interval_projection[1]):
            for weight in output_layer.parameters():
                nn.init.zeros_(weight)
        self.fusion = FUSIONS[fusion](wan.config)
        self.blocks = wan.blocks[wan.config.num_layers - head_blocks :]
        self.head = wan.head

    def forward(
        self, y: Tensor, s: Tensor, r: Tensor, features: Tensor, context: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """y `[B, 16, T, H, W]` at s; s and r `[B]` in 0..1, r <= s the time to go to; features, context of `Backbone`.

        Returns the predicted velocity noise - data `[B, 16, T, H, W]`, head_theta of TMD Eq. 14.
        """
        operands = rotary_operands(cos, sin, y.shape[0])
        e, e0 = embed_time(time_sinusoid(s, self.config.freq_dim), self.time_embedding, self.time_projection)
        interval = time_sinusoid(s - r, self.config.freq_dim)
        e_interval, e0_interval = embed_time(interval, self.interval_embedding, self.interval_projection)
        h = self.fusion(features, patchify(y, self.patch_embedding), e0)
        e, e0 = e + e_interval, e0 + e0_interval
        context = cast_for(self.blocks[0].get_submodule("cross_attn"), context)
        for block in self.blocks:
            h = block(h, e0, context, operands)
        return unpatchify(self.head(h, e), token_grid(y, self.config.patch_size), self.config.patch_size)


def flow_head_step(
    head: Callable[..., Tensor],
    y: Tensor,
    noise: Tensor,
    s: Tensor,
    r: Tensor,
    features: Tensor,
    context: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """One inner step from s to r: y - (s - r)·u with the average velocity u = noise - head(...)  (TMD Eq. 13, 14).

    `noise` is the start of this inner rollout. Eq. 13 is printed with a plus; with it, a step from s = 1 to r = 0 would
    give 2·noise - head instead of head. Shapes as in `FlowHead.forward`. Returns y at r, `[B, 16, T, H, W]`.
    """
    u = noise - head(y, s, r, features, context, cos, sin)
    return y - (s - r).view(-1, 1, 1, 1, 1) * u


def check_head_blocks(config: WanConfig, head_blocks: int) -> None:
    """Raises ValueError if a cut before the last `head_blocks` blocks leaves one of the two parts without a block."""
    if not 1 <= head_blocks < config.num_layers:
        raise ValueError(
            f"head_blocks is {head_blocks}, the transformer has {config.num_layers} blocks: backbone and flow head "
            f"need at least one each, so choose 1 to {config.num_layers - 1}."
        )


class TMDStudent(nn.Module):
    """A backbone and a flow head that were one Wan transformer. `backbone` and `head` are usable alone.

    `grids`: what it is distilled for, which its file and its bundle carry as the defaults of sampling.
    """

    def __init__(
        self,
        config: WanConfig,
        head_blocks: int,
        fusion: str = "gated",
        wan: WanTransformer | None = None,
        grids: TimeGrids = TimeGrids(),
    ) -> None:
        """`wan`: the transformer whose modules the student takes over; None makes one with random weights.

        Raises ValueError if `head_blocks` does not leave both parts a block, or for an unknown fusion.
        """
        super().__init__()
        check_head_blocks(config, head_blocks)
        if fusion not in FUSIONS:
            raise ValueError(f"there is no fusion {fusion!r}: choose one of {', '.join(FUSIONS)}.")
        wan = wan or WanTransformer(config)
        self.config, self.head_blocks, self.fusion, self.grids = config, head_blocks, fusion, grids
        self.backbone = Backbone(wan, head_blocks)
        self.head = FlowHead(wan, head_blocks, fusion)

    @classmethod
    def from_teacher(
        cls, wan: WanTransformer, head_blocks: int, fusion: str = "gated", grids: TimeGrids = TimeGrids()
    ) -> "TMDStudent":
        """A student that starts as a copy of the teacher `wan`, which stays as it is. Raises as the constructor."""
        return cls(wan.config, head_blocks, fusion, copy.deepcopy(wan), grids)

    def rope(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Rope tables for latents of this size, on their device."""
        grid = token_grid(latents, self.config.patch_size)
        return rope_tables(*grid, self.config.head_dim, latents.device)

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, y: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """One pass through both parts: x at t and y at s to the head's velocity `[B, 16, T, H, W]`."""
        cos, sin = self.rope(x)
        features, context = self.backbone(x, t, prompt_embeds, cos, sin)
        return self.head(y, s, r, features, context, cos, sin)


def save_student(path: str | os.PathLike[str], student: TMDStudent) -> None:
    """Write weights and configuration as one safetensors file, complete or not at all, shared weights once."""
    from safetensors.torch import save_file

    sizes = {"wan": asdict(student.config), "head_blocks": student.head_blocks, "fusion": student.fusion}
    config = {**sizes, "grids": asdict(student.grids)}
    weights = {name: value.contiguous() for name, value in student.state_dict().items() if name not in _shared(student)}
    with writing(Path(path)) as partial:
        save_file(weights, partial, metadata={"config": json.dumps(config)})


def read_student(path: str | os.PathLike[str]) -> TMDStudent:
    """The student in a file written by `save_student`, without weights, on the meta device. Errors: `load_student`."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no student at {os.fspath(path)}: train one with tmd-distill, or check the path."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise incomplete(path, error) from error
    try:
        stored = json.loads(metadata["config"])
        arguments = WanConfig(**stored["wan"]), stored["head_blocks"], stored["fusion"]
        grids = TimeGrids(**stored.get("grids", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)} has no student configuration in its metadata ({error}): "
            "give a file written by tmd-distill or save_student."
        ) from error
    with torch.device("meta"):
        return TMDStudent(*arguments, grids=grids)


def load_student(path: str | os.PathLike[str]) -> TMDStudent:
    """Read a student written by `save_student`, on the CPU in the stored precision.

    Raises FileNotFoundError, or ValueError if the file holds something else.
    """
    from safetensors.torch import load_file

    student = read_student(path)
    missing, unexpected = student.load_state_dict(load_file(path), strict=False, assign=True)
    if unexpected or set(missing) != _shared(student):
        names = sorted({*unexpected, *(set(missing) - _shared(student))})
        raise ValueError(
            f"{os.fspath(path)} does not hold the weights of its own configuration, first at {names[0]!r}: "
            "the file was changed or comes from another version; save it again."
        )
    return student


def _shared(student: TMDStudent) -> set[str]:
    """Names under which the flow head holds weights of the backbone."""
    of_backbone = {id(weight) for weight in student.backbone.parameters()}
    return {f"head.{name}" for name, weight in student.head.named_parameters() if id(weight) in of_backbone}
