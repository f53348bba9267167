"""From a source of weights to a bundle: every graph traced, written, checked and compared, then the manifest."""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from tmd_engines import SCHEMA_VERSION, Bundle, BundleWriter, Manifest, TensorSpec
from tmd_engines.bundle import format_size
from tmd_engines.files import sha256_hex
from tmd_ref.text import EOS_ID, PAD_ID

from . import verify as accuracy
from .errors import ExportError
from .graphs import spatial_stride, temporal_stride
from .lint import lint
from .parts import ordered
from .sources import TOKENIZER, Source
from .storage import STORAGES, store_float16
from .trace import OPSET, save, trace

VIDEO = {"tiny": {"frames": 17, "width": 64, "height": 64, "fps": 8}}
WAN_VIDEO = {"frames": 81, "width": 832, "height": 480, "fps": 16}

# What the built-in student is trained for, and what TMD reports for Wan.
SAMPLER = {
    "rule": "transition",
    "steps": 2,
    "inner_steps": 2,
    "allowed_steps": [1, 2, 3, 4],
    "allowed_inner_steps": [1, 2, 4],
    "shift": 10.0,
    "inner_shift": 10.0,
    "t_max": 0.999,
}
STAGES = ("build", "trace", "write", "verify")


class Progress(NamedTuple):
    """Told before each stage of each graph: `done` of `total` graphs are over, `graph` is now in `stage`."""

    graph: str
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class GraphReport:
    """What became of one graph. `bytes` counts the graph and its data; `rounded` the values changed by fp16 storage."""

    name: str
    nodes: int
    bytes: int
    seconds: float
    rounded: int
    accuracy: accuracy.Accuracy | None


@dataclass(frozen=True)
class ExportResult:
    bundle: Bundle
    graphs: tuple[GraphReport, ...]


def export_bundle(
    source: Source,
    out: str | Path,
    parts: tuple[str, ...] | None = None,
    *,
    weights: str = "fp32",
    verify: bool = True,
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> ExportResult:
    """Writes the bundle `out` with the graphs `parts` (None: all that the source is good for), complete or not at all.

    `weights` is how constants are stored, "fp32" or "fp16"; the arithmetic is fp32 in both. `verify=False` skips the
    comparison with the reference, and the manifest then says that nothing was measured. `report` hears of progress.

    Raises ExportError if the source lacks something, a graph breaks a rule or a gate, or the machine is too small;
    BundleError if `out` cannot be written; ValueError for an unknown part or kind of weights.
    """
    chosen = ordered(source.default_parts if parts is None else parts)
    if weights not in STORAGES:
        raise ValueError(f"weights cannot be stored as {weights!r}: choose among {', '.join(STORAGES)}.")
    source.check(chosen)
    with BundleWriter(out, overwrite=overwrite) as writer:
        _check_room(source, chosen, writer.folder, weights)
        entries: dict[str, dict[str, Any]] = {}
        reports = []
        tokenizer = source.tokenizer if "text_encoder" in chosen else None
        document = _manifest(source, chosen, TOKENIZER if tokenizer else None, entries)
        try:
            if tokenizer:
                shutil.copyfile(tokenizer, writer.folder / TOKENIZER)
            for done, part in enumerate(chosen):
                tell = _told(report, part, done, len(chosen))
                reports.append(_export(source, part, writer.folder, weights, verify, document, tell))
        except OSError as error:
            raise ExportError(
                f"{writer.target.parent} cannot be written: {error}. Free some space, or choose another --out."
            ) from error
        return ExportResult(writer.commit(document), tuple(reports))


def _export(
    source: Source,
    part: str,
    folder: Path,
    weights: str,
    verify: bool,
    document: dict[str, Any],
    tell: Callable[[str], None],
) -> GraphReport:
    """Writes one graph into `folder` and its entry into `document`."""
    start = time.perf_counter()
    tell("build")
    graph = source.graph(part)
    inputs, outputs = graph.inputs, graph.outputs
    cases = accuracy.reference(graph) if verify else []
    tell("trace")
    model = trace(graph)
    rounded = store_float16(model) if weights == "fp16" else 0
    tell("write")
    path = save(model, folder, part)
    del graph, model
    gc.collect()  # they refer to themselves; without this ONNX Runtime's copy of the weights would come on top
    nodes = lint(path, inputs, outputs)
    data = path.with_name(f"{path.name}.data")
    document["graphs"][part] = _entry(path, data if data.exists() else None, inputs, outputs, weights)
    found = None
    if verify:
        tell("verify")
        found = accuracy.measure(_unfinished(folder, document, part), part, cases)
        accuracy.check(part, found, exact_weights=not rounded)
        document["graphs"][part]["accuracy"] = found.entry()
    size = sum(file.stat().st_size for file in (path, data) if file.exists())
    return GraphReport(part, nodes, size, time.perf_counter() - start, rounded, found)


def _told(report: Callable[[Progress], None] | None, part: str, done: int, total: int) -> Callable[[str], None]:
    return lambda stage: report(Progress(part, stage, done, total)) if report else None


def _entry(
    path: Path, data: Path | None, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], weights: str
) -> dict[str, Any]:
    return {
        "file": path.name,
        "data": data.name if data else None,
        "opset": OPSET,
        "precision": "fp32",
        "storage": weights,
        "inputs": [spec.model_dump(mode="json") for spec in inputs],
        "outputs": [spec.model_dump(mode="json") for spec in outputs],
        "accuracy": None,
    }


