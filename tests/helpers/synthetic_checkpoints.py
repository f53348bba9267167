"""Checkpoints of Wan2.1 and Wan2.2-TI2V-5B in a few megabytes: published names, shards, indices, keys; small widths.

What diffusers and transformers publish is written by those libraries themselves; the original layout and single files
hold the state of `tmd_ref`'s modules, whose names are the original ones.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.synthetic import tokenizer_bytes
from tmd_export.checkpoints.names import converted
from tmd_export.sources.random_weights import random_tensor
from tmd_ref.umt5 import UMT5Config, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig
from tmd_ref.wan import WAN_CONFIGS, WanConfig, WanTransformer

WAN = WanConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=3, freq_dim=64, text_dim=24, text_len=12)
TEXT = UMT5Config(vocab_size=80, dim=24, num_heads=3, head_dim=8, ffn_dim=40, num_layers=2)
VAE = WanVAEConfig(dim=8)
WAN22 = replace(WAN, in_channels=48, out_channels=48)
VAE22 = replace(WAN_VAE_CONFIGS["wan2.2"], dim=4, decoder_dim=8)
SIZES: dict[str, Any] = {"wan": WAN, "vae": VAE, "text": TEXT, "head_blocks": 1}
"""What `WanSource` is told in place of the full sizes."""
SIZES22: dict[str, Any] = {**SIZES, "wan": WAN22, "vae": VAE22}
"""The same for Wan2.2-TI2V-5B."""

_SQUARE = torch.zeros(2, 2)
RELATIVES = [
    (
        "blocks.0.self_attn.attn_op.local_attn.proj_l.weight",
        _SQUARE,
        "TurboDiffusion's sparse-linear attention (SLA)",
    ),
    ("blocks.0.to_gate_compress.weight", _SQUARE, "FastWan's video sparse attention (VSA)"),
    ("far_patch_embedding.weight", _SQUARE, "AnyFlow-FAR"),
    ("img_emb.proj.0.weight", _SQUARE, "an image-to-video model"),
    ("blocks.0.cross_attn.k_img.weight", _SQUARE, "an image-to-video model"),
    ("condition_embedder.image_embedder.norm1.weight", _SQUARE, "an image-to-video model"),
    ("blocks.1.attn2.add_k_proj.weight", _SQUARE, "an image-to-video model"),
    ("patch_embedding.weight", torch.zeros(48, 36, 1, 2, 2), "an image-to-video model"),
    ("patch_embedding.weight", torch.zeros(48, 144), "an image-to-video model"),
    ("vace_blocks.0.before_proj.weight", _SQUARE, "VACE"),
    ("face_adapter.fuser_blocks.0.k_norm.weight", _SQUARE, "Wan-Animate"),
    ("blocks.0.self_attn.q.lora_down.weight", _SQUARE, "a LoRA"),
    ("blocks.0.self_attn.q.lokr_w1", _SQUARE, "a LoKr"),
    ("blocks.0.self_attn.q.hada_w1_a", _SQUARE, "a LoHa"),
    ("first_stage_model.decoder.conv1.weight", _SQUARE, "an all-in-one file"),
    ("text_encoders.umt5xxl.transformer.shared.weight", _SQUARE, "an all-in-one file"),
    ("blocks.0.ffn.0.weight", torch.zeros(96, 48, dtype=torch.int8), "a model with int8 linear layers"),
    ("blocks.0.ffn.0.int8_weight", torch.zeros(96, 48, dtype=torch.int8), "a model with int8 linear layers"),
    ("blocks.0.ffn.0.weight", torch.zeros(96, 24, dtype=torch.uint8), "NVFP4"),
    ("blocks.0.ffn.0.input_global_scale", _SQUARE, "NVFP4"),
]
"""What gives away a model that is no plain text-to-video model: a tensor beside or in place of `WAN`'s; its family."""


@dataclass(frozen=True)
class Models:
    """The same weights in our modules and in those of diffusers and transformers."""

    transformer: WanTransformer
    text_encoder: UMT5Encoder
    vae: WanVAE
    theirs: dict[str, Any]

    def state(self, part: str) -> dict[str, Tensor]:
        """Weights of a part under their original names."""
        module: nn.Module = getattr(self, part)
        return {name: weight.clone() for name, weight in module.state_dict().items()}


@cache
def models(wan22: bool = False) -> Models:
    import diffusers
    import transformers

    torch.manual_seed(0)
    wan, vae = (WAN22, VAE22) if wan22 else (WAN, VAE)
    ours = {"transformer": WanTransformer(wan), "text_encoder": UMT5Encoder(TEXT), "vae": WanVAE(vae)}
    for module in ours.values():
        module.eval().requires_grad_(False)
        for name, weight in module.named_parameters():
            if name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight", "norm3.weight")):
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                weight.normal_(std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
    for weight in ours["text_encoder"].parameters():  # which one layout stores in bfloat16
        weight.copy_(weight.bfloat16())
    theirs = {
        "transformer": diffusers.WanTransformer3DModel(**transformer_config(wan)),
        "text_encoder": transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=TEXT.vocab_size,
                d_model=TEXT.dim,
                d_kv=TEXT.head_dim,
                d_ff=TEXT.ffn_dim,
                num_layers=TEXT.num_layers,
                num_heads=TEXT.num_heads,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        ),
        "vae": diffusers.AutoencoderKLWan(**vae_config(vae)),
    }
    for part, module in ours.items():
        state = {converted(part, name): weight for name, weight in module.state_dict().items()}
        if part == "text_encoder":
            state["encoder.embed_tokens.weight"] = state["shared.weight"]
        theirs[part].eval().load_state_dict(state, strict=True)
    return Models(**ours, theirs=theirs)  # type: ignore[arg-type]


