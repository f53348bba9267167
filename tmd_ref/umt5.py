"""The encoder of UMT5, Wan2.1's text model, in the names of Wan's own checkpoint (`models_t5_umt5-xxl-enc-*.pth`).

It differs from T5 in one point: every layer has its own table of relative position biases. Float32 or bfloat16 only:
the residual stream of models of this family overflows float16.

Letters in shapes: B batch, S tokens, E width of the model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.ops import RMSNorm, at_least_float32, attention, cast_for

# Where distance buckets 1 to 15 begin. Distances below 8 have one each, then come ceil(8·16^(k/8)) for k = 0..7, as
# integers so that no engine's logarithm can round a distance of 16 or 32 into the wrong bucket.
_BUCKET_STARTS = (*range(1, 8), 8, 12, 16, 23, 32, 46, 64, 91)
_FAR = _BUCKET_STARTS[-1]


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of a UMT5 encoder."""

    vocab_size: int
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_buckets: int = 32
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_buckets != 32:
            raise ValueError(f"num_buckets is {self.num_buckets}: only UMT5's 32 (distances up to 128) is implemented.")


UMT5_CONFIGS = {
    "tiny": UMT5Config(vocab_size=512, dim=64, num_heads=4, head_dim=16, ffn_dim=128, num_layers=3),
    "umt5-xxl": UMT5Config(vocab_size=256_384, dim=4096, num_heads=64, head_dim=64, ffn_dim=10_240, num_layers=24),
}


def relative_buckets() -> list[int]:
    """Buckets of the offsets key - query from -91 to 91, beyond which nothing changes: 0..15 for <= 0, 16..31 above."""
    buckets = []
    for offset in range(-_FAR, _FAR + 1):
        distance = sum(abs(offset) >= start for start in _BUCKET_STARTS)
        buckets.append(distance + 16 * (offset > 0))
    return buckets


class RelativePositions(nn.Module):
    """Learned bias per head and per bucket of the distance between query and key."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, offsets: Tensor) -> Tensor:
        """offsets `[S, S]`, key - query clamped to -91..91, plus 91. Returns `[1, heads, S, S]`."""
        # A constant, not a buffer: a model that was built on the meta device has nothing to fill in.
        buckets = torch.tensor(relative_buckets(), device=offsets.device)
        return F.embedding(offsets, self.embedding(buckets)).permute(2, 0, 1).unsqueeze(0)


class Attention(nn.Module):
    """Self-attention with position bias; the scores are not scaled by 1/sqrt(head_dim)."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        v = self.v(x)
        return self.o(attention(self.q(x), self.k(x), v, self.num_heads, bias.to(v.dtype), scale=1.0))


class FeedForward(nn.Module):
    """Gated GELU: fc2(gelu(gate(x))·fc1(x))."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.ffn_dim, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.gate(x) * self.fc1(x))


class Block(nn.Module):
    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = RelativePositions(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """x `[B, S, E]`, offsets `[S, S]` for `RelativePositions`, mask `[B, 1, 1, S]` added to the scores."""
        x = x + at_least_float32(self.attn(cast_for(self.attn, self.norm1(x)), self.pos_embedding(offsets) + mask))
        return x + at_least_float32(self.ffn(cast_for(self.ffn, self.norm2(x))))


class UMT5Encoder(nn.Module):
    """Token ids to text features, as Wan2.1 uses them."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)
        init_weights(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids int64 `[B, S]`; attention_mask int64 `[B, S]`, 1 for tokens and 0 for padding.

        Returns prompt_embeds `[B, S, E]`. Rows of padding are zero: the encoder's own output there is not, and the
        diffusion model attends to them.
        """
        return self.encode(self.token_embedding(input_ids), attention_mask)

    def encode(self, token_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """As `forward`, from the rows of `token_embedding` for the ids, `[B, S, E]`, looked up by the caller."""
        x = at_least_float32(token_embeds)
        mask = (1 - attention_mask[:, None, None, :]).to(x.dtype) * torch.finfo(self.token_embedding.weight.dtype).min
        # Of the mask, which is 0 or 1, so that the offsets are no constants. Compilers fold those: the bias of every
        # pair of tokens in every layer would lie in memory, 1.6 GB of UMT5-XXL.
        zeros = attention_mask[0].clamp_min(1) - 1
        position = torch.arange(x.shape[1], device=x.device) + zeros
        offsets = (position[None, :] - position[:, None]).clamp(-_FAR, _FAR) + _FAR
        for block in self.blocks:
            x = block(x, offsets, mask)
        return self.norm(x) * attention_mask[:, :, None].to(x.dtype)


def init_weights(model: UMT5Encoder) -> None:
    """T5's initialisation: normal, with the spread that keeps unit variance, and a small q for the unscaled scores."""
    c = model.config
    nn.init.normal_(model.token_embedding.weight)
    spread = {
        "attn.q.weight": (c.dim * c.head_dim) ** -0.5,
        "attn.o.weight": (c.num_heads * c.head_dim) ** -0.5,
        "ffn.fc2.weight": c.ffn_dim**-0.5,
    }
    for block in model.blocks:
        for name, weight in block.named_parameters():
            if not name.startswith("norm"):
                nn.init.normal_(weight, std=spread.get(name, c.dim**-0.5))
