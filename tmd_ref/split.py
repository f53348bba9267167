"""A Wan transformer without inner flow, cut into the two parts that a bundle holds: its first L - H blocks, the rest.

Few-step checkpoints that are not TMD students, and the teacher itself, run on the same two graphs as a student; the
fusion is bypassed. What it is not: another model. Both parts together are exactly `WanTransformer.forward`.
"""

from torch import Tensor, nn

from tmd_ref.ops import cast_for, rotary_operands
from tmd_ref.student import Backbone, check_head_blocks
from tmd_ref.wan import WanTransformer, embed_time, rope_tables, time_sinusoid, token_grid, unpatchify


class VelocityHead(nn.Module):
    """The last H blocks and Wan's output head: token features to the velocity noise - data at the same t."""

    def __init__(self, wan: WanTransformer, head_blocks: int) -> None:
        """Takes over modules of `wan`; it does not copy them."""
        super().__init__()
        self.config = wan.config
        self.time_embedding = wan.time_embedding
        self.time_projection = wan.time_projection
        self.blocks = wan.blocks[wan.config.num_layers - head_blocks :]
        self.head = wan.head

    def forward(self, x: Tensor, t: Tensor, features: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x `[B, C, T, H, W]` gives only its shape; t `[B]` in 0..1; features `[B, N, D]` and context `[B, S, D]` of
        `Backbone`, rope tables `[N, head_dim/2]`. Returns the velocity `[B, C, T, H, W]`."""
        times = embed_time(time_sinusoid(t, self.config.freq_dim), self.time_embedding, self.time_projection)
        return self.velocity(x, times, features, context, cos, sin)

    def velocity(
        self, x: Tensor, times: tuple[Tensor, Tensor], features: Tensor, context: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """What `forward` computes once the time is embedded: `times` are e `[B, D]` and e0 `[B, 6, D]`."""
        operands = rotary_operands(cos, sin, x.shape[0])
        e, e0 = times
        h, context = features, cast_for(self.blocks[0].get_submodule("cross_attn"), context)
        for block in self.blocks:
            h = block(h, e0, context, operands)
        return unpatchify(self.head(h, e), token_grid(x, self.config.patch_size), self.config.patch_size)


class SplitWan(nn.Module):
    """`wan` as `backbone` and `head`, each usable alone.

    Names of parameters are made as in a TMD student: those of the official checkpoint behind `backbone.` (patch, text
    and time embedding, `blocks.0` to `blocks.(L-H-1)`) or `head.` (`blocks.(L-H)` becomes `head.blocks.0`, and
    `head.modulation` becomes `head.head.modulation`). The head holds the time embedding of the backbone, the same
    parameters under a second name.
    """

    parts: tuple[type[Backbone], type[VelocityHead]] = Backbone, VelocityHead

    def __init__(self, wan: WanTransformer, head_blocks: int) -> None:
        """Takes over modules of `wan`, also on the meta device. Raises ValueError if a part would have no block."""
        super().__init__()
        check_head_blocks(wan.config, head_blocks)
        self.config, self.head_blocks = wan.config, head_blocks
        backbone, head = self.parts
        self.backbone, self.head = backbone(wan, head_blocks), head(wan, head_blocks)

    def rope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rope tables for latents of this size, on their device."""
        return rope_tables(*token_grid(x, self.config.patch_size), self.config.head_dim, x.device)

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As `WanTransformer.forward`."""
        cos, sin = rope or self.rope(x)
        features, context = self.backbone(x, t, prompt_embeds, cos, sin)
        return self.head(x, t, features, context, cos, sin)
