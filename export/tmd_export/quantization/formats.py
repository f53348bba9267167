"""Precision -> the format of its products. int8 is symmetric: TensorRT takes no other zero point than zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .blocks import Blocks
from .format import Format
from .scaled import Scaled

INT8 = Scaled(1.0, False, 0.05, "INT8", torch.int8, 127.0)
FP8 = Scaled(4.0, True, 0.05, "FLOAT8E4M3FN", torch.float8_e4m3fn, 448.0)
NVFP4 = Blocks(FP8.headroom, True, 0.1, FP8)

FORMATS: Mapping[str, Format] = {"int8": INT8, "fp8": FP8, "nvfp4": NVFP4}
