"""How weights are stored where a file does not have them as floating point: one module per format, and their list.

A format looks at the names, types and shapes of what is stored and replaces what it knows by the weights that are
meant. Each of those is worked out when it is read: in bfloat16, some rows at a time. Nothing else in `checkpoints`
knows a format by name. (Blocks of GGUF belong to their container: `gguf_files`.)
"""

from __future__ import annotations

from ..mapped import Tensors
from .comfy import ComfyQuants
from .format import StorageFormat
from .mlx import Mlx
from .plain_fp8 import PlainFp8
from .row_scaled import RowScaled
from .scaled_fp8 import ScaledFp8

FORMATS: tuple[StorageFormat, ...] = (ScaledFp8(), ComfyQuants(), Mlx(), RowScaled(), PlainFp8())
"""In the order in which they look: first what says its own format, last fp8 that no other has a scale for."""


def unpack(tensors: Tensors) -> None:
    """Replaces what is stored by the weights that are meant.

    Raises ExportError for a format, or a variant of one, that is not read, and for scales that do not fit.
    """
    for form in FORMATS:
        form.unpack(tensors)
