"""The weights of a model in the files in which their authors publish them, for rivals that read no bundle.

`python -m tmd_bench.published WORK FOLDER`: WORK is a `Work` as JSON; writes what its stages need, in float16, under
the original names (the text encoder's are those of transformers, which is how single files of it are published).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tmd_engines.command.signals import Ending
from tmd_export import ExportError
from tmd_export.checkpoints.names import converted
from tmd_export.transformer_file import write_transformer

from .rivals import source_of
from .spec import Work

TRANSFORMER, VAE, TEXT_ENCODER = "transformer.safetensors", "vae.safetensors", "text_encoder.safetensors"


def vae_weights(work: Work) -> Iterator[tuple[str, Tensor]]:
    """Original name and weight of the autoencoder."""
    source = source_of(work)
    for name in source.module("vae").state_dict():
        yield name, source.tensor("vae", name)


def text_encoder_weights(work: Work) -> Iterator[tuple[str, Tensor]]:
    """transformers' name and weight of the text encoder."""
    source = source_of(work)
    for name in source.module("text_encoder").state_dict():
        yield converted("text_encoder", name), source.tensor("text_encoder", name)


def write(work: Work, folder: Path) -> None:
    """Writes the files that `work` needs. Raises ExportError if a weight is missing."""
    from safetensors.torch import save_file

    files = {VAE: vae_weights(work)}
    if "text" in work.stages:
        files[TEXT_ENCODER] = text_encoder_weights(work)
    folder.mkdir(parents=True, exist_ok=True)
    write_transformer(source_of(work), folder / TRANSFORMER, torch.float16)
    for name, weights in files.items():
        save_file({key: weight.half().contiguous() for key, weight in weights}, folder / name)


def main() -> None:
    Ending()
    try:
        write(Work.from_json(sys.argv[1]), Path(sys.argv[2]))
    except (ExportError, ValueError) as error:
        sys.exit(f"tmd-bench: {error}")


if __name__ == "__main__":
    main()