def _unfinished(folder: Path, document: dict[str, Any], part: str) -> Bundle:
    """The files of one graph as a bundle that an engine can load, before there is a bundle."""
    entry = document["graphs"][part]
    files = {}
    for name in filter(None, (entry["file"], entry["data"], document["text"]["tokenizer"])):
        with open(folder / name, "rb", buffering=0) as file:
            files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": sha256_hex(file)}
    return Bundle(folder, Manifest.model_validate_json(_json({**document, "graphs": {part: entry}, "files": files})))


def _manifest(source: Source, parts: tuple[str, ...], tokenizer: str | None, graphs: dict[str, Any]) -> dict[str, Any]:
    wan, vae = source.wan, source.vae
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": source.model,
            "family": "wan2.1-t2v",
            "kind": "tmd",
            "dim": wan.dim,
            "num_layers": wan.num_layers,
            "head_blocks": source.head_blocks,
            "num_heads": wan.num_heads,
            "head_dim": wan.head_dim,
            "patch_size": list(wan.patch_size),
            "fusion": source.fusion,
        },
        "sampler": dict(SAMPLER),
        "latents": {
            "channels": vae.z_dim,
            "temporal_stride": temporal_stride(vae.temporal_downsample),
            "spatial_stride": spatial_stride(vae.dim_mult),
            "mean": list(vae.latents_mean),
            "std": list(vae.latents_std),
        },
        "video": dict(VIDEO.get(source.model, WAN_VIDEO)),
        "text": {
            "tokenizer": tokenizer,
            "max_length": wan.text_len,
            "dim": wan.text_dim,
            "pad_id": PAD_ID,
            "eos_id": EOS_ID,
        },
        "graphs": graphs,
        "provenance": {
            "source": source.origin,
            "source_sha256": source.sha256(parts),
            "tool": f"tmd-export {_version('tmd') or 'from its sources'}",
            "versions": _versions(),
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    """The libraries that shape a graph or measured it."""
    libraries = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
    found = {"python": platform.python_version(), **{name: _version(name) for name in libraries}}
    return {name: said for name, said in found.items() if said}


def _check_room(source: Source, parts: tuple[str, ...], folder: Path, weights: str) -> None:
    """Says at once, and not after an hour, that this machine is too small. Raises ExportError."""
    sizes = {part: source.estimated_bytes(part) for part in parts}
    needed = sum(sizes.values()) // (2 if weights == "fp16" else 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"the bundle takes about {format_size(needed)}, and {format_size(free)} are free in {folder.parent}: "
            "free some space, choose another --out, fewer --parts, or --weights fp16."
        )
    largest = max(sizes, key=sizes.__getitem__)
    memory = _physical_memory()
    if memory and sizes[largest] > 0.95 * memory:
        raise ExportError(
            f"{largest} has {format_size(sizes[largest])} of weights, which must fit into the {format_size(memory)} of "
            "memory of this machine: choose other --parts, or a larger machine."
        )


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None  # Windows