def transformer_config(config: WanConfig = WAN) -> dict[str, Any]:
    """The same sizes in the words of diffusers."""
    return {
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }


def vae_config(config: WanVAEConfig = VAE) -> dict[str, Any]:
    """The same sizes in the words of diffusers."""
    sizes = {"base_dim": config.dim, "z_dim": config.z_dim, "dim_mult": list(config.dim_mult)}
    if not config.shortcuts:
        return sizes
    return sizes | {
        "decoder_base_dim": config.decoder_dim,
        "is_residual": True,
        "patch_size": config.patch,
        "in_channels": 3 * config.patch**2,
        "out_channels": 3 * config.patch**2,
        "scale_factor_spatial": config.spatial_stride,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
    }


UNIPC: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
"""How Wan's folders in diffusers' layout configure their scheduler; the shift is that of 480p."""

COMPONENTS = {
    "scheduler": "UniPCMultistepScheduler",
    "text_encoder": "UMT5EncoderModel",
    "tokenizer": "T5TokenizerFast",
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
}


def write_diffusers(folder: Path, wan22: bool = False) -> Path:
    """As `Wan-AI/Wan2.1-T2V-…-Diffusers` or `Wan2.2-TI2V-5B-Diffusers`: sharded transformer and text encoder, one VAE
    file, tokenizer, scheduler."""
    import diffusers

    theirs = models(wan22).theirs
    for part, shard in (("transformer", "250KB"), ("text_encoder", "20KB"), ("vae", "10GB")):
        theirs[part].save_pretrained(folder / part, max_shard_size=shard)
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        assert (folder / f"{name}.safetensors.index.json").is_file(), "small enough for one shard"
    _write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    write_scheduler(folder, diffusers.UniPCMultistepScheduler(**UNIPC | ({"flow_shift": 5.0} if wan22 else {})))
    components: dict[str, Any] = {name: ["diffusers", made] for name, made in COMPONENTS.items()}
    if wan22:
        components |= {"boundary_ratio": None, "expand_timesteps": True, "transformer_2": [None, None]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **components}))
    return folder


def write_scheduler(folder: Path, scheduler: Any) -> None:
    """As diffusers writes it."""
    scheduler.save_pretrained(folder / "scheduler")


def write_original(folder: Path, shards: int = 1, wan22: bool = False) -> Path:
    """As `Wan-AI/Wan2.1-T2V-1.3B` (one shard), `-14B` (six, with an index) or `Wan-AI/Wan2.2-TI2V-5B` (three)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = models(wan22).state("transformer")
    if shards == 1:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    else:
        write_shards(folder, state, shards)
    config = original_config(WAN22) | {"model_type": "ti2v"} if wan22 else original_config()
    (folder / "config.json").write_text(json.dumps(config))
    text = {name: weight.bfloat16() for name, weight in models(wan22).state("text_encoder").items()}
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(models(wan22).state("vae"), folder / ("Wan2.2_VAE.pth" if wan22 else "Wan2.1_VAE.pth"))
    _write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def original_config(config: WanConfig = WAN) -> dict[str, Any]:
    """config.json as Wan's own code writes it."""
    names = {"in_dim": "in_channels", "out_dim": "out_channels"}
    sizes = ("dim", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len", "eps")
    return {"_class_name": "WanModel", "model_type": "t2v"} | {
        size: getattr(config, names.get(size, size)) for size in sizes
    }


def write_shards(folder: Path, state: Mapping[str, Tensor], shards: int) -> Path:
    """Tensors dealt out in turn; returns the index."""
    names = [f"diffusion_pytorch_model-{k + 1:05}-of-{shards:05}.safetensors" for k in range(shards)]
    weight_map = {name: names[k % shards] for k, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name, home in weight_map.items() if home == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def write_full_size(folder: Path, model: str = "wan1.3b", seed: int = 0) -> Path:
    """As `Wan-AI/Wan2.1-T2V-1.3B` in float32 and at its real size: 6.2 GB of random weights, and no text encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = WAN_CONFIGS[model]
    with torch.device("meta"):
        wan, vae = WanTransformer(config).state_dict(), WanVAE(WAN_VAE_CONFIGS["wan2.1"]).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in wan.items()}
    file = write_hollow(folder / "diffusion_pytorch_model.safetensors", shapes)
    fill(file, lambda name: random_tensor(name, wan[name].shape, seed))
    torch.save(
        {name: random_tensor(name, weight.shape, seed) for name, weight in vae.items()}, folder / "Wan2.1_VAE.pth"
    )
    sizes = {
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
    }
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", **sizes}))
    _write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def fill(path: Path, value: Callable[[str], Tensor]) -> None:
    """Write `value(name)` over each tensor of a safetensors file of float32 or bfloat16, one at a time."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            file.seek(8 + size + entry["data_offsets"][0])
            weight = value(name).detach().contiguous()
            file.write((weight if entry["dtype"] == "F32" else weight.bfloat16().view(torch.int16)).numpy().data)


def write_hollow(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> Path:
    """A safetensors file of full size whose values are a hole on the disk: all zero, and no bytes taken."""
    size, header, end = {"F32": 4, "BF16": 2}[dtype], {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size * count]}
        end += size * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(tokenizer_bytes())
    (folder / "tokenizer.json").write_text("{}")
