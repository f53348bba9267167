"""TiM's transformer: the average velocity F(x_t, t, r) between two times, so that x_r = x_t - (t - r)·F.

Parameter names are those of the released files, less their `projector`, which only training's alignment loss uses.
Written for clean export: rotary embedding from real tables, attention and norms as single ONNX nodes.

Letters in shapes: B batch, C latent channels, H and W latent height and width, N = (H/p)·(W/p) tokens, M text tokens,
E width of the text features, D width of the model, L blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.ops import at_least_float32, attention, cast_for, rotary_embedding, rotary_operands
from tmd_ref.wan import LayerNorm, modulate, without_autocast

RopeOperands = tuple[Tensor, Tensor]
EPS = 1e-6  # of the norms without weights
EPS_AFFINE = 1e-5  # of those with


@dataclass(frozen=True)
class TiMConfig:
    """Sizes of a TiM. Either `text_dim`, the width of text features, or `num_classes` says what it is conditioned on.

    `modulation_dim` is the inner width of the low-rank modulations, `text_len` the most text tokens (0 for classes).
    Raises ValueError when sizes do not fit together.
    """

    dim: int
    num_heads: int
    num_layers: int
    in_channels: int
    patch: int
    modulation_dim: int
    text_dim: int | None = None
    text_len: int = 0
    num_classes: int | None = None
    freq_dim: int = 256

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads: rotary embedding in two directions needs a head size "
                "that is a multiple of 4."
            )
        if (self.text_dim is None) == (self.num_classes is None):
            raise ValueError("a TiM is conditioned on text or on classes: give text_dim or num_classes, and not both.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Two thirds of 4·D, because SwiGLU has three matrices where a plain layer has two."""
        return 4 * self.dim * 2 // 3

    @property
    def out_channels(self) -> int:
        return self.in_channels


_XL = {"dim": 1152, "num_heads": 16, "num_layers": 28, "modulation_dim": 384}
TIM_CONFIGS = {
    "tim-t2i": TiMConfig(**_XL, in_channels=32, patch=1, text_dim=1152, text_len=256),
    "tim-c2i-256": TiMConfig(**_XL, in_channels=4, patch=2, num_classes=1000),
    "tim-c2i-512": TiMConfig(**_XL, in_channels=32, patch=1, num_classes=1000),
    "tim-tiny": TiMConfig(
        dim=128, num_heads=4, num_layers=8, modulation_dim=48, in_channels=16, patch=2, text_dim=64, text_len=32
    ),
}


def rope_tables(
    grid_h: int, grid_w: int, head_dim: int, device: torch.device | str | None = None, rope: str = "index"
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of a grid of tokens (rows first); half of a head per position.

    `rope`: "index" is what the released code computes and the weights were trained with: token k has the positions
    (k mod grid_h, k div grid_h), which are column and row only if the grid is square. "grid" is (column, row) always.
    Every half has the frequencies 10000^(-2j/(head_dim/2)). Angles are computed in float64.

    Returns two float32 `[grid_h·grid_w, head_dim/2]`. Raises ValueError for another `rope`.
    """
    if rope not in ("index", "grid"):
        raise ValueError(f"rope {rope!r}: choose index (as the weights were trained) or grid (true columns and rows).")
    token = torch.arange(grid_h * grid_w, dtype=torch.float64, device=device)
    side = grid_h if rope == "index" else grid_w
    half = head_dim // 2
    ladder = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64, device=device) / half)
    angle = torch.cat([position[:, None] * ladder for position in (token % side, token // side)], -1)
    return angle.cos().float(), angle.sin().float()


def time_sinusoid(t: Tensor, freq_dim: int) -> Tensor:
    """[cos ‖ sin] of t·10000^(-k/(freq_dim/2)); unlike Wan's, t is not multiplied by 1000. t `[B]`; `[B, freq_dim]`."""
    half = freq_dim // 2
    ladder = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    t = at_least_float32(t)
    angle = t[:, None] * ladder.to(t.dtype)
    return torch.cat((angle.cos(), angle.sin()), -1)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1_g x)·fc1_x x), in the type of its weights; the result in at least float32."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        x = cast_for(self, x)
        return at_least_float32(self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x)))


class TimeEmbedding(nn.Module):
    """A time, or a difference of times, to a vector, outside autocast."""

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.mlp = nn.Sequential(nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))

    def forward(self, t: Tensor) -> Tensor:
        """t `[B]` to `[B, 1, D]` in at least float32."""
        with without_autocast(t):
            return at_least_float32(self.mlp(cast_for(self.mlp, time_sinusoid(t, self.freq_dim)))).unsqueeze(1)


