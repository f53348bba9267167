"""How the same weight is called in the layouts in which Wan is published.

`tmd_ref` uses the names of the original files. A table of substitutions per part, applied in order, leads from there to
the layout of diffusers or transformers; no tensor is transposed. Found in diffusers' converter and checked by equal
outputs (`tests/parity`). Names of a module cut in two (`SplitWan`, `TMDStudent`) are led back by `uncut`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Table = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

TRANSFORMER: Table = (
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^delta_embedding\.0\.", "condition_embedder.delta_embedder.linear_1."),  # of flow maps
    (r"^delta_embedding\.2\.", "condition_embedder.delta_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn\d)\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn\d)\.o\.", r".\1.to_out.0."),
    (r"\.norm3\.", ".norm2."),  # diffusers counts the norms without weights in another order
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)

TEXT_ENCODER: Table = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)

VAE: Table = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.2\.", r"encoder.down_blocks.\1.downsampler."),  # of Wan2.2
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.", r"encoder.down_blocks.\1.resnets."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    # Up, diffusers has stages; each holds three residual blocks and an upsampling. That of Wan2.2 has stages itself.
    (r"^decoder\.upsamples\.(\d+)\.(?!upsamples)", lambda match: f"decoder.up_blocks.{_up_block(int(match[1]))}."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.3\.", r"decoder.up_blocks.\1.upsampler."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.", r"decoder.up_blocks.\1.resnets."),
)

# FastVideo's names inside of the blocks, those of diffusers around them: as its checkpoints for MLX are written.
TRANSFORMER_FASTVIDEO: Table = (
    *TRANSFORMER,
    (r"\.attn1\.to_out\.0\.", ".to_out."),
    (r"\.attn1\.", "."),
    (r"\.attn2\.to_out\.0\.", ".attn2.to_out."),
    (r"\.norm2\.", ".self_attn_residual_norm.norm."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.fc_in."),
    (r"\.ffn\.net\.2\.", ".ffn.fc_out."),
)

# llama.cpp's names, which text encoders in GGUF have.
TEXT_ENCODER_GGML: Table = (
    (r"^token_embedding\.", "token_embd."),
    (r"^norm\.", "enc.output_norm."),
    (r"^blocks\.(\d+)\.", r"enc.blk.\1."),
    (r"\.norm1\.", ".attn_norm."),
    (r"\.attn\.([qkvo])\.", r".attn_\1."),
    (r"\.pos_embedding\.embedding\.", ".attn_rel_b."),
    (r"\.norm2\.", ".ffn_norm."),
    (r"\.ffn\.gate\.0\.", ".ffn_gate."),
    (r"\.ffn\.fc1\.", ".ffn_up."),
    (r"\.ffn\.fc2\.", ".ffn_down."),
)

TABLES = {
    ("transformer", "diffusers"): TRANSFORMER,
    ("transformer", "fastvideo"): TRANSFORMER_FASTVIDEO,
    ("text_encoder", "diffusers"): TEXT_ENCODER,
    ("text_encoder", "ggml"): TEXT_ENCODER_GGML,
    ("vae", "diffusers"): VAE,
}
"""Part and layout -> substitutions from the original names ("diffusers" for the text encoder: of transformers)."""


def _up_block(index: int) -> str:
    stage, place = divmod(index, 4)
    return f"{stage}.resnets.{place}" if place < 3 else f"{stage}.upsamplers.0"


def converted(part: str, name: str, layout: str = "diffusers") -> str:
    """The original name `name` of a weight of `part` in another layout: by default in diffusers' or transformers'."""
    for pattern, replacement in TABLES[part, layout]:
        name = re.sub(pattern, replacement, name)
    return name


# What wrappers, parallel training and other programs put in front of a name; the longer ones first.
_PREFIXES = (
    "model.high_noise_diffusion_model.", "model.diffusion_model.", "diffusion_model.", "pipe.dit.", "transformer.",
    "ema_model.", "net.", "model.", "module.",
)  # fmt: skip
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def bare(name: str) -> str:
    """`name` without the prefixes that training programs and other people's formats leave there."""
    for inside in INSIDE:
        name = name.replace(inside, "")
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def uncut(name: str, first_head_block: int) -> str:
    """Original name of the parameter `name` of a `SplitWan` whose head begins at block `first_head_block`."""
    part, _, name = name.partition(".")
    if part == "head" and (match := re.match(r"blocks\.(\d+)\.", name)):
        return f"blocks.{int(match[1]) + first_head_block}.{name[match.end() :]}"
    return name
