"""Wan's text-to-video transformer (Wan2.1, Wan2.2-TI2V-5B), written for reading, small training and clean export. How
the second one holds a picture as its first frame is in `tmd_ref.first_frame`.

Parameter names are those of the official checkpoints, so their weights load with `load_state_dict`. What it is not: the
image-to-video and VACE variants, sequence parallelism, padding of batches with mixed sizes.

Letters in shapes: B batch, C latent channels, T latent frames, H and W latent height and width, N = T·(H/2)·(W/2)
tokens, S text tokens, E width of the text features, D width of the model.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.ops import RMSNorm, at_least_float32, attention, cast_for, rotary_embedding, rotary_operands

RopeOperands = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer. Raises ValueError when they do not fit together."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # a list when it comes from JSON
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads gives no even head size, which rotary embedding needs: "
                "choose dim as a multiple of 2·num_heads."
            )
        if self.head_dim < 6:
            raise ValueError(f"head size {self.head_dim} has no room for three rope axes: use at least 6.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


WAN_CONFIGS = {
    "tiny": WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=8, text_dim=64, text_len=32),
    "wan1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan2.2-ti2v-5b": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48),
}


def rope_tables(
    grid_t: int, grid_h: int, grid_w: int, head_dim: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of a grid of tokens (t slowest, w fastest).

    Every axis has its own ladder of frequencies 10000^(-2i/d_axis) with d_h = d_w = 2·(head_dim // 6), d_t = the rest;
    positions count patches. Angles are computed in float64.

    Returns two float32 `[grid_t·grid_h·grid_w, head_dim/2]`.
    """
    d_space = 2 * (head_dim // 6)
    sizes = (grid_t, grid_h, grid_w)
    angles = []
    for axis, (size, dim) in enumerate(zip(sizes, (head_dim - 2 * d_space, d_space, d_space), strict=True)):
        ladder = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.arange(size, dtype=torch.float64, device=device)[:, None] * ladder
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(angle.view(shape).expand(*sizes, -1))
    table = torch.cat(angles, -1).flatten(0, 2)
    return table.cos().float(), table.sin().float()


def time_sinusoid(t: Tensor, freq_dim: int) -> Tensor:
    """[cos ‖ sin] of 1000·t·10000^(-k/(freq_dim/2)). t `[B]` in 0..1, dimensionless. Returns `[B, freq_dim]`."""
    half = freq_dim // 2
    ladder = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    t = at_least_float32(t)
    angle = (1000.0 * t)[:, None] * ladder.to(t.dtype)
    return torch.cat((angle.cos(), angle.sin()), -1)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Switch autocast off where Wan computes in float32 (time embedding, output head). Nothing when it is off already,
    so that an exported graph carries no autocast region."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """AdaLN: LayerNorm(x)·(1 + scale) + shift in at least float32.

    x `[B, N, D]`; shift and scale `[B, 1, D]`, or `[B, T, 1, D]` where each latent frame has its own time.
    """
    normed = F.layer_norm(at_least_float32(x), (x.shape[-1],), eps=eps)
    if shift.ndim == 3:
        return torch.addcmul(shift, normed, 1 + scale)
    return torch.addcmul(shift, by_frame(normed, shift), 1 + scale).flatten(1, 2)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y·gate. x and y `[B, N, D]`, gate as `shift` of `modulate`."""
    if gate.ndim == 3:
        return torch.addcmul(x, y, gate)
    return torch.addcmul(by_frame(x, gate), by_frame(y, gate), gate).flatten(1, 2)


def by_frame(x: Tensor, times: Tensor) -> Tensor:
    """Tokens `[B, N, D]` apart by latent frame, `[B, T, N/T, D]`, for `times` of `[B, T, 1, D]`."""
    return x.unflatten(1, (times.shape[1], -1))


def feed_forward(dim: int, ffn_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weights, in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(at_least_float32(x), self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Self or cross attention. q and k are RMS-normed over the full width D, before the split into heads."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def forward(self, x: Tensor, context: Tensor, rope: RopeOperands | None = None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        if rope is not None:
            q, k = rotary_embedding(q, rope, self.num_heads), rotary_embedding(k, rope, self.num_heads)
        return self.o(attention(q, k, v, self.num_heads))


class Block(nn.Module):
    """One transformer block. The residual stream stays in at least float32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = Attention(config)
        self.ffn = feed_forward(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e0: Tensor, context: Tensor, rope: RopeOperands) -> Tensor:
        """x `[B, N, D]`, e0 `[B, 6, D]` from `embed_time` (`[B, T, 6, D]`: a time for each latent frame), context
        `[B, S, D]` from `embed_text`, rope from `rotary_operands`. Returns `[B, N, D]`."""
        m = (at_least_float32(self.modulation) + e0).chunk(6, dim=e0.ndim - 2)
        h = cast_for(self.self_attn, modulate(x, m[0], m[1], self.eps))
        x = add_gated(x, at_least_float32(self.self_attn(h, h, rope)), m[2])
        x = x + at_least_float32(self.cross_attn(cast_for(self.cross_attn, self.norm3(x)), context))
        h = cast_for(self.ffn, modulate(x, m[3], m[4], self.eps))
        return add_gated(x, at_least_float32(self.ffn(h)), m[5])


class Head(nn.Module):
    """The last AdaLN and the linear map from a token to its patch of the velocity."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        kt, kh, kw = config.patch_size
        self.head = nn.Linear(config.dim, kt * kh * kw * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x `[B, N, D]`, e `[B, D]` from `embed_time` (not its projection e0; `[B, T, D]`: a time for each latent
        frame). Returns `[B, N, 4·C]`."""
        axis = e.ndim - 1
        shift, scale = (at_least_float32(self.modulation) + e.unsqueeze(axis)).chunk(2, dim=axis)
        with without_autocast(x):
            return self.head(cast_for(self.head, modulate(x, shift, scale, self.eps)))


class WanTransformer(nn.Module):
    """Wan's text-to-video transformer: predicts the velocity noise - data of latents at time t (0 data, 1 noise)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.text_embedding = feed_forward(config.text_dim, dim)
        self.text_embedding[2] = nn.Linear(dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        init_weights(self)

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Velocity of noisy latents.

        x `[B, C, T, H, W]` with even H and W; t `[B]` in 0..1; prompt_embeds `[B, S, E]`, zero after the last real
        token (there is no mask: the padding takes part in cross-attention, as in the official model).
        `rope`: tables from `rope_tables`, computed here when None. Returns `[B, C, T, H, W]`.
        Raises ValueError for odd H or W.
        """
        return self.velocity(x, self.embed_time(t), prompt_embeds, rope)

    def velocity(
        self, x: Tensor, times: tuple[Tensor, Tensor], prompt_embeds: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """What `forward` computes once the time is embedded: `times` are e and e0 of `embed_time`."""
        grid = token_grid(x, self.config.patch_size)
        cos, sin = rope or rope_tables(*grid, self.config.head_dim, x.device)
        operands = rotary_operands(cos, sin, x.shape[0])
        e, e0 = times
        context = self.embed_text(prompt_embeds)
        x = self.patchify(x)
        for block in self.blocks:
            x = block(x, e0, context, operands)
        return self.unpatchify(self.head(x, e), grid)

    def patchify(self, x: Tensor) -> Tensor:
        """Latents `[B, C, T, H, W]` to tokens `[B, N, D]`."""
        return patchify(x, self.patch_embedding)

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t `[B]` in 0..1 to e `[B, D]` (output head) and e0 `[B, 6, D]` (blocks), in at least float32."""
        return embed_time(time_sinusoid(t, self.config.freq_dim), self.time_embedding, self.time_projection)

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """Text features `[B, S, E]` to context `[B, S, D]`."""
        return self.text_embedding(cast_for(self.text_embedding, prompt_embeds))

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Output tokens `[B, N, 4·C]` to latents `[B, C, T, H, W]`; `grid` counts patches (T, H/2, W/2)."""
        return unpatchify(tokens, grid, self.config.patch_size)


def token_grid(x: Tensor, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Patches along (T, H, W) of latents `[B, C, T, H, W]`. Raises ValueError if a side is no multiple of its patch."""
    sides = x.shape[2:]
    # While exporting, a check on a symbolic size would become a constraint; the graph's dimensions are even by name.
    if not torch.onnx.is_in_onnx_export() and any(side % patch for side, patch in zip(sides, patch_size, strict=True)):
        raise ValueError(
            f"latents of {tuple(sides)} (frames, height, width) do not split into patches of {tuple(patch_size)}: "
            "use a video whose width and height divide by the pixels of a patch (16 for Wan2.1, 32 for Wan2.2-TI2V-5B)."
        )
    return tuple(side // patch for side, patch in zip(sides, patch_size, strict=True))  # type: ignore[return-value]


def patchify(x: Tensor, embedding: nn.Conv3d) -> Tensor:
    """Non-overlapping convolution as one matrix product: patches in the order (c, t, h, w) times the flat kernel.

    x `[B, C, T, H, W]`. Returns tokens `[B, N, D]`.
    """
    kt, kh, kw = embedding.kernel_size
    t, h, w = token_grid(x, (kt, kh, kw))
    patches = x.reshape(x.shape[0], x.shape[1], t, kt, h, kh, w, kw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    patches = cast_for(embedding, patches.flatten(4).flatten(1, 3))
    return at_least_float32(F.linear(patches, embedding.weight.flatten(1), embedding.bias))


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """A token's values lie in the order (t, h, w, c), channels fastest: not the order of the input patches."""
    (t, h, w), (kt, kh, kw) = grid, patch_size
    batch, channels = tokens.shape[0], tokens.shape[-1] // (kt * kh * kw)
    x = tokens.view(batch, t, h, w, kt, kh, kw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, channels, t * kt, h * kh, w * kw)


def embed_time(sinusoid: Tensor, embedding: nn.Sequential, projection: nn.Sequential) -> tuple[Tensor, Tensor]:
    """sinusoid `[B, freq_dim]` to e `[B, D]` and e0 `[B, 6, D]`, outside autocast."""
    with without_autocast(sinusoid):
        e = embedding(cast_for(embedding, sinusoid))
        e0 = projection(e).unflatten(-1, (6, -1))
    return at_least_float32(e), at_least_float32(e0)


def init_linears(module: nn.Module) -> None:
    """Xavier weights and zero biases for every linear layer inside `module`."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


def init_weights(model: WanTransformer) -> None:
    """Wan's initialisation: Xavier for matrices, normal(0.02) for text and time embedding, zero for the last layer."""
    init_linears(model)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    for name, weight in model.named_parameters():
        if name.startswith(("text_embedding.", "time_embedding.")) and name.endswith("weight"):
            nn.init.normal_(weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)
