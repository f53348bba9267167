"""Torch module -> ONNX graph in its canonical form: opset 23, standard operators, symbolic sizes, one data file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tmd_engines import TensorSpec

from .errors import ExportError
from .graphs import Graph

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23
# All different and none 1: torch would take equal sizes for one and a size of 1 for a constant.
TRACED = {"batch": 2, "frames": 3, "height": 4, "width": 6, "text": 5}
INLINE_BYTES = 256  # larger tensors go to the data file; shapes and scalars stay where shape inference reads them


def trace(graph: Graph) -> ir.Model:
    """`graph` as an ONNX model whose inputs and outputs are named and sized as the graph's interface says.

    The weights are torch's own memory until they are saved. Raises ExportError if torch cannot export the module, or
    if a size that should be free became a constant.
    """
    inputs = graph.random_inputs(0, **TRACED)
    with _quietly(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph.module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[spec.name for spec in graph.inputs],
                output_names=[spec.name for spec in graph.outputs],
                dynamic_shapes=_dynamic_shapes(graph, list(inputs.values())),
            )
            if program is None:
                raise RuntimeError("torch gave no program")
            _name_transposed_weights(program.model)
            program.optimize()
        except Exception as error:
            raise ExportError(
                f"torch {torch.__version__} cannot export {graph.name}: {_root_cause(error)}. "
                "Use the versions in constraints.txt."
            ) from error
    model = program.model
    _apply_interface(model, graph)
    _strip(model)
    model.graph.name = graph.name
    return model


def save(model: ir.Model, folder: Path, name: str) -> Path:
    """Writes `name.onnx` and its one data file `name.onnx.data` into `folder`; returns the path of the first."""
    import onnx_ir as ir

    path = folder / f"{name}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=INLINE_BYTES)
    return path


def _root_cause(error: BaseException) -> str:
    """First line of the error that all others wrap: torch's own message is a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:400]


def _dynamic_shapes(graph: Graph, values: list[torch.Tensor]) -> tuple[Any, ...]:
    """Torch's description of the sizes that stay free, one entry per argument of the module."""
    symbols: dict[str, Any] = {}
    shapes = []
    for spec in graph.inputs:
        free = {}
        for axis, (factor, symbol) in enumerate(spec.factors()):
            if symbol == "tokens":
                free[axis] = torch.export.Dim.AUTO  # follows from the other sizes; torch finds out how
            elif symbol is not None:
                multiple = graph.multiples.get(symbol, 1)
                unit = symbols.setdefault(symbol, torch.export.Dim(symbol if multiple == 1 else f"{symbol}_patches"))
                free[axis] = factor * multiple * unit if factor * multiple > 1 else unit
        shapes.append(free)
    caches = sum(spec.name.startswith("cache_") for spec in graph.inputs)
    if caches:  # they arrive as *caches, which torch describes as one argument
        return (*shapes[:-caches], tuple(shapes[-caches:]))
    return tuple(shapes)


def _name_transposed_weights(model: ir.Model) -> None:
    """The optimizer stores a transposed weight under the name of the transposition's result: let that tell the weight.

    Who looks into a graph, or quantizes it, finds `blocks.0.ffn.0.weight.T` where torch would have left `val_61`.
    """
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is not None and source.is_initializer() and source.name and len(source.uses()) == 1:
            node.outputs[0].name = f"{source.name}.T"


def _apply_interface(model: ir.Model, graph: Graph) -> None:
    """Puts the manifest's names for sizes in place of torch's expressions, if torch kept the same sizes free."""
    import onnx_ir as ir

    for values, specs in ((model.graph.inputs, graph.inputs), (model.graph.outputs, graph.outputs)):
        for value, spec in zip(values, specs, strict=True):
            _check_free(graph.name, value, spec)
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)


def _check_free(name: str, value: ir.Value, spec: TensorSpec) -> None:
    shape = list(value.shape) if value.shape is not None else []
    fits = len(shape) == len(spec.shape) and all(
        have == said if isinstance(said, int) else not isinstance(have, int)
        for have, said in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise ExportError(
            f"{name}: {spec.name} came out with shape {[str(size) for size in shape]} instead of {list(spec.shape)}: "
            "the module fixes a size that must stay free, or changes it."
        )


def _strip(model: ir.Model) -> None:
    """Removes torch's notes: stack traces that name this machine's folders, and types that engines infer anyway."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    kept = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.shape = value.type = None
    for value in (*kept, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences torch's notes on packages that are not there and on names of sizes, and saves a third of the time.

    The time: torch caches what an operation does to shapes, and with symbolic sizes it spends more on looking up
    than on computing anew.
    """
    import torch._dynamo

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
