"""Wan2.2-A14B of a few megabytes: two transformers in the published layouts, one of them `synthetic_checkpoints`'."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import synthetic_checkpoints as made
from tmd_export.checkpoints.names import converted

BOUNDARY = 0.875


@cache
def low() -> dict[str, Tensor]:
    """Weights of the expert for low noise, under their original names. Those of the other one are `made.models()`'s,
    and differ in the matrices alone."""
    generator, state = torch.Generator().manual_seed(5), made.models().state("transformer")
    for weight in state.values():
        if weight.ndim == 2 and weight.numel() > 2048:  # an exporter may fold smaller ones into a graph
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return state


@cache
def low_theirs() -> Any:
    """The same in diffusers' module."""
    network = copy.deepcopy(made.models().theirs["transformer"])
    network.load_state_dict({converted("transformer", name): weight for name, weight in low().items()})
    return network


def write_diffusers(folder: Path, boundary: float = BOUNDARY) -> Path:
    """As `Wan-AI/Wan2.2-T2V-A14B-Diffusers`: transformer, transformer_2 and a boundary."""
    made.write_diffusers(folder)
    low_theirs().save_pretrained(folder / "transformer_2", max_shard_size="250KB")
    index = folder / "model_index.json"
    document = json.loads(index.read_text())
    document |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": boundary}
    index.write_text(json.dumps(document))
    return folder


def write_original(folder: Path) -> Path:
    """As `Wan-AI/Wan2.2-T2V-A14B`: a folder for each expert, in shards, and the rest as in Wan2.1."""
    made.write_original(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    config = folder / "config.json"
    for which, state in (("high", made.models().state("transformer")), ("low", low())):
        expert = folder / f"{which}_noise_model"
        expert.mkdir()
        made.write_shards(expert, state, 6)
        shutil.copy(config, expert)
    config.unlink()
    (folder / "configuration.json").write_text("{}")
    return folder


def write_files(folder: Path) -> list[Path]:
    """As ComfyUI's repackaged: a file for each expert, text encoder, VAE and tokenizer from elsewhere."""
    made.write_original(folder)
    files = []
    for which, state in (("high", made.models().state("transformer")), ("low", low())):
        files.append(folder.parent / f"wan2.2_t2v_{which}_noise_14B_fp16.safetensors")
        save_file({f"model.diffusion_model.{name}": weight for name, weight in state.items()}, files[-1])
    names = ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model")
    return [*files, *(folder / name for name in names)]
