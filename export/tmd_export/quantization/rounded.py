"""Float32 graphs of which some layers are quantized: the roundings of a written graph, and no others.

The weights are quantized once, into a file beside the graph's own, and not in every pass: ONNX Runtime quantizes about
20 million values per second of a core, and dequantizes ten times as many.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..weights.weights import Weights
from .formats import FORMATS
from .layers import Layer, find
from .qdq import quantize
from .sessions import open_session

if TYPE_CHECKING:
    import onnx_ir as ir

Arrays = dict[str, np.ndarray]
_ALIGNMENT = 1 << 12


class Rounded:
    """The float32 graph `path` as it would be in `precision`, with some of its `layers` kept out of it.

    `layers` are those that can be kept: a format may have another one for what it does not take.
    """

    def __init__(self, path: Path, precision: str, ranges: Mapping[str, float], products: str) -> None:
        self.path, self._precision, self._ranges, self._products = path, precision, ranges, products
        self._file = path.with_name(f"{path.name}.{precision}")
        self._stored: dict[tuple[Any, ...], ir.TensorProtocol] = {}  # parts of quantized weights: name, type, shape
        self._session: tuple[frozenset[str], Any] | None = None  # of the layers that were kept last
        exact = self.exact()
        self.outputs = [value.name or "" for value in exact.graph.outputs]
        asked = FORMATS[precision]
        self.layers = [layer.name for layer in self.find(exact) if asked.of(layer) != asked.of(layer, kept=True)]

    def exact(self) -> ir.Model:
        """The graph as it is."""
        import onnx_ir as ir

        return ir.load(self.path)

    def find(self, model: ir.Model) -> list[Layer]:
        """The layers of `model`, which is `exact()`, that `precision` quantizes in one format or another."""
        return find(model, self._products, FORMATS[self._precision].attention)

    def quantized(self, kept: Collection[str] = (), exact: Collection[str] = ()) -> ir.Model:
        """The graph with all layers quantized but those `kept` out of the format, and those that stay `exact`."""
        model, names = self.exact(), (frozenset(kept), frozenset(exact))
        weights, products = _InFile(model), self._products
        stored = quantize(model, weights, self._precision, self._ranges, products, *names, dtype=torch.float32)
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                key = name, value.dtype, str(value.shape)
                if key not in self._stored:
                    self._stored[key] = self._append(value, stored.chunks(name))
                value.const_value = self._stored[key]
        return model

    def __call__(self, inputs: Mapping[str, np.ndarray], kept: Collection[str] = ()) -> Arrays:
        """The graph's outputs with all layers quantized but those `kept`."""
        asked = frozenset(kept)
        if self._session is None or self._session[0] != asked:
            self._session = None  # before the next one takes memory
            self._session = asked, open_session(self.quantized(asked), self.path.parent)
        return dict(zip(self.outputs, self._session[1].run(self.outputs, dict(inputs)), strict=True))

    def close(self) -> None:
        """Lets go of the session and of the file of quantized weights."""
        self._session = None
        self._stored.clear()
        self._file.unlink(missing_ok=True)

    def _append(self, value: ir.Value, chunks: Any) -> ir.TensorProtocol:
        """The tensor of `value`, whose values now stand in the file of quantized weights."""
        import onnx_ir as ir

        if value.name is None or value.shape is None or value.dtype is None:
            raise ValueError(f"{value.name} has no name, shape or type")
        path = self._file
        with open(path, "ab") as file:
            file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            file.truncate(file.tell())
            offset = file.tell()
            for chunk in chunks:
                file.write(chunk.reshape(-1).view(torch.uint8).numpy().data)
            length = file.tell() - offset
        return ir.ExternalTensor(
            path.name, offset, length, value.dtype, shape=value.shape, name=value.name, base_dir=path.parent
        )


class _InFile(Weights):
    """The weights of a written graph, as it has them."""

    def __init__(self, model: ir.Model) -> None:
        self._values = {name: value.const_value for name, value in model.graph.initializers.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def form(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return torch.Size(self._tensor(name).shape.numpy()), torch.float32

    def laid_out(self, name: str) -> Tensor:
        tensor: Any = self._tensor(name)
        shape = tuple(tensor.shape.numpy())
        if not hasattr(tensor, "offset"):
            return torch.from_numpy(np.array(tensor.numpy()))
        # Private pages: torch warns of arrays that cannot be written, although nothing is.
        return torch.from_numpy(np.memmap(tensor.path, np.float32, "c", tensor.offset or 0, shape))

    def codes(self, name: str) -> None:
        """None: a written graph has no numbers of the checkpoint."""

    def _tensor(self, name: str) -> ir.TensorProtocol:
        tensor = self._values[name]
        if tensor is None:
            raise ValueError(f"{name} has no values")
        return tensor
