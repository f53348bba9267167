"""The text model of Gemma 3 (arXiv 2503.19786) up to its last hidden states: how Transition Models read a prompt.

Weights are called as in the released files, but for `blocks` (there `layers`) and `token_embedding` (`embed_tokens`).
Rotary embedding turns neighbouring pairs of a head, as everywhere here, and Gemma's own turns its halves:
`from_halves` reorders the rows of released weights, which changes no score. Float32 or bfloat16 only.

Letters in shapes: B batch, S tokens, E width of the model, H heads, K heads of keys and values, D width of a head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.ops import at_least_float32, attention, cast_for, rms_norm, rotary_embedding, rotary_operands


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes, and what else differs among models of the family.

    `sliding`: per block, whether a token sees only the `window` tokens up to itself; such blocks count positions with
    `local_theta`, the others with `theta` and positions divided by `rope_factor`. Scores are divided by
    sqrt(`query_scalar`). `embedding_factor` multiplies rows of the embedding: sqrt(dim), rounded to their type.
    """

    vocab_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding: tuple[bool, ...]
    window: int
    embedding_factor: float
    query_scalar: float = 256.0
    theta: float = 1e6
    local_theta: float = 1e4
    rope_factor: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_heads} heads of {self.head_dim} values do not share {self.num_kv_heads} heads of keys."
            )

    def frequencies(self, sliding: bool) -> list[float]:
        """Radians per position of the D/2 pairs of a head."""
        theta, factor = (self.local_theta, 1.0) if sliding else (self.theta, self.rope_factor)
        return [theta ** (-2 * k / self.head_dim) / factor for k in range(self.head_dim // 2)]


class Norm(nn.Module):
    """x / rms(x) · (1 + weight) over the last axis, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + at_least_float32(self.weight), self.eps)


class Attention(nn.Module):
    """Self-attention of H heads, groups of which share keys and values."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.scale = config.query_scalar**-0.5
        inner, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, inner, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(config.dim, shared, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(inner, config.dim, bias=False)
        self.q_norm, self.k_norm = (Norm(config.head_dim, config.eps) for _ in range(2))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """x `[B, S, E]`, `rope` from `rotary_operands`, bias `[1, 1, S, S]` added to the scores."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).flatten(2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, -1))).flatten(2)
        k, v = self._repeated(rotary_embedding(k, rope, self.kv_heads)), self._repeated(self.v_proj(x))
        q = rotary_embedding(q, rope, self.heads)
        return self.o_proj(attention(q, k, v, self.heads, bias.to(v.dtype), self.scale))

    def _repeated(self, x: Tensor) -> Tensor:
        """`[B, S, K·D]` with every head as often as it is shared: `[B, S, H·D]`.

        Put together and not expanded: ONNX Runtime takes a width that a graph computes for 0 when it sizes attention.
        """
        times = self.heads // self.kv_heads
        heads = [x] if self.kv_heads == 1 else x.chunk(self.kv_heads, dim=-1)
        return torch.cat([head for head in heads for _ in range(times)], dim=-1) if times > 1 else x


class FeedForward(nn.Module):
    """Gated GELU: down(gelu(gate(x))·up(x))."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.dim, config.ffn_dim, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each with a norm in front of it and one behind. `kind`: 1 if sliding, else 0."""

    def __init__(self, config: GemmaConfig, sliding: bool) -> None:
        super().__init__()
        self.kind = int(sliding)
        self.self_attn, self.mlp = Attention(config), FeedForward(config)
        self.input_layernorm, self.post_attention_layernorm = (Norm(config.dim, config.eps) for _ in range(2))
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = (
            Norm(config.dim, config.eps) for _ in range(2)
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """x `[B, S, E]` in float32; the rest as for `Attention`."""
        y = self.self_attn(cast_for(self.self_attn, self.input_layernorm(x)), rope, bias)
        return self.feed_forward(x + self.post_attention_layernorm(y))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half alone, which is all that a token goes through if its attention gives zeros."""
        y = self.mlp(cast_for(self.mlp, self.pre_feedforward_layernorm(x)))
        return x + self.post_feedforward_layernorm(y)


class GemmaEncoder(nn.Module):
    """Token ids to text features: the hidden states behind the last norm. Causal, without padding."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, sliding) for sliding in config.sliding)
        self.norm = Norm(config.dim, config.eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 `[B, S]`. Returns prompt_embeds `[B, S, E]`."""
        return self.encode(self.token_embedding(input_ids))

    def encode(self, token_embeds: Tensor) -> Tensor:
        """As `forward`, from the rows of `token_embedding` for the ids, `[B, S, E]`, looked up by the caller."""
        x = self._scaled(token_embeds)
        contexts = self._contexts(x)
        for block in cast(Iterable[Block], self.blocks):
            x = block(x, *contexts[block.kind])
        return self.norm(x)

    def null_features(self, rows: Tensor, length: int, blocks: Iterable[Block] | None = None) -> Tensor:
        """Features `[length, E]` of the empty prompt, padded, as transformers has them with FlashAttention-2.

        `rows` `[2, E]` are those of the embedding for the first token and for padding; `blocks` are this encoder's own,
        filled one after the other by a caller with little memory. That attention leaves padding out and gives it zeros.
        So the first token sees itself alone, and padding passes through the feed-forward halves only, where no position
        enters: its rows are all alike.
        """
        first, pad = self._scaled(rows).split(1)
        contexts = self._contexts(first[None])
        for block in cast(Iterable[Block], self.blocks) if blocks is None else blocks:
            first, pad = block(first[None], *contexts[block.kind])[0], block.feed_forward(pad)
        return torch.cat((self.norm(first), self.norm(pad).expand(length - 1, -1)))

    def _scaled(self, token_embeds: Tensor) -> Tensor:
        return at_least_float32(token_embeds) * self.config.embedding_factor

    def _contexts(self, x: Tensor) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        """(rope, bias) of full and of sliding attention, for x `[B, S, E]`."""
        batch, tokens, _ = x.shape
        position = torch.arange(tokens, device=x.device)
        least = torch.finfo(self.token_embedding.weight.dtype).min
        # Of query i to key j, 1 where it must not look.
        ahead = (position[None, :] - position[:, None]).clamp(0, 1)
        out_of_window = (position[:, None] - position[None, :] - (self.config.window - 1)).clamp(0, 1)
        contexts = []
        for sliding, hidden in ((False, ahead), (True, ahead + out_of_window)):
            frequencies = torch.tensor(self.config.frequencies(sliding), dtype=torch.float32, device=x.device)
            angles = position.to(torch.float32)[:, None] * frequencies
            rope = rotary_operands(angles.cos().to(x.dtype), angles.sin().to(x.dtype), batch)
            contexts.append((rope, (hidden.to(x.dtype) * least)[None, None]))
        return contexts


def from_halves(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """A released weight with the rows of its heads in the order 0, D/2, 1, D/2 + 1, ...; one without heads as it is.

    `name` is that of the weight in the model, such as "blocks.0.self_attn.q_proj.weight".
    """
    *_, owner, _ = name.rsplit(".", 2)
    if owner not in ("q_proj", "k_proj", "q_norm", "k_norm"):
        return weight
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
