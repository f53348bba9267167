"""ComfyUI's quantised layers: each says its own format, in a tensor `X.comfy_quant` or in the header of the file.

`X.comfy_quant` holds JSON as bytes, the header's `_quantization_metadata` the same for all layers, and a GGUF file (in
the type that its writers call Q8_CR) `comfy.gguf.quant.X.weight`. Beside `X.weight` lies `X.weight_scale`.

Sources: ComfyUI `comfy/ops.py` (`_load_quantized_module`) and `comfy/quant_ops.py`, comfy-kitchen `tensor/` and
`backends/eager/quantization.py`, for int8 with ConvRot also arXiv 2512.03673.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from tmd_engines.bundle.float4 import VALUES
from tmd_engines.bundle.strict_json import read_json
from tmd_engines.errors import quote

from ...errors import ExportError
from ..mapped import Entry, Packed, Tensors
from ..names import bare
from .blocks import unswizzled
from .format import SCALES, Layer, StorageFormat, scaled
from .hadamard import hadamard, is_power_of_four
from .rows import by_rows

_MARK, _HEADER, _IN_GGUF = ".comfy_quant", "_quantization_metadata", "comfy.gguf.quant."
_MAX_MARK = 1 << 16  # bytes
_UNUSED = ("comfy_quant", "input_scale")  # the scale of activations, for products in fp8

Conf = Mapping[str, Any]


class ComfyQuants(StorageFormat):
    def unpack(self, tensors: Tensors) -> None:
        confs = _from_marks(tensors)
        for weight, conf in {**_from_header(tensors), **_from_gguf(tensors)}.items():
            confs.setdefault(weight, conf)
        weights = {}
        for weight, conf in confs.items():
            name = conf.get("format") if isinstance(conf, Mapping) else None
            if not isinstance(name, str) or name not in QUANTS:
                raise ExportError(
                    f"{tensors.files[0]} stores {quote(weight)} in ComfyUI's format {quote(str(name), 40)}, which is "
                    f"not read here: take the same model as {', '.join(QUANTS)}, GGUF, float16 or bfloat16."
                )
            weights[weight] = QUANTS[name](Layer(tensors, weight, f"ComfyUI {name}"), conf)
        tensors.pack(weights)


def _from_marks(tensors: Tensors) -> dict[str, Conf]:
    """Stored weight -> what its own tensor of JSON says."""
    found = {}
    for name in [name for name in tensors.entries if name.endswith(_MARK)]:
        entry = tensors.entries[name]
        if entry.dtype != "uint8" or prod(entry.shape) > _MAX_MARK:
            raise ExportError(
                f"{tensors.files[0]} has {quote(name)} as {entry.dtype} of {list(entry.shape)}, where ComfyUI puts a "
                "few bytes of JSON: the file is damaged. Copy it again."
            )
        conf = _json(tensors, name, bytes(tensors.read_stored(name).flatten().tolist()))
        found[f"{name.removesuffix(_MARK)}.weight"] = conf
    return found


def _from_header(tensors: Tensors) -> dict[str, Conf]:
    """The same from the metadata, whose names lack the prefix that the tensors may have."""
    if _HEADER not in tensors.metadata:
        return {}
    document = _json(tensors, _HEADER, tensors.metadata[_HEADER].encode())
    layers = document.get("layers")
    if not isinstance(layers, Mapping):
        raise ExportError(f"{tensors.files[0]} has {_HEADER} without layers: the file is damaged. Copy it again.")
    stored = {bare(name): name for name in tensors.entries}
    return {stored.get(bare(f"{layer}.weight"), f"{layer}.weight"): conf for layer, conf in layers.items()}


def _from_gguf(tensors: Tensors) -> dict[str, Conf]:
    return {
        key.removeprefix(_IN_GGUF): _json(tensors, key, text.encode())
        for key, text in tensors.metadata.items()
        if key.startswith(_IN_GGUF)
    }


def _json(tensors: Tensors, name: str, data: bytes) -> Conf:
    try:
        document = read_json(data)
    except ValueError as error:
        document, reason = None, str(error)
    else:
        reason = "it is no object"
    if not isinstance(document, Mapping):
        raise ExportError(
            f"{tensors.files[0]} has {quote(name)}, which should be JSON and is not ({reason}): copy the file again."
        )
    return document


def _fp8(dtype: str) -> Callable[[Layer, Conf], Packed]:
    """W = weight · weight_scale, one scale per tensor (or row)."""
    return lambda layer, _: scaled(layer, f"{layer.weight}_scale", (dtype,), layer.extras(*_UNUSED))


def _int8(layer: Layer, conf: Conf) -> Packed:
    """W = weight · weight_scale, one scale per tensor or row; with ConvRot the columns are rotated back by groups."""
    inside = conf.get("params")
    conf = {**inside, **conf} if isinstance(inside, Mapping) else conf
    scale, parts = f"{layer.weight}_scale", layer.extras(*_UNUSED)
    rotated = conf.get("convrot", False)
    if rotated and conf.get("weight_rotated", True) is not True:
        raise layer.error(f"{quote(layer.weight)} is said to have convrot and no rotated weight")
    if not rotated:
        return scaled(layer, scale, ("int8",), parts)
    rows, columns = layer.matrix(("int8",)).shape
    layer.entry(scale, SCALES, (1, rows))
    group = conf.get("convrot_groupsize", 256)
    if not is_power_of_four(group) or columns % group:
        raise layer.error(f"{quote(layer.weight)} has {columns} columns, rotated by groups of {quote(str(group), 20)}")

    def read() -> Tensor:
        stored, factor = layer.tensors.read_stored(layer.weight), layer.numbers(scale).reshape(-1, 1).expand(rows, 1)
        turn = hadamard(group)

        def some(piece: slice) -> Tensor:
            return ((stored[piece].float() * factor[piece]).reshape(-1, group) @ turn).reshape(-1, columns)

        return by_rows((rows, columns), some)

    form = f"{layer.form} with ConvRot"
    return Packed(Entry((rows, columns), "bfloat16"), form, (layer.weight, scale, *parts), read)


def _mxfp8(layer: Layer, _: Conf) -> Packed:
    """OCP MXFP8: fp8 in groups of 32 columns, each with a power of two as scale, stored as its exponent (e8m0)."""
    rows, columns = layer.matrix(("float8_e4m3fn",)).shape
    scale, groups = f"{layer.weight}_scale", _groups(layer, columns, 32)
    layer.entry(scale, ("float8_e8m0fnu", "uint8"), (_swizzled_count(rows, groups),))

    def read() -> Tensor:
        stored = layer.tensors.read_stored(layer.weight)
        exponents = unswizzled(layer.tensors.read_stored(scale).view(torch.uint8), rows, groups)
        factor = exponents.view(torch.float8_e8m0fnu)

        def some(piece: slice) -> Tensor:
            q = stored[piece].float().reshape(-1, groups, 32)
            return (q * factor[piece].float().unsqueeze(-1)).reshape(-1, columns)

        return by_rows((rows, columns), some)

    parts = (layer.weight, scale, *layer.extras(*_UNUSED))
    return Packed(Entry((rows, columns), "bfloat16"), layer.form, parts, read)


def _nvfp4(layer: Layer, _: Conf) -> Packed:
    """NVFP4: two e2m1 per byte, the high half first; groups of 16 columns with a scale in e4m3; one scale for all.

    With `pre_quant_scale` the layer multiplies its input by it, column by column, so that it belongs to the weight.
    """
    stored_rows, half = layer.matrix(("uint8",)).shape
    rows, columns = stored_rows, 2 * half
    scale, whole, groups = f"{layer.weight}_scale", f"{layer.weight}_scale_2", _groups(layer, columns, 16)
    layer.entry(scale, ("float8_e4m3fn", "uint8"), (_swizzled_count(rows, groups),))
    layer.entry(whole, SCALES, (1,))
    before = layer.extras("pre_quant_scale")
    for name in before:
        layer.entry(name, SCALES, (columns,))

    def read() -> Tensor:
        stored, total = layer.tensors.read_stored(layer.weight), layer.numbers(whole).reshape(1, 1)
        small = unswizzled(layer.tensors.read_stored(scale).view(torch.uint8), rows, groups)
        factor, values = small.view(torch.float8_e4m3fn), torch.tensor(VALUES)
        smooth = layer.numbers(before[0]).reshape(1, columns) if before else None

        def some(piece: slice) -> Tensor:
            q = torch.stack([stored[piece] >> 4, stored[piece] & 15], dim=-1)
            q = values[q.int()].reshape(-1, groups, 16)
            weight = (q * (total * factor[piece].float()).unsqueeze(-1)).reshape(-1, columns)
            return weight if smooth is None else weight * smooth

        return by_rows((rows, columns), some)

    parts = (layer.weight, scale, whole, *before, *layer.extras(*_UNUSED))
    return Packed(Entry((rows, columns), "bfloat16"), layer.form, parts, read)


def _groups(layer: Layer, columns: int, size: int) -> int:
    if columns % size:
        raise layer.error(f"{quote(layer.weight)} has {columns} columns, no whole groups of {size}")
    return columns // size


def _swizzled_count(rows: int, groups: int) -> int:
    """Values of a tensor of scales that is filled up to whole tiles of 128 rows and 4 groups."""
    return -(-rows // 128) * 128 * (-(-groups // 4) * 4)


QUANTS: dict[str, Callable[[Layer, Conf], Packed]] = {
    "float8_e4m3fn": _fp8("float8_e4m3fn"),
    "float8_e5m2": _fp8("float8_e5m2"),
    "int8_tensorwise": _int8,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
}
"""Format -> how the weight of a layer is made of its tensors."""
