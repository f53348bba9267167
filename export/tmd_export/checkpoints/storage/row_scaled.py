"""LightX2V's fp8 and int8: beside each `X.weight` its `X.weight_scale`, one value per row, and no word of the format.

W = weight · weight_scale. With a scale per block of rows and columns, as another of its formats has it, the number of
scales does not fit and the file is refused. Source: LightX2V `tools/convert` and its documentation of quantisation
("FP8 channel symmetric", "INT8 channel symmetric").
"""

from __future__ import annotations

from ..mapped import Tensors
from .format import FP8, Layer, StorageFormat, scaled

_SCALE = "_scale"


class RowScaled(StorageFormat):
    def unpack(self, tensors: Tensors) -> None:
        weights = {}
        for name, entry in tensors.entries.items():
            if entry.dtype in (*FP8, "int8") and name.endswith(".weight") and f"{name}{_SCALE}" in tensors.entries:
                layer = Layer(tensors, name, f"{entry.dtype} with a scale per row")
                weights[name] = scaled(layer, f"{name}{_SCALE}", (entry.dtype,), layer.extras("input_scale"))
        tensors.pack(weights)
