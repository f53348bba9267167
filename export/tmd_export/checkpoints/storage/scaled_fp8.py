"""ComfyUI's first scaled fp8: a marker `scaled_fp8`, and beside each `X.weight` in fp8 its `X.scale_weight`.

W = weight · scale_weight, one scale per tensor. `scale_input` is for products in fp8 and no part of the weights.
Comfy-Org and Kijai publish Wan so, and UMT5 (`umt5_xxl_fp8_e4m3fn_scaled`). Source: ComfyUI `comfy/utils.py`,
`convert_old_quants`.
"""

from __future__ import annotations

from ..mapped import Tensors
from .format import FP8, Layer, StorageFormat, scaled

_MARKER, _SCALE = "scaled_fp8", ".scale_weight"


class ScaledFp8(StorageFormat):
    def unpack(self, tensors: Tensors) -> None:
        markers = [name for name in tensors.entries if name.rpartition(".")[2] == _MARKER]
        weights = {}
        for name in [name for name in tensors.entries if name.endswith(_SCALE)]:
            weight = f"{name.removesuffix(_SCALE)}.weight"
            layer = Layer(tensors, weight, "scaled fp8")
            weights[weight] = scaled(layer, name, FP8, layer.extras("scale_input"))
        tensors.pack(weights, markers)
