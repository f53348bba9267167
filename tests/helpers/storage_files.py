"""Wan transformers of a few megabytes in the storage formats in which they are published, and what each weight means.

Each writer puts down the published layout and returns, for every weight that it stores in fewer bits, the bfloat16
value that another reader or the format's definition gives it: diffusers for GGUF, ml_dtypes for fp8, numpy for
integers.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import synthetic_checkpoints as made
from tmd_export.checkpoints.names import converted
from tmd_export.sources.wan import WanSource
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.wan import WanConfig, WanTransformer

State = dict[str, Tensor]

WIDE = WanConfig(dim=256, ffn_dim=256, num_heads=4, num_layers=2, freq_dim=256, text_dim=256, text_len=12)
"""Wide enough for the blocks of every format: 256 columns in all matrices but the patches' 64."""

# Where a block of a GGUF type has its float16 scales. Everything else in a block may be any bits.
_SCALES_AT = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
WRITTEN_BY_GGUF = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
FROM_BITS = tuple(_SCALES_AT)


@cache
def _wide() -> State:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in WanTransformer(WIDE).state_dict().items()}
    return {
        name: 1 + 0.2 * torch.randn(shape) if "norm" in name and name.endswith("weight") else 0.06 * torch.randn(shape)
        for name, shape in shapes.items()
    }


def wide() -> State:
    """The weights of a transformer of the sizes `WIDE`, float32, by original names."""
    return {name: weight.clone() for name, weight in _wide().items()}


def source(*paths: Path) -> WanSource:
    return WanSource(paths, "small", **{**made.SIZES, "wan": WIDE})


def matrices(state: State) -> list[str]:
    """What converters store in fewer bits: the matrices of the blocks."""
    return [name for name, weight in state.items() if name.startswith("blocks.") and weight.ndim == 2]


def rounded(values: np.ndarray) -> Tensor:
    """float32 values in bfloat16 by ml_dtypes, as torch has it."""
    return torch.from_numpy(values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.int16)).view(torch.bfloat16)


def write_gguf(path: Path, state: State, kind: str, arch: str = "wan", prefix: str = "", keep: str = " ") -> State:
    """As city96's converter and llama.cpp's quantizer leave it: small tensors and those of one dimension in float32,
    the patch embedding with its five dimensions, matrices in blocks. Written by the library of the format.

    `keep`: matrices whose name contains this stay in float16.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    meant = {}
    for name, weight in state.items():
        values = weight.float().numpy()
        large = values.ndim == 2 and values.size > 1024 and values.shape[1] % 32 == 0
        if not large or "modulation" in name:
            writer.add_tensor(prefix + name, values)
        elif keep in name or values.shape[1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]:
            writer.add_tensor(prefix + name, values.astype(np.float16))
            meant[name] = torch.from_numpy(values.astype(np.float16))
        else:
            blocks = _blocks(values, kind)
            writer.add_tensor(prefix + name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
            meant[name] = _by_diffusers(blocks, kind, values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _blocks(values: np.ndarray, kind: str) -> np.ndarray:
    """Rows of blocks: by the library, or, where it only reads a type, of any bits with scales that make sense."""
    number = gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES_AT:
        return gguf.quants.quantize(values, number)
    per_block, size = gguf.GGML_QUANT_SIZES[number]
    generator = np.random.default_rng(values.size)
    blocks = generator.integers(0, 256, (values.size // per_block, size), dtype=np.uint8)
    for at in _SCALES_AT[kind]:
        scale = generator.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(values.shape[0], -1)


def _by_diffusers(blocks: np.ndarray, kind: str, shape: tuple[int, ...]) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_functions

    number = gguf.GGMLQuantizationType[kind]
    per_block, size = gguf.GGML_QUANT_SIZES[number]
    if kind == "BF16":
        return torch.from_numpy(blocks.copy()).view(torch.bfloat16).reshape(shape)
    flat = torch.from_numpy(blocks.reshape(-1, size).copy())
    return dequantize_functions[number](flat, per_block, size, dtype=torch.float32).reshape(shape).bfloat16()


def write_scaled_fp8(path: Path, state: State, dtype: torch.dtype = torch.float8_e4m3fn, prefix: str = "") -> State:
    """ComfyUI's first scaled fp8, as `Wan2_1-T2V-..._fp8_e4m3fn_scaled_KJ` and `umt5_xxl_fp8_e4m3fn_scaled` are."""
    stored: State = {f"{prefix}scaled_fp8": torch.empty(0, dtype=dtype)}
    meant = {}
    for name, weight in state.items():
        if weight.ndim != 2 or name in ("shared.weight", "token_embedding.weight"):
            stored[prefix + name] = weight.half() if weight.ndim > 1 else weight
            continue
        stored[prefix + name], scale, meant[name] = _fp8(weight, dtype)
        stem = prefix + name.removesuffix("weight")
        stored |= {f"{stem}scale_weight": scale, f"{stem}scale_input": torch.tensor(1.0)}
    save_file(stored, path, metadata={"format": "pt"})
    return meant


