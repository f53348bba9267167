"""Weights that a distillation is given: files of this project, or the official Wan2.1 ones.

Official files: `diffusion_pytorch_model.safetensors` (or its `.index.json` with shards), `Wan2.1_VAE.pth`,
`models_t5_umt5-xxl-enc-bf16.pth`. Their names of tensors are those of the reference. A `.pth` is read with torch's
weights-only loader. What it is not: a reader of every published layout; `tmd-export` has one.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmd_ref.checkpoint import Model, load_model
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE
from tmd_ref.wan import WanConfig, WanTransformer


def load_teacher(path: Path, config: WanConfig) -> WanTransformer:
    """The transformer in `path`, float32, on the CPU. Raises FileNotFoundError, ValueError for another model."""
    model = _load(path, WanTransformer, config)
    if model.config != config:
        raise ValueError(f"{path} holds a transformer of other sizes: {model.config}, the config asks for {config}.")
    return model


def load_vae(path: Path) -> WanVAE:
    """The VAE in `path`: this project's, or Wan2.1's official one. Errors as `load_teacher`."""
    return _load(path, WanVAE, WAN_VAE_CONFIGS["wan2.1"])


def load_text_encoder(path: Path) -> UMT5Encoder:
    """The text encoder in `path`: this project's, or the official UMT5-XXL in its bfloat16; errors: `load_teacher`."""
    return _load(path, UMT5Encoder, UMT5_CONFIGS["umt5-xxl"], keep_dtype=True)


def _load(path: Path, kind: type[Model], config: Any, keep_dtype: bool = False) -> Model:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: expected the weights of a {kind.__name__}.")
    if path.suffix == ".safetensors" and "config" in _metadata(path):
        return load_model(path, kind)
    tensors = _tensors(path)
    with torch.device("meta"):
        model = kind(config)
    try:
        model.load_state_dict({n: v if keep_dtype else v.float() for n, v in tensors.items()}, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()
        raise ValueError(
            f"{path} does not hold the weights of a {kind.__name__} under the official names: "
            f"{' '.join(first[1:2]).strip() or first[0]} Take the original Wan2.1 files, not the Diffusers layout."
        ) from error
    return model.eval().requires_grad_(False)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception as error:  # safetensors has its own error for a damaged file
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the shards that an index lists."""
    from safetensors.torch import load_file

    if path.name.endswith(".index.json"):
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{path} lists files outside its folder.")
        return {name: value for shard in names for name, value in load_file(path.parent / shard).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of plain weights: {error}") from error
