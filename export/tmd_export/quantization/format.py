"""What a number format does to the products of a graph: which nodes round, and how weights are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ..checkpoints.mapped import Codes
from .layers import Layer

if TYPE_CHECKING:
    import onnx_ir as ir

NUMPY: Mapping[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int8: np.int8,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
}

Form = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class Format(ABC):
    """`headroom` over a calibrated range, and whether `attention`'s products are quantized where this is asked for.

    `budget`: relative L2 error of a graph's result that quantization may make; layers are kept until it is met.
    """

    headroom: float
    attention: bool
    budget: float
    ir_version: ClassVar[int] = 10  # of ONNX files, from which on there is the type

    def of(self, layer: Layer, kept: bool = False) -> Format | None:
        """The format of `layer` in a graph that is asked for in this one; None: it is not quantized.

        `kept`: the layer is one of those that the table of layers keeps from this format.
        """
        return None if kept else self

    @abstractmethod
    def activation(
        self, graph: ir.Graph, value: ir.Value, name: str, largest: float, before: ir.Node, dtype: torch.dtype
    ) -> ir.Value:
        """`value`, an activation in `dtype`, rounded with `largest` as the largest value there is."""

    @abstractmethod
    def parts(self, shape: torch.Size, dtype: torch.dtype) -> dict[str, Form]:
        """What a weight `[K, N]` of a graph in `dtype` is written as: ending of a name -> shape and type."""

    @abstractmethod
    def stored(self, parts: Mapping[str, ir.Value], name: str, before: ir.Node, dtype: torch.dtype) -> ir.Value:
        """The weight made of its `parts`, in `dtype`."""

    def kept(self, part: str, codes: Codes, dtype: torch.dtype) -> Tensor | None:
        """One of the `parts` of a weight that comes as `codes` of its transpose, as they are; None: the weight is
        rounded anew."""
        return None

    @abstractmethod
    def scales(self, pieces: Iterable[Tensor], dtype: torch.dtype) -> Any:
        """What `chunks` needs to know of the whole weight; `pieces` are rows of it, in float32."""

    @abstractmethod
    def chunks(self, part: str, pieces: Iterable[Tensor], scales: Any) -> Iterator[Tensor]:
        """One of the `parts`, as it is written. `pieces` have rows in multiples of 16, as far as the weight has."""
