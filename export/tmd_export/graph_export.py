"""One graph of a bundle: traced, written, checked against the rules and compared with the reference.

Small graphs are compared as a whole. A large one would not fit into memory twice, as reference and as graph. It is the
same block many times, so a copy with few of them takes the same path through the exporter and is compared in its place.
The written file is then checked to be this copy with more blocks, and to hold every weight of the source.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmd_engines import Bundle
from tmd_engines.bundle.files import sha256_hex
from tmd_engines.bundle.manifest import parse_manifest

from .errors import ExportError
from .families.build import blocks_of, build, kept_blocks
from .graphs import accuracy
from .graphs.graph import Graph
from .graphs.rules import lint
from .graphs.trace import OPSET, trace
from .sources.source import Source
from .weights.int8 import to_int8
from .weights.storage import Stored, compare, save
from .weights.tables import write_table
from .weights.weights import Weights

if TYPE_CHECKING:
    from .quantization.decoder import DecoderQuantizer
    from .quantization.quantizer import Quantizer

LARGE_BYTES = 1 << 30  # of weights in float32; above it, a copy with KEPT_BLOCKS blocks is compared
KEPT_BLOCKS = 2

Tell = Callable[..., None]
"""Called with (stage, bytes done, bytes in all) of one graph; the stages are calibrate, trace, write and verify."""


@dataclass(frozen=True)
class GraphReport:
    """What became of one graph. `bytes` counts the graph and its data."""

    name: str
    precision: str
    nodes: int
    bytes: int
    seconds: float
    accuracy: accuracy.Accuracy | None


def export_graph(
    source: Source,
    part: str,
    precision: str,
    folder: Path,
    document: dict[str, Any],
    verify: bool,
    tell: Tell,
    quantizer: Quantizer | DecoderQuantizer | None = None,
) -> GraphReport:
    """Writes the graph `part` into `folder` and its entry into the manifest `document`. Raises ExportError.

    `quantizer` is for graphs whose precision needs one.
    """
    start = time.perf_counter()
    if quantizer:
        quantizer.prepare(tell)
    tell("trace")
    graph, weights = build(source, part, precision)
    path, stored = _write(graph, weights, precision, folder, tell, quantizer)
    if any(spec.name == "token_embeds" for spec in graph.inputs):
        document["text"]["embedding"] = write_table(source, precision, folder)
    nodes = lint(path, graph.inputs, graph.outputs)
    entry = document["graphs"][part] = _entry(path, graph, precision)
    found = None
    if verify:
        tell("verify")
        large = weights.bytes(as_float32=True) > LARGE_BYTES and blocks_of(graph.module)
        if quantizer:
            found = quantizer.measure(unfinished(folder, document, {part: entry}), part)
            if large:
                compare(path, stored, lambda done, size: tell("verify", done, size))
        elif large:
            found = _compare_short(source, graph, stored, precision, path, document, tell)
        else:
            cases = _reference(source, part, None, weights)
            found = accuracy.measure(unfinished(folder, document, {part: entry}), part, cases)
        accuracy.check(part, found, precision)
        entry["accuracy"] = found.entry()
    size = sum(file.stat().st_size for file in (path, _data(path)) if file.exists())
    return GraphReport(part, precision, nodes, size, time.perf_counter() - start, found)


def _write(
    graph: Graph,
    weights: Weights,
    precision: str,
    folder: Path,
    tell: Tell | None = None,
    quantizer: Quantizer | DecoderQuantizer | None = None,
) -> tuple[Path, Stored]:
    """Path of the graph's file, and the weights that were written."""
    model = trace(graph, weights)
    stored: Stored = weights
    if precision == "int8-weights":
        stored = to_int8(model, weights)
    elif quantizer:
        stored = quantizer.quantize(model, weights, graph.name)
    path = save(model, stored, folder, graph.name, tell and (lambda done, total: tell("write", done, total)))
    del model
    gc.collect()  # it refers to itself, and what comes next needs the memory
    return path, stored