class TextEmbedding(nn.Module):
    """Text features `[B, M, E]` to `[B, M, D]`, the same for all blocks."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(text_dim, EPS_AFFINE)
        self.mlp = SwiGLU(text_dim, 4 * dim, dim)

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        return self.mlp(self.norm(prompt_embeds))


class LabelEmbedding(nn.Module):
    """Class numbers `[B]` to `[B, D]`; the number after the last class is no class at all."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return at_least_float32(self.embedding_table(labels))


def norm_heads(x: Tensor, norm: LayerNorm) -> Tensor:
    """Every head normalised by itself. x `[B, N, D]`."""
    return norm(x.unflatten(-1, (-1, norm.normalized_shape[0]))).flatten(-2)


class SelfAttention(nn.Module):
    """Interval-aware: q, k and v also take in the embedding of t - r, before the norms of q and k (section 3.4)."""

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.qkv, self.qkv_d = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = (LayerNorm(config.head_dim, EPS_AFFINE) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, delta: Tensor, rope: RopeOperands) -> Tensor:
        q, k, v = (self.qkv(x) + self.qkv_d(cast_for(self.qkv_d, delta))).chunk(3, -1)
        q, k = (
            rotary_embedding(norm_heads(part, norm), rope, self.num_heads)
            for part, norm in ((q, self.q_norm), (k, self.k_norm))
        )
        return self.proj(attention(q, k, v, self.num_heads))


class CrossAttention(nn.Module):
    """To the text. Keys and values do not depend on the picture and are made once per prompt, by `keys_values`.

    Rotary embedding turns q alone, as in the released code.
    """

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (LayerNorm(config.head_dim, EPS_AFFINE) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, rope: RopeOperands) -> Tensor:
        """x `[B, N, D]`, context `[B, M, 2·D]` of `keys_values`."""
        k, v = context.chunk(2, -1)
        q = rotary_embedding(norm_heads(self.q(x), self.q_norm), rope, self.num_heads)
        return self.proj(attention(q, k, cast_for(self.proj, v), self.num_heads))


def keys_values(text: Tensor, kv: nn.Linear, k_norm: LayerNorm) -> Tensor:
    """Normalised keys and values of one block, side by side. text `[B, M, D]` of the text embedding; `[B, M, 2·D]`."""
    text = cast_for(kv, F.layer_norm(text, (text.shape[-1],), eps=EPS))
    k, v = kv(text).chunk(2, -1)
    return torch.cat((norm_heads(k, k_norm), at_least_float32(v)), -1)


class Block(nn.Module):
    """One transformer block; without text it has no cross-attention. The residual stream stays in at least float32."""

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        dim = config.dim
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config) if config.text_dim is not None else None
        self.mlp = SwiGLU(dim, config.ffn_dim, dim)
        self.parts = 9 if config.text_dim is not None else 6
        self.adaLN_modulation = SwiGLU(dim, config.modulation_dim, self.parts * dim)

    def forward(self, x: Tensor, c: Tensor, delta: Tensor, context: Tensor | None, rope: RopeOperands) -> Tensor:
        """x `[B, N, D]`, c and delta `[B, 1, D]`, context `[B, M, 2·D]` or None. Returns `[B, N, D]`."""
        m = self.adaLN_modulation(c).chunk(self.parts, -1)  # (shift, scale, gate) of each part
        h = cast_for(self.attn, modulate(x, m[0], m[1], EPS))
        x = torch.addcmul(x, at_least_float32(self.attn(h, delta, rope)), m[2])
        if self.cross_attn is not None and context is not None:
            h = cast_for(self.cross_attn, modulate(x, m[3], m[4], EPS))
            x = torch.addcmul(x, at_least_float32(self.cross_attn(h, context, rope)), m[5])
        return torch.addcmul(x, self.mlp(modulate(x, m[-3], m[-2], EPS)), m[-1])


