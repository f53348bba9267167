"""Weights with their configuration in one safetensors file: the VAE, the text encoder, the teacher, a TiM.

(`tmd_ref.student` does the same for a student, whose two parts share weights.)
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from tmd_ref.partial import writing
from tmd_ref.tim.model import TiM, TiMConfig
from tmd_ref.umt5 import UMT5Config, UMT5Encoder
from tmd_ref.vae import WanVAE, WanVAEConfig
from tmd_ref.wan import WanConfig, WanTransformer

Model = TypeVar("Model", WanVAE, UMT5Encoder, WanTransformer, TiM)
_KINDS: dict[type, type] = {
    WanVAE: WanVAEConfig,
    UMT5Encoder: UMT5Config,
    WanTransformer: WanConfig,
    TiM: TiMConfig,
}
# What files of earlier versions lack; the defaults are what these versions had.
_ADDED: dict[type, set[str]] = {WanVAEConfig: {"decoder_dim", "shortcuts", "patch"}}


def save_model(path: str | os.PathLike[str], model: WanVAE | UMT5Encoder | WanTransformer | TiM) -> None:
    """Write weights, in the precision they have, and configuration; complete or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with writing(path) as partial:
        save_file(weights, partial, metadata={"config": json.dumps(asdict(model.config))})


def read_config(path: str | os.PathLike[str], kind: type[Model]) -> Any:
    """The configuration in a file written by `save_model`, without its weights. Arguments, errors: `load_model`."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)}: expected the weights of a {kind.__name__}.")
    config_class = _KINDS[kind]
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {})["config"])
        wanted = {field.name for field in fields(config_class)}
        if not wanted - _ADDED.get(config_class, set()) <= set(stored) <= wanted:
            raise KeyError(f"its fields are {sorted(stored)}, not {sorted(wanted)}")
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    except SafetensorError as error:
        raise incomplete(path, error) from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise _foreign(path, kind, error) from error


def load_model(path: str | os.PathLike[str], kind: type[Model]) -> Model:
    """Read a file written by `save_model`: a `kind` on the CPU, float32, in evaluation mode.

    Raises FileNotFoundError, or ValueError if the file holds something else.
    """
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = kind(read_config(path, kind))
    try:
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()}, assign=True)
    except RuntimeError as error:
        raise _foreign(path, kind, error) from error
    return model.eval().requires_grad_(False)


def incomplete(path: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(f"{os.fspath(path)} is not a complete safetensors file ({error}): copy it again.")


def _foreign(path: str | os.PathLike[str], kind: type, error: Exception) -> ValueError:
    return ValueError(f"{os.fspath(path)} does not hold a {kind.__name__} as written by this version: {error}")
