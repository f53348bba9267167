"""The operations that must become single ONNX nodes, each with its eager form, in one place.

The models call these and nothing else for attention, rotary embedding and RMS norm. While the exporter traces, they use
torch's ONNX operators, so that a graph holds one `Attention` and one `RotaryEmbedding` where the maths has one;
otherwise they use the plain form, which is differentiable, faster in training and free of graph breaks under
`torch.compile`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOFTMAX_IN_FLOAT32 = 1  # ONNX's number for the type


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if it is float16 or bfloat16, else `x` itself (float64 models stay float64)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def passed_on(x: Tensor) -> Tensor:
    """`x` as one call of a graph hands it to the next: 16 bits stay 16 bits, but bfloat16, which hosts have no type
    for, becomes float16. That holds every bfloat16 of 2^-17 to 65504 exactly, and smaller ones within 2^-25."""
    return x.half() if x.dtype == torch.bfloat16 else x


def cast_for(module: nn.Module, x: Tensor) -> Tensor:
    """`x` in the dtype of the weights of `module`; the residual stream may be wider than they are."""
    return x.to(next(module.parameters()).dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last axis, statistics and result in at least float32."""
    return F.rms_norm(at_least_float32(x), (x.shape[-1],), at_least_float32(weight), eps)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight `[D]`, of the transformer and of the text encoder."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Multi-head softmax attention, not causal.

    q `[B, N, D]`, k and v `[B, S, D]`, `bias` broadcastable to `[B, num_heads, N, S]` and added to the scores.
    `scale` multiplies q·k; None is 1/sqrt(head_dim). Returns `[B, N, D]` in the dtype of v.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    if torch.onnx.is_in_onnx_export():
        # The operator's default is to sum the exponentials in the type of q.
        softmax = None if v.dtype == torch.float32 else SOFTMAX_IN_FLOAT32
        return torch.onnx.ops.attention(
            q, k, v, bias, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale, softmax_precision=softmax
        )[0]
    batch, tokens, dim = q.shape
    split = (batch, -1, num_heads, dim // num_heads)
    out = F.scaled_dot_product_attention(
        q.view(split).transpose(1, 2), k.view(split).transpose(1, 2), v.view(split).transpose(1, 2), bias, scale=scale
    )
    return out.transpose(1, 2).reshape(batch, tokens, dim)


def rotary_operands(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Bring rope tables `[N, head_dim/2]` into the form that `rotary_embedding` uses, once per forward pass.

    Exporting: `[B, N, head_dim/2]`, what the ONNX operator asks for when it gets no position ids.
    Else: `[N, 1, head_dim]`, each angle twice, the sine signed (-, +), so that a rotation is two products and a sum.
    """
    if torch.onnx.is_in_onnx_export():
        return cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    return cos.repeat_interleave(2, -1).unsqueeze(1), torch.stack((-sin, sin), -1).flatten(-2).unsqueeze(1)


def rotary_embedding(x: Tensor, operands: tuple[Tensor, Tensor], num_heads: int) -> Tensor:
    """Rotate the neighbouring pairs (2i, 2i+1) of every head: (a, b) -> (a·cos - b·sin, a·sin + b·cos).

    x `[B, N, D]`, `operands` from `rotary_operands`. Returns `[B, N, D]`.
    """
    cos, sin = operands
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.rotary_embedding(x, cos, sin, interleaved=True, num_heads=num_heads)
    heads = x.unflatten(-1, (num_heads, -1))
    swapped = heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(heads * cos, swapped, sin).flatten(2)
