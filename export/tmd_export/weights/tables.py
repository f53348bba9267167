"""Tables of the prompt's side, files of the bundle beside its graphs; `tmd_runtime.text.embedding` reads their rows.

`text.embedding` is the embedding of a large text encoder, whose graph takes rows of it (`graphs.text.EncoderOfRows`);
`text.null_embeds` are features of the empty prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sources.source import Source
from .precision import DTYPES
from .weights import CHUNK_BYTES

FILE, NULL_FILE = "text_embedding.bin", "null_embeds.bin"
WEIGHT = "token_embedding.weight"

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def write_table(source: Source, precision: str, folder: Path) -> dict[str, Any]:
    """Writes the table of the text encoder into `folder`; returns the entry `text.embedding` of the manifest.

    A table of 16 bits stays as it is stored; another is rounded to `precision`, that of the graph.
    """
    table = source.tensor("text_encoder", WEIGHT)
    dtype = table.dtype if table.dtype in _NAMES and table.dtype.itemsize == 2 else DTYPES[precision]
    rows = max(1, CHUNK_BYTES // (table.shape[1] * dtype.itemsize))
    with open(folder / FILE, "xb") as file:
        for start in range(0, table.shape[0], rows):
            piece = table[start : start + rows].to(dtype).contiguous()
            file.write(piece.view(torch.uint8).numpy().data)
    return {"file": FILE, "dtype": _NAMES[dtype], "rows": table.shape[0], "dim": table.shape[1]}


def write_null_embeds(rows: Tensor, folder: Path) -> dict[str, Any]:
    """Writes features float32 `[text, E]` into `folder`; returns the entry `text.null_embeds` of the manifest."""
    (folder / NULL_FILE).write_bytes(rows.contiguous().numpy().astype("<f4", copy=False).tobytes())
    return {"file": NULL_FILE, "dtype": "float32", "rows": rows.shape[0], "dim": rows.shape[1]}
