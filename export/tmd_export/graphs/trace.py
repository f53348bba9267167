"""Torch module -> ONNX graph in its canonical form: opset 23, standard operators, symbolic sizes, weights by name.

Its large weights are not there: a graph is traced with placeholders, and `storage` writes what belongs in their place.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tmd_engines import TensorSpec

from ..errors import ExportError
from ..weights.weights import SMALL, Weights
from .graph import Graph

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23
# All different and none 1: torch would take equal sizes for one and a size of 1 for a constant.
TRACED = {"batch": 2, "frames": 3, "height": 4, "width": 6, "text": 5}


def trace(graph: Graph, weights: Weights) -> ir.Model:
    """`graph` as an ONNX model whose inputs and outputs are named and sized as the graph's interface says.

    Initializers that are in `weights`, by their names, are placeholders without values. `weights` forgets those that
    the graph does without. Raises ExportError if torch cannot export the module, or if a size that should be free
    became a constant.
    """
    weights.put_placeholders(graph.module)
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
            weights.drop_unused({name for name, value in program.model.graph.initializers.items() if value.uses()})
            held = _hold_out(program.model, weights)
            program.optimize()
            _put_back(program.model, held)
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


def _hold_out(model: ir.Model, weights: Weights) -> dict[str, ir.Value]:
    """Makes the large weights inputs of the graph, so that no pass of the optimizer looks at values that are not there.

    What the module does to a weight alone, transposing and flattening, becomes part of its name: it is done to the
    values when they are written.
    """
    import onnx_ir as ir

    graph = model.graph
    known = {name: value for name, value in graph.initializers.items() if name in weights}
    held = {name: value for name, value in known.items() if weights.form(name)[0].numel() > SMALL}
    for name, value in held.items():
        del graph.initializers[name]
        value.const_value = None
    names = list(held)
    for name in names:  # grows while it is read: a weight can be flattened and then transposed
        value = held[name]
        for node in value.consumers():
            suffix = {"Transpose": ".T", "Reshape": ".flat"}.get(node.op_type)
            if suffix is None or node.inputs[0] is not value:
                continue
            result, shape = node.outputs[0], ir.Shape(weights.form(name + suffix)[0])
            if result.shape is not None and result.shape != shape:
                raise RuntimeError(f"the weight {name} is used as {result.shape}, a layout that has no name")
            held[name + suffix] = laid_out = ir.Value(name=name + suffix, shape=shape, type=value.type)
            names.append(name + suffix)
            result.replace_all_uses_with(laid_out)
            graph.remove(node, safe=True)
    held = {name: value for name, value in held.items() if value.uses()}
    graph.inputs.extend(held.values())
    return held


def _put_back(model: ir.Model, held: dict[str, ir.Value]) -> None:
    """The opposite of `_hold_out`, after the optimizer."""
    for name, value in held.items():
        if not value.uses():
            raise RuntimeError(f"the optimizer dropped the weight {name}")
        model.graph.inputs.remove(value)
        model.graph.initializers[name] = value


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
        have == stated if isinstance(stated, int) else not isinstance(have, int)
        for have, stated in zip(shape, spec.shape, strict=True)
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
