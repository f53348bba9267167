"""The two number formats: what they can hold, and how far from their end a calibrated range is placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """`largest` finite value, `headroom` over a calibrated range, and whether attention's products are quantized too.

    E4M3 is a floating-point format: range to spare costs no precision until values become subnormal, and removes the
    failure of a value beyond its calibrated range. Integers have no such slack.
    """

    onnx: str
    dtype: torch.dtype
    largest: float
    headroom: float
    attention: bool

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, already divided by their scale, to the nearest of the format; ties to even, ends saturate."""
        bounded = values.clamp(-self.largest, self.largest)
        return (bounded if self.dtype.is_floating_point else bounded.round()).to(self.dtype)


FORMATS: Mapping[str, Format] = {
    "int8": Format("INT8", torch.int8, 127.0, 1.0, attention=False),
    "fp8": Format("FLOAT8E4M3FN", torch.float8_e4m3fn, 448.0, 4.0, attention=True),
}
"""Precision -> its format. int8 is symmetric: TensorRT takes no other zero point than zero."""
