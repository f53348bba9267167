"""The released weights: one flat file of tensors, under the names of `TiM` and `projector.*`, which is left out.

`t2i_model.bin`, `c2i_model_256.safetensors`, `c2i_model_512.safetensors`, in whatever precision they have.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from tmd_ref.tim.model import TiM, TiMConfig

RELEASED = {
    "tim-t2i": "t2i_model.bin",
    "tim-c2i-256": "c2i_model_256.safetensors",
    "tim-c2i-512": "c2i_model_512.safetensors",
}
"""Name of the model -> its file."""

PROJECTOR = "projector."  # of training's alignment loss; F does not depend on it


def load_released(path: str | os.PathLike[str], config: TiMConfig, dtype: torch.dtype | None = None) -> TiM:
    """The network in the file `path` on the CPU, in `dtype` (None: as stored), in evaluation mode.

    A `.bin` is a pickle and is read by torch's weights-only unpickler. Raises FileNotFoundError, or ValueError for a
    file that is damaged or holds another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: expected the weights of a TiM.")
    tensors = {name: value for name, value in _tensors(path).items() if not name.startswith(PROJECTOR)}
    with torch.device("meta"):
        model = TiM(config)
    try:
        model.load_state_dict({name: value.to(dtype or value.dtype) for name, value in tensors.items()}, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold this TiM: {reason}. Choose the config of its own size.") from error
    return model.eval().requires_grad_(False)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as weights ({error}): copy it again.") from error
    except Exception as error:  # safetensors has its own error for a damaged file
        raise ValueError(f"{path} is no complete safetensors file ({error}): copy it again.") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds something else than a flat dictionary of tensors: it is no released TiM.")
    return found
