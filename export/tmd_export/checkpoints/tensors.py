"""Opening checkpoint files: the names, shapes and types of their tensors, whatever the container and storage format.

A checkpoint is untrusted input. Safetensors and GGUF files hold nothing but tensors; a `.pth` or `.pt` file is a pickle
(`pickles`). Weights in fp8, int8 or fewer bits appear as the floating point weights that they stand for (`storage`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from tmd_engines.errors import quote

from ..errors import ExportError
from .gguf_files import GGUF, open_gguf
from .mapped import Entry, Place, Tensors, contiguous, one_line, short
from .mistaken import check_first_bytes
from .pickles import PICKLES, open_pickle
from .storage import unpack

SAFETENSORS = ".safetensors"
CONTAINERS = (SAFETENSORS, GGUF, *PICKLES)
"""Endings of the files that are read."""

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def open_tensors(files: Sequence[Path], weight_map: Mapping[str, str] | None = None) -> Tensors:
    """The tensors of one file, or of the safetensors shards of one model; only what precedes the values is read.

    `weight_map`: tensor -> name of its shard, from the index. Raises ExportError for a file that is incomplete, holds
    something else than tensors, does not hold what the index says, or is stored in a format that is not read.
    """
    for path in files:
        check_first_bytes(path, PICKLES)
    if len(files) == 1 and files[0].suffix in PICKLES:
        tensors = open_pickle(files[0])
    elif len(files) == 1 and files[0].suffix == GGUF:
        tensors = open_gguf(files[0])
    else:
        tensors = _open_safetensors(files, weight_map or {})
    unpack(tensors)
    return tensors


def _open_safetensors(files: Sequence[Path], weight_map: Mapping[str, str]) -> Tensors:
    tensors = Tensors(files, {})
    for path in files:
        _add_safetensors(tensors, path)
    astray = [
        name for name, shard in weight_map.items() if (home := tensors.file_of(name)) is None or home.name != shard
    ]
    if astray:
        more = f" (and {len(astray) - 1} more)" if len(astray) > 1 else ""
        raise ExportError(
            f"the index of {files[0].parent} has {quote(astray[0])} in {quote(weight_map[astray[0]])}, and it "
            f"is not there{more}: index and shards do not belong together. Copy all again from one place."
        )
    return tensors


def _add_safetensors(tensors: Tensors, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks that types, shapes and places fit each other and the file. The places it keeps to itself.
        with safe_open(path, "np") as file:
            tensors.metadata |= file.metadata() or {}
        with open(path, "rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        message = one_line(error)
        if "unknown variant" in message:
            unknown = message.partition("unknown variant")[2].split(",")[0].strip()
            raise ExportError(
                f"{path} has numbers of a type that is unknown here ({unknown}): "
                "take the file of the same model in float32, float16 or bfloat16."
            ) from None
        raise ExportError(f"{path} is not a complete safetensors file ({short(message)}): copy it again.") from None
    for name, entry in header.items():
        if name != "__metadata__":
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            place = Place(path, 8 + length + entry["data_offsets"][0], contiguous(shape))
            tensors.add(name, Entry(shape, _DTYPES.get(dtype, dtype)), place)
