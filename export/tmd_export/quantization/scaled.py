"""8 bits: one scale per activation, found by calibration, and one per output channel of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.mapped import Codes
from .format import NUMPY, Form, Format
from .nodes import add, constant

if TYPE_CHECKING:
    import onnx_ir as ir

VALUES, SCALES = ".quantized", ".scale"
_LEAST_SCALE = 1e-12  # of a weight whose column is zero


@dataclass(frozen=True)
class Scaled(Format):
    """Values of `dtype` (ONNX calls it `onnx`) up to `largest`, times a scale.

    E4M3 is a floating-point format: range to spare costs no precision until values become subnormal, and removes the
    failure of a value beyond its calibrated range. Integers have no such slack.
    """

    onnx: str
    dtype: torch.dtype
    largest: float

    def round(self, values: Tensor) -> Tensor:
        """`values`, already divided by their scale, to the nearest of the format; ties to even, ends saturate."""
        bounded = values.clamp(-self.largest, self.largest)
        return (bounded if self.dtype.is_floating_point else bounded.round()).to(self.dtype)

    def activation(
        self, graph: ir.Graph, value: ir.Value, name: str, largest: float, before: ir.Node, dtype: torch.dtype
    ) -> ir.Value:
        """See `Format.activation`. Scales have the type of the activation, so that no Cast comes between."""
        scale = constant(graph, f"{name}.input_scale", np.asarray(largest / self.largest or 1.0, NUMPY[dtype]))
        zero = constant(graph, "quantized_zero", np.zeros((), NUMPY[self.dtype]))
        quantized = add("QuantizeLinear", [value, scale, zero], f"{name}.input_quantized", before)
        return add("DequantizeLinear", [quantized, scale, zero], f"{name}.input", before)

    def parts(self, shape: torch.Size, dtype: torch.dtype) -> dict[str, Form]:
        """See `Format.parts`. Scales have the type of the products, so that what is dequantized needs no cast."""
        return {VALUES: (shape, self.dtype), SCALES: (shape[1:], dtype)}

    def stored(self, parts: Mapping[str, ir.Value], name: str, before: ir.Node, dtype: torch.dtype) -> ir.Value:
        """See `Format.stored`."""
        return add("DequantizeLinear", [parts[VALUES], parts[SCALES]], f"{name}.dequantized", before, axis=1)

    def kept(self, part: str, codes: Codes, dtype: torch.dtype) -> Tensor | None:
        """See `Format.kept`: numbers of the same type, with one scale per output channel."""
        scales = codes.scales.to(dtype)
        if codes.values.dtype != self.dtype or not ((scales > 0) & torch.isfinite(scales)).all():
            return None
        return scales if part == SCALES else codes.values.t()

    def scales(self, pieces: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
        """See `Format.scales`. A channel's largest value becomes the largest of the format."""
        largest = torch.stack([piece.abs().amax(0) for piece in pieces]).amax(0)
        return torch.where(largest > 0, largest / self.largest, 1.0).to(dtype)

    def chunks(self, part: str, pieces: Iterable[Tensor], scales: Tensor) -> Iterator[Tensor]:
        """See `Format.chunks`."""
        if part == SCALES:
            yield scales
            return
        for piece in pieces:
            yield self.round(piece / scales.float()).contiguous()
