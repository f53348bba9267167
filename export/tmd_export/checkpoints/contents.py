"""What a folder says that it holds, beside what is used of it: so that no half of a model passes for the whole.

Looked at are `model_index.json` (diffusers), indexes of shards, folders with weights, GGUF files, and links and
downloads that lead to nothing. Only names decide.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tmd_engines.errors import quote

from ..errors import ExportError
from .documents import read_document

MODEL_INDEX = "model_index.json"
_MAX_MODEL_INDEX = 1 << 20
_DEPTH = 3  # of folders in which files are looked for
_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
_LOADED = (*_WEIGHTS, ".json", ".model")  # what a link in the place of one of these hides

_COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
_MODELS = _COMPONENTS[:3]  # those that have weights
# A time for each token, in Wan2.2-TI2V-5B, which its tensors tell too; with a prompt alone all times are the same.
_TOLD_TWICE = "expand_timesteps"
_OF_EXPERTS = ("transformer", "transformer_2", "boundary_ratio")
_REASONS = {
    "transformer_2": "Wan2.2-A14B, whose two transformers take turns, and not both are there: complete the download",
    "boundary_ratio": "Wan2.2-A14B, whose two transformers take turns, and not both are there: complete the download",
    "image_encoder": "an image-to-video model, which needs an image as input: take the text-to-video model",
    "image_processor": "an image-to-video model, which needs an image as input: take the text-to-video model",
}


def named_models(folder: Path, experts: bool = False) -> tuple[str, ...]:
    """The models with weights that `model_index.json` names; none if there is no such file. With `experts`, those
    beside the two transformers of a Wan2.2-A14B.

    Raises ExportError if it cannot be read or names something that the exporter would leave out.
    """
    path = folder / MODEL_INDEX
    if not path.is_file():
        return ()
    document = read_document(path, _MAX_MODEL_INDEX)
    named = [name for name, value in document.items() if not name.startswith("_") and _means_something(value)]
    if experts:
        named = [name for name in named if name not in _OF_EXPERTS]
    for name in named:
        if name not in (*_COMPONENTS, _TOLD_TWICE):
            reason = _REASONS.get(name, "a model with a part that is unknown here, and would be wrong without it")
            raise ExportError(f"{path} names {quote(name)}: this is {reason}.")
    return tuple(name for name in _MODELS if name in named)


def boundary_of(folder: Path) -> float | None:
    """The time below which the second of two transformers takes over, as `model_index.json` says; None if it does not.

    Raises ExportError if it is no such time, or if there is a second transformer and no time.
    """
    path = folder / MODEL_INDEX
    document = read_document(path, _MAX_MODEL_INDEX) if path.is_file() else {}
    ratio = document.get("boundary_ratio")
    if ratio is None and _means_something(document.get("transformer_2")):
        raise ExportError(
            f"{path} names transformer_2 and no boundary_ratio, which says when it takes over: copy it again, or put "
            "the model's own there (0.875 for the text-to-video Wan2.2-A14B)."
        )
    if ratio is not None and (type(ratio) not in (int, float) or not 0 < ratio <= 1):
        raise ExportError(
            f"{path} sets boundary_ratio to {quote(ratio)}: it is a time above 0, up to 1. Copy it again."
        )
    return None if ratio is None else float(ratio)


def _means_something(value: Any) -> bool:
    """Whether an entry stands for something: [null, null] and null say that there is no such part."""
    return any(_means_something(item) for item in value) if isinstance(value, list) else value not in (None, False)


def refuse_incomplete(folder: Path) -> None:
    """Raises ExportError if `folder` holds a link to nothing, or a file that is still being downloaded."""
    for path in _files(folder):
        if path.suffix == ".incomplete":
            raise ExportError(f"{path} is a download that has not ended: start the download again, and then this.")
        if path.suffix in _LOADED and path.is_symlink() and not path.exists():
            raise ExportError(
                f"{path} is a link to {quote(os.readlink(path))}, which is not there: the download was interrupted, or "
                "its cache was moved. Start the download again, or copy the files that the links lead to."
            )


def refuse_unused(folder: Path, used: Collection[Path]) -> tuple[str, ...]:
    """Names of loose files of weights in `folder` that are not in `used`, for a note; `used` are the files that are
    read, or that the user named.

    Raises ExportError for weights in a folder inside, an index of shards or a GGUF file that is not used: each is a
    part of some model.
    """
    loose = []
    for path in _files(folder):
        if path in used or path.name == MODEL_INDEX:
            continue
        index = path.name.endswith((".safetensors.index.json", ".bin.index.json"))
        if index or path.suffix == ".gguf" or (path.suffix in _WEIGHTS and path.parent != folder):
            raise ExportError(
                f"{folder} holds {path.relative_to(folder)}, which is not used here, so the bundle might be half of a "
                f"model. If it is not needed, move it away; if it is the one that is meant, give it itself "
                f"(--checkpoint {path})."
            )
        if path.suffix in _WEIGHTS and path.parent == folder:
            loose.append(path.name)
    return tuple(loose)


def _files(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Files and links in `folder` and below, in the order of their names; nothing that is hidden."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if depth > 1:
                yield from _files(path, depth - 1)
        else:
            yield path