class FinalLayer(nn.Module):
    """The last modulation and the linear map from a token to its patch of F."""

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch**2 * config.in_channels)
        self.adaLN_modulation = SwiGLU(config.dim, config.dim // 2, 2 * config.dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with without_autocast(x):
            shift, scale = self.adaLN_modulation(c).chunk(2, -1)
            return self.linear(cast_for(self.linear, modulate(x, shift, scale, EPS)))


class PatchEmbedding(nn.Module):
    """Patches of the latents to tokens: a convolution with equal kernel and stride, computed as one matrix product."""

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, C, H, W]` to `[B, N, D]`."""
        p = self.proj.kernel_size[0]
        batch, channels, h, w = x.shape
        patches = x.reshape(batch, channels, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches = cast_for(self.proj, patches)
        return at_least_float32(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class TiM(nn.Module):
    """The whole network. `velocity` is what one transition computes, `context` what depends on the prompt alone."""

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder, self.delta_embedder = TimeEmbedding(config), TimeEmbedding(config)
        self.y_embedder: TextEmbedding | LabelEmbedding
        if config.text_dim is not None:
            self.y_embedder = TextEmbedding(config.text_dim, config.dim)
        else:
            self.y_embedder = LabelEmbedding(config.num_classes or 0, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config)
        init_weights(self)

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """F of noisy latents x at time t for a jump to time r.

        x `[B, C, H, W]`; t and r `[B]` in 0..1 (0 data, 1 noise), r <= t; condition: text features `[B, M, E]` without
        padding (there is no mask), or class numbers int64 `[B]`. `rope`: tables from `rope_tables`, those of the
        released weights when None. Returns `[B, C, H, W]`. Raises ValueError for sides that are no multiples
        of the patch.
        """
        cos, sin = rope or rope_tables(*token_grid(x, self.config.patch), self.config.head_dim, x.device)
        return self.velocity(x, t, r, self.context(condition), (cos, sin))

    def velocity(
        self, x: Tensor, t: Tensor, r: Tensor, context: Tensor | Sequence[Tensor], rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """As `forward`, from what `context` gave."""
        return velocity(self, x, t, r, context, *rope)

    def context(self, condition: Tensor) -> Tensor:
        """What depends on the prompt alone: keys and values `[L, B, M, 2·D]`, or `[B, D]` for classes."""
        embedded = self.y_embedder(condition)
        if self.config.text_dim is None:
            return embedded
        crosses = [block.get_submodule("cross_attn") for block in self.blocks]
        return torch.stack([keys_values(embedded, cross.kv, cross.k_norm) for cross in crosses])  # type: ignore[arg-type]


def velocity(
    parts: nn.Module, x: Tensor, t: Tensor, r: Tensor, context: Tensor | Sequence[Tensor], cos: Tensor, sin: Tensor
) -> Tensor:
    """F, from a module with TiM's `config`, `x_embedder`, `t_embedder`, `delta_embedder`, `blocks` and `final_layer`.

    Arguments as in `TiM.forward`, context of `TiM.context`, tables `[N, head_dim/2]`. Returns `[B, C, H, W]`. While
    training, give one context per block: indexing a stack costs the backward pass a gradient of the stack every time.
    """
    config: TiMConfig = parts.config  # type: ignore[assignment]
    part = parts.get_submodule
    operands = rotary_operands(cos, sin, x.shape[0])
    delta = part("delta_embedder")(t - r)
    c = part("t_embedder")(t) + delta
    if config.text_dim is None:
        c = c + context.unsqueeze(1)  # type: ignore[union-attr]
    h = part("x_embedder")(x)
    for number, block in enumerate(part("blocks").children()):
        h = block(h, c, delta, None if config.text_dim is None else context[number], operands)
    return unpatchify(part("final_layer")(h, c), token_grid(x, config.patch), config.patch)


def token_grid(x: Tensor, patch: int) -> tuple[int, int]:
    """Patches along (H, W) of latents `[B, C, H, W]`. Raises ValueError if a side is no multiple of the patch."""
    h, w = x.shape[2:]
    # While exporting, a check on a symbolic size would become a constraint; the graph's dimensions fit by name.
    if not torch.onnx.is_in_onnx_export() and (h % patch or w % patch):
        raise ValueError(
            f"latents of {h} x {w} do not split into patches of {patch} x {patch}: use a picture whose sides are whole "
            "numbers of patches."
        )
    return h // patch, w // patch


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """A token's values lie in the order (h, w, c), channels fastest: not the order of the input patches."""
    h, w = grid
    batch, channels = tokens.shape[0], tokens.shape[-1] // patch**2
    x = tokens.view(batch, h, w, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, channels, h * patch, w * patch)


def init_weights(model: TiM) -> None:
    """The authors' initialisation: Xavier, small embeddings, and zero where modulations and F end, so that F is 0."""
    small = ("t_embedder.", "y_embedder.mlp.", "y_embedder.embedding_table.")
    zero = ("adaLN_modulation.fc2.weight", "final_layer.linear.weight", ".bias")
    for name, weight in model.named_parameters():
        if name.endswith(zero):
            nn.init.zeros_(weight)
        elif name.startswith(small):
            nn.init.normal_(weight, std=0.02)
        elif weight.dim() > 1:
            nn.init.xavier_uniform_(weight.flatten(1))
