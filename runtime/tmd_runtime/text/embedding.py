"""Token ids -> embeddings, by rows of a table that stays on the disk: a prompt reads 512 of UMT5-XXL's 256,384 rows.

The table is a raw file of the bundle (`text.embedding` in the manifest). With it the graph `text_encoder` takes
`token_embeds` where it would take `input_ids`. Rows are read at their places and not mapped: a system that keeps the
file in large pages would bring up to 2 MB around every row into the process, which adds up to the table.
"""

from __future__ import annotations

from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import RuntimeFailure

if TYPE_CHECKING:
    from tmd_engines.bundle.manifest import EmbeddingTable

_STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}  # numpy has no bfloat16: its bits


class TokenEmbedding:
    """The table `info` of the bundle in `folder`, opened anew for every prompt."""

    def __init__(self, folder: Path, info: EmbeddingTable) -> None:
        self._folder, self._info = folder, info

    def __call__(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """`token_embeds` float32 `[B, S, dim]` of ids `[B, S]`.

        Raises RuntimeFailure for an id that has no row or a file that is not the table, tmd_engines.BundleError if it
        is no regular file.
        """
        from tmd_engines.bundle.files import open_regular

        info = self._info
        wrong = input_ids[(input_ids < 0) | (input_ids >= info.rows)]
        if wrong.size:
            raise RuntimeFailure(
                f"the tokenizer gave the id {wrong[0]}, and {info.file} has rows 0 to {info.rows - 1}: they do not "
                "belong together. Export the bundle again, with the tokenizer of its text encoder."
            )
        ids, place = np.unique(input_ids, return_inverse=True)
        rows = np.empty((len(ids), info.dim), _STORED[info.dtype])
        with open_regular(self._folder, info.file, follow=True) as file:
            self._check_size(file)
            for row, number in zip(rows, ids, strict=True):
                file.seek(int(number) * row.nbytes)
                if file.readinto(row.data) != row.nbytes:
                    raise RuntimeFailure(f"{self._folder / info.file} ends early. {_REMEDY}")
        if info.dtype == "bfloat16":  # the upper half of a float32
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32, copy=False)[place.reshape(input_ids.shape)]

    def _check_size(self, file: FileIO) -> None:
        from tmd_engines.bundle.files import file_size

        if file_size(file) != self._info.size:
            raise RuntimeFailure(
                f"{self._folder / self._info.file} has {file_size(file)} bytes where the manifest says "
                f"{self._info.size}: it was changed after the bundle was opened. {_REMEDY}"
            )


_REMEDY = "Copy the bundle again, or make it again with tmd-export."