def _reference(source: Source, part: str, blocks: int | None, weights: Weights) -> list[accuracy.Case]:
    """What the reference computes in float32, with the weights that the graph of `weights` uses."""
    graph, exact = build(source, part, "fp32", blocks)
    exact.drop_unused(set(weights.specs))
    exact.fill(graph.module)
    return accuracy.reference(graph)


def _compare_short(
    source: Source,
    graph: Graph,
    stored: Stored,
    precision: str,
    path: Path,
    document: dict[str, Any],
    tell: Tell,
) -> accuracy.Accuracy:
    """Accuracy of the graph `path`, measured on a copy with few blocks. Raises ExportError if the two are not alike."""
    part = graph.name
    _, blocks = blocks_of(graph.module)  # type: ignore[misc]
    total, folder = len(blocks), path.parent / "short"
    numbers = kept_blocks(blocks, KEPT_BLOCKS)
    folder.mkdir()
    try:
        short, its_weights = build(source, part, precision, KEPT_BLOCKS)
        short_path, _ = _write(short, its_weights, precision, folder)
        _check_likeness(path, short_path, total - len(numbers))
        cases = _reference(source, part, KEPT_BLOCKS, its_weights)
        bundle = unfinished(folder, document, {part: _entry(short_path, short, precision)})
        found = accuracy.measure(bundle, part, cases, as_stored=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    count = compare(path, stored, lambda done, size: tell("verify", done, size))
    scope = f"on blocks {' and '.join(map(str, numbers))} of {total} and {count} weights compared with their source"
    return replace(found, scope=", ".join(filter(None, (found.scope, scope))))


def _check_likeness(path: Path, short: Path, more: int) -> None:
    """Raises ExportError unless the graph `path` is `short` with `more` further blocks, counted by operators."""
    import onnx

    few, many = (
        Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node) for file in (short, path)
    )
    for operator in few | many:
        added = many[operator] - few[operator]
        if added < 0 or (added % more if more else added):
            raise ExportError(
                f"{path.name} has {many[operator]} {operator} nodes, and with {more} blocks less {few[operator]}: its "
                "blocks are not all alike, so that comparing few of them says nothing. Use the versions in "
                "constraints.txt."
            )


def _data(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _entry(path: Path, graph: Graph, precision: str) -> dict[str, Any]:
    return {
        "file": path.name,
        "data": _data(path).name if _data(path).exists() else None,
        "opset": OPSET,
        "precision": "fp32" if precision == "int8-weights" else precision,
        "storage": "int8" if precision == "int8-weights" else None,
        "inputs": [spec.model_dump(mode="json") for spec in graph.inputs],
        "outputs": [spec.model_dump(mode="json") for spec in graph.outputs],
        "accuracy": None,
    }


def unfinished(folder: Path, document: dict[str, Any], entries: dict[str, dict[str, Any]]) -> Bundle:
    """The files of a few graphs as a bundle that an engine can load, before there is a bundle.

    `entries`: graph -> its entry in the manifest. The text encoder brings tokenizer and tables, if they are there.
    """
    names = [entry[key] for entry in entries.values() for key in ("file", "data") if entry[key]]
    text = dict(document["text"])
    if "text_encoder" not in entries:
        text = {key: value for key, value in text.items() if key not in ("tokenizer", "embedding", "null_embeds")}
    elif (tokenizer := text["tokenizer"]) and (folder / tokenizer).is_file():
        names.append(tokenizer)
    else:
        text["tokenizer"] = None
    files = {}
    for name in names:
        with open(folder / name, "rb", buffering=0) as file:
            files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": sha256_hex(file)}
    for table in filter(None, (text.get("embedding"), text.get("null_embeds"))):
        size = table["rows"] * table["dim"] * (4 if table["dtype"] == "float32" else 2)
        files[table["file"]] = {"size": size, "sha256": "0" * 64}  # no engine opens it
    single = {**document, "text": text, "graphs": entries, "files": files}
    return Bundle(folder, parse_manifest(json.dumps(single).encode(), f"the manifest of {' and '.join(entries)}"))
