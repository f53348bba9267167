"""A TiM in the two parts that a bundle holds: what depends on the prompt alone, and one transition."""

import torch
from torch import Tensor, nn

from tmd_ref.tim.model import CrossAttention, TiM, keys_values, velocity


class TextSide(nn.Module):
    """Keys and values of one block's cross-attention."""

    def __init__(self, cross: CrossAttention) -> None:
        super().__init__()
        self.kv, self.k_norm = cross.kv, cross.k_norm

    def forward(self, text: Tensor) -> Tensor:
        return keys_values(text, self.kv, self.k_norm)


class Prompt(nn.Module):
    """Once per prompt: `TiM.context`."""

    def __init__(self, tim: TiM) -> None:
        super().__init__()
        self.y_embedder = tim.y_embedder
        crosses = [block.cross_attn for block in tim.blocks]
        self.sides = nn.ModuleList(TextSide(cross) for cross in crosses if isinstance(cross, CrossAttention))

    def forward(self, condition: Tensor) -> Tensor:
        """Text features `[B, M, E]` to `[L, B, M, 2·D]`; class numbers `[B]` to `[B, D]`."""
        embedded = self.y_embedder(condition)
        return torch.stack([side(embedded) for side in self.sides]) if len(self.sides) else embedded


class Transition(nn.Module):
    """Once per step: from x at t to x at r, with guidance between the rows of the batch."""

    def __init__(self, tim: TiM) -> None:
        super().__init__()
        self.config = tim.config
        self.x_embedder, self.t_embedder, self.delta_embedder = tim.x_embedder, tim.t_embedder, tim.delta_embedder
        self.blocks, self.final_layer = tim.blocks, tim.final_layer

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, guidance: Tensor, context: Tensor, rope_cos: Tensor, rope_sin: Tensor
    ) -> Tensor:
        """x_r = x - (t - r)·(guidance @ F), F of every row.

        x `[B, C, 1, H, W]`, a video of one latent frame; t and r `[B]`; guidance `[B, B]`: the identity for rows that
        have nothing to do with each other, and for a picture with and without its prompt in two rows of equal x
        [[g, 1 - g], [g, 1 - g]], which keeps them equal. context of `Prompt`, rope tables `[N, head_dim/2]`.
        Returns `[B, C, 1, H, W]`.
        """
        f = velocity(self, x.squeeze(2), t, r, context, rope_cos, rope_sin)
        mixed = (guidance @ f.flatten(1)).view_as(x)
        return x - (t - r).view(-1, 1, 1, 1, 1) * mixed


class SplitTiM(nn.Module):
    """`tim` as `prompt` and `transition`, each usable alone; `tim` itself is used up."""

    def __init__(self, tim: TiM) -> None:
        """Takes over modules of `tim`, also on the meta device."""
        super().__init__()
        self.config = tim.config
        self.prompt, self.transition = Prompt(tim), Transition(tim)
        for block in self.transition.blocks:
            if isinstance(block.cross_attn, CrossAttention):  # its text side is the prompt's now
                del block.cross_attn.kv, block.cross_attn.k_norm


def uncut(name: str) -> str:
    """The name in `TiM` of a parameter of `SplitTiM`."""
    if name.startswith("prompt.sides."):
        _, _, number, rest = name.split(".", 3)
        return f"blocks.{number}.cross_attn.{rest}"
    return name.partition(".")[2]
