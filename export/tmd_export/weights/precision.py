"""In which precision each graph computes its large products, and which layers stay in float32 in any case.

Where a low precision begins and ends is written in the modules of `tmd_ref`: they cast to the type of a layer's weights
in front of it and back to float32 behind it. So the types of the weights decide, and this file decides those. Norms,
their statistics, modulation, gates and the residual stream are float32 always; the sums of a softmax too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import ExportError

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.bfloat16,
    "fp8": torch.bfloat16,
    "nvfp4": torch.bfloat16,
    "int8-weights": torch.float32,
}
"""Precision of a graph -> type of the weights of its large products. That of int8, fp8 and nvfp4 is what their products
return, and what stays unquantized (see `quantization`); bfloat16, because sums of attention leave float16's range.
int8-weights are int8 in the file only (see `int8`)."""

# Of autoencoders and text encoders, layers of few operations whose rounding the whole result would feel: pictures have
# more levels than 8 bits of mantissa tell apart. Those of the denoiser, its family names.
_EXACT = (
    r"pos_embedding|conv1|conv2"
    r"|encoder\.head|decoder\.(head|1|22)"  # first and last of Wan's VAE (conv1 above) and of TAEHV
)


def lower(module: nn.Module, precision: str, exact: str = "") -> None:
    """Gives the layers of `module` that make its large products the type of `precision`, in place.

    `exact`: pattern of the names of further layers that stay in float32. Raises ExportError for a module that can be in
    float32 alone.
    """
    if precision != "fp32" and getattr(module, "float32_only", False):
        raise ExportError(f"this autoencoder can be exported in fp32 only: say --precision {precision},decoder=fp32.")
    kept = re.compile(rf"(^|\.)({'|'.join(filter(None, (_EXACT, exact)))})(\.|$)")
    for path, layer in module.named_modules():
        large = isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d))
        if large and not kept.search(path):
            layer.to(DTYPES[precision])
