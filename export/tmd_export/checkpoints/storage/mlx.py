"""MLX's affine integers, as FastVideo's FastMetal writes them: `mlx_dit.safetensors` beside `mlx_dit.json`.

The file of JSON says how weights are quantised. Such a weight `K` is a matrix of uint32, each with 4 bytes or 8 halves
of bytes, the lowest bits first; `K.scales` and `K.biases` have a value per group of columns. W = scale · q + bias.
Sources: FastVideo `fastvideo/mlx_runtime/checkpoint.py`; MLX's documentation of `mlx.core.quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tmd_engines.errors import quote

from ...errors import ExportError
from ..documents import read_document
from ..mapped import Entry, Packed, Tensors
from .format import SCALES, Layer, StorageFormat
from .rows import by_rows

_VERSION = 1
_MAX_JSON = 16 << 20
_BITS = (4, 8)


class Mlx(StorageFormat):
    def unpack(self, tensors: Tensors) -> None:
        names = [name for name, entry in tensors.entries.items() if entry.dtype == "uint32"]
        names = [name for name in names if f"{name}.scales" in tensors.entries]
        if not names:
            return
        beside = tensors.files[0].with_suffix(".json")
        bits, group = _how(tensors.files[0], beside)
        tensors.beside = (beside,)
        tensors.pack({name: _affine(Layer(tensors, name, f"MLX int{bits}"), bits, group) for name in names})


def _how(path: Path, beside: Path) -> tuple[int, int]:
    """Bits per weight and columns per group, from the file of JSON. Raises ExportError for what is not read here."""
    if not beside.is_file():
        raise ExportError(
            f"{path} is quantised by MLX, and {beside.name}, which says how, is not beside it: copy that file too."
        )
    document = read_document(beside, _MAX_JSON)
    version, how = document.get("format_version"), document.get("quantization")
    if version != _VERSION or not isinstance(how, Mapping):
        raise ExportError(
            f"{beside} has format_version {quote(str(version), 40)} and quantization {quote(str(how), 80)}: version "
            f"{_VERSION} with a quantization is read here. Take the model from its publisher again, or in bfloat16."
        )
    mode, bits, group = (how.get(key) for key in ("mode", "bits", "group_size"))
    if mode != "affine" or bits not in _BITS or type(group) is not int or group < 1:
        raise ExportError(
            f"{path} is quantised by MLX in the mode {quote(str(mode), 40)} with {quote(str(bits), 20)} bits: affine "
            f"with {' or '.join(map(str, _BITS))} bits is read here. Take the same model so, or in bfloat16."
        )
    return bits, group


def _affine(layer: Layer, bits: int, group: int) -> Packed:
    packed = layer.matrix(("uint32",))
    rows, columns = packed.shape[0], packed.shape[1] * 32 // bits
    groups = columns // group
    if columns % group:
        raise layer.error(f"{quote(layer.weight)} has {columns} columns, no whole groups of {group}")
    scales, biases = f"{layer.weight}.scales", f"{layer.weight}.biases"
    for name in (scales, biases):
        layer.entry(name, SCALES, (rows * groups,))

    def read() -> Tensor:
        words = layer.tensors.read_stored(layer.weight).view(torch.uint8)
        scale, bias = (layer.numbers(name).reshape(rows, groups, 1) for name in (scales, biases))

        def some(piece: slice) -> Tensor:
            q = words[piece]
            if bits == 4:
                q = torch.stack([q & 15, q >> 4], dim=-1)
            return (scale[piece] * q.reshape(-1, groups, group).float() + bias[piece]).reshape(-1, columns)

        return by_rows((rows, columns), some)

    return Packed(Entry((rows, columns), "bfloat16"), layer.form, (layer.weight, scales, biases), read)
