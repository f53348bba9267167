"""A repository with the headers of its weights alone: enough to say what it is, a thousandth of the download.

A file of safetensors begins with names, types, shapes and places of its tensors. That part is asked for with a range,
and written before a hole of the size of the values, which takes no room on the disk. What reads weights from files
reads such a file as any other, and must not ask for values: they are all zero.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tmd_engines.bundle.reader import format_size

from ..checkpoints.folders import WEIGHTS
from ..errors import ExportError
from .repository import Repository, silent

_ENDING = ".safetensors"
_SMALL = 16 << 20  # bytes of a file that is fetched whole: configurations, tokenizers
_VALUES = ".comfy_quant"  # tensors whose values say how others are stored


def with_headers(repository: Repository, files: Sequence[str], room: Path) -> Path:
    """A folder below `room` with `files` as in the cache of the hub's library: those that are in the cache, small ones
    without weights, which are downloaded, and of weights the headers.

    Raises ExportError for weights whose header is not read over the network, or does not say enough.
    """
    there = [file for file in files if (repository.folder / file).is_file()]
    absent = [file for file in files if file not in there]
    small = [file for file in absent if not file.endswith(WEIGHTS) and repository.sizes[file] <= _SMALL]
    rest = [file for file in absent if file not in small]
    closed = [file for file in rest if not file.endswith(_ENDING)]
    if closed:
        size = format_size(sum(repository.sizes[file] for file in closed))
        raise ExportError(
            f"{repository} is not on this machine, and {', '.join(closed[:6])} ({size}) would have to be downloaded "
            f"first: only headers of safetensors files are read over the network. Export it, or download it with "
            f"`hf download {repository.name.repo} {' '.join(closed[:6])}`."
        )
    repository.download(small, silent)
    folder = room.joinpath(*repository.folder.parts[-3:])  # models--ORG--NAME, snapshots, the commit
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file in rest:
            _write_hollow(path, repository, file)
        elif not path.exists():
            path.symlink_to((repository.folder / file).resolve())
    return folder


def _write_hollow(path: Path, repository: Repository, file: str) -> None:
    found: Any = repository.header(file)
    header: dict[str, Any] = {"__metadata__": found.metadata} if found.metadata else {}
    for name, tensor in found.tensors.items():
        if name.endswith(_VALUES):
            raise ExportError(
                f"{file} of {repository} says in the values of tensors how it is stored, and only its header was "
                f"asked for: download it with `hf download {repository.name.repo} {file}`."
            )
        places = list(tensor.data_offsets)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": places}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    end = max((entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry), default=0)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