def _fp8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Stored values, their scale, and what they mean by ml_dtypes."""
    scale = (weight.abs().max() / torch.finfo(dtype).max).float()
    stored = (weight / scale).to(dtype)
    kind = getattr(ml_dtypes, str(dtype).removeprefix("torch."))
    numbers = stored.view(torch.uint8).numpy().view(kind).astype(np.float32)
    return stored, scale, rounded(numbers * scale.numpy())


def write_comfy(path: Path, state: State, form: str, *, in_header: bool = False, prefix: str = "") -> State:
    """ComfyUI's quantised layers in fp8 or int8: what each is, it says in a tensor of its own or in the header."""
    stored: State = {prefix + name: weight for name, weight in state.items()}
    meant, layers = {}, {}
    for name in matrices(state):
        layer, weight = name.removesuffix(".weight"), state[name]
        conf: dict[str, Any] = {"format": form}
        if form == "int8_tensorwise":
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            q = (weight / scale).round().to(torch.int8)
            value = rounded(q.numpy().astype(np.float32) * scale.numpy())
        else:
            q, scale, value = _fp8(weight, getattr(torch, form))
            stored[f"{prefix}{layer}.input_scale"] = torch.tensor(0.5)
        stored |= {prefix + name: q, f"{prefix}{layer}.weight_scale": scale}
        meant[name], layers[layer] = value, conf
        if not in_header:
            stored[f"{prefix}{layer}.comfy_quant"] = torch.frombuffer(
                bytearray(json.dumps(conf).encode()), dtype=torch.uint8
            )
    document = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(stored, path, metadata=document if in_header else None)
    return meant


def write_mlx(folder: Path, state: State, bits: int = 8, group: int = 64) -> State:
    """FastMetal: FastVideo's names inside of the blocks, every matrix quantised, the patches flattened."""
    folder.mkdir(parents=True, exist_ok=True)
    stored, meant, keys = {}, {}, {}
    for name, weight in state.items():
        called = converted("transformer", name, "fastvideo")
        weight = weight.flatten(1) if name == "patch_embedding.weight" else weight
        if weight.ndim != 2:
            stored[called] = weight.half()
            continue
        groups = weight.reshape(len(weight), -1, group).numpy()
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        scale, bias = ((high - low) / (2**bits - 1)).astype(np.float16), low.astype(np.float16)
        q = np.clip(np.rint((groups - bias) / scale), 0, 2**bits - 1).astype(np.uint32)
        meant[name] = rounded(q * scale.astype(np.float32) + bias.astype(np.float32)).reshape(state[name].shape)
        word = q.reshape(len(weight), -1, 32 // bits)
        packed = np.bitwise_or.reduce(word << (bits * np.arange(32 // bits, dtype=np.uint32)), axis=-1)
        stored |= {
            called: torch.from_numpy(packed.astype(np.uint32)),
            f"{called}.scales": torch.from_numpy(scale[..., 0]),
            f"{called}.biases": torch.from_numpy(bias[..., 0]),
        }
        keys[called] = {"dequantized_dtype": "fp16", "has_biases": True}
    save_file(stored, folder / "mlx_dit.safetensors")
    how = {"mode": "affine", "bits": bits, "group_size": group}
    document = {"format_version": 1, "config": {}, "num_blocks": 2, "quantization": how, "quantized_keys": keys}
    (folder / "mlx_dit.json").write_text(json.dumps(document))
    return meant


def text_state(encoder: UMT5Encoder, layout: str) -> State:
    """The weights of a text encoder under the names of transformers ("diffusers") or of llama.cpp ("ggml")."""
    return {converted("text_encoder", name, layout): weight for name, weight in encoder.state_dict().items()}
