"""From a source of weights to a bundle: every graph traced, written, checked and compared, then the manifest."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from tmd_engines import SCHEMA_VERSION, Bundle, BundleWriter
from tmd_engines.bundle.families import FAMILIES as MANIFEST_FAMILIES
from tmd_engines.bundle.reader import format_size
from tmd_ref import captions
from tmd_ref.scenes import Scene

from .errors import ExportError
from .families import FAMILIES, built_in, sampling_of
from .families.build import build
from .graph_export import GraphReport, Tell, export_graph
from .parts import DECODERS, QUANTIZED, UPDATE
from .plan import planned
from .presets import Preset
from .quantization.calibration import QUANTIZABLE, Calibration
from .quantization.decoder import DecoderQuantizer
from .quantization.quantizer import Quantizer
from .sources.source import TOKENIZER, Source
from .weights.int8 import int8_bytes
from .weights.tables import write_null_embeds


class Progress(NamedTuple):
    """Reported before each stage of each graph and, while weights are written or read, after each piece of them.

    `done` of `total` graphs are over, `graph` is now in `stage`, see `graph_export.Tell`; `bytes_done` of
    `bytes_total` in that stage, 0 if it does not count bytes.
    """

    graph: str
    stage: str
    done: int
    total: int
    bytes_done: int = 0
    bytes_total: int = 0


@dataclass(frozen=True)
class ExportResult:
    bundle: Bundle
    graphs: tuple[GraphReport, ...]


def export_bundle(
    source: Source,
    out: str | Path,
    parts: tuple[str, ...] | None = None,
    *,
    precision: str = "fp32",
    text_encoder_weights: str | None = None,
    preset: str | None = None,
    grid: str | None = None,
    calibration: Calibration | Sequence[str] | None = None,
    verify: bool = True,
    keep_layers: bool = True,
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> ExportResult:
    """Writes the bundle `out` with the graphs `parts` (None: all that the source is good for), complete or not at all.

    `precision` is that of the large products, for all graphs or by graph: see `parts.parse_precision`. Inputs and
    outputs are float32 in any case, but for a decoder's caches, and so is what would feel the rounding.
    `text_encoder_weights="int8"`: those of the text encoder in a quarter of float32's size, and its arithmetic in fp32.
    `preset`, one of `families.presets()`, says how the model is sampled (None: as the source says, or as its family
    usually is), `grid` one of `families.GRIDS` (None: the model's own times). `calibration` is for int8, fp8 and nvfp4:
    one of the same checkpoint, prompts to make one with, or None for built-in prompts; `keep_layers=False` spares the
    measurement of their layers, and quantizes all. `verify=False` skips the comparison with the reference, and the
    manifest then says that nothing was measured. `report` hears of progress.

    Weights pass through one at a time: the memory that this takes does not grow with the model.

    Raises ExportError if the source lacks something, a graph breaks a rule or a gate, or the disk is too small;
    BundleError if `out` cannot be written; ValueError for an unknown part or precision.
    """
    sampling = sampling_of(source, preset, grid)
    precisions = planned(source, parts, precision, text_encoder_weights)
    chosen = tuple(precisions)
    graphs = [graph for part in chosen for graph in ((part, UPDATE) if part == "flow_head" else (part,))]
    if UPDATE in graphs:
        precisions[UPDATE] = "fp32"
    with BundleWriter(out, overwrite=overwrite) as writer:
        entries: dict[str, dict[str, Any]] = {}
        reports = []
        tokenizer = source.tokenizer if "text_encoder" in chosen else None
        document = _manifest(source, sampling, chosen, TOKENIZER if tokenizer else None, entries)
        quantizer = None
        if any(precisions.get(part) in QUANTIZED for part in QUANTIZABLE):
            quantizer = Quantizer(source, document, precisions, writer.folder, calibration, verify, keep_layers)
        decoder = DecoderQuantizer(source, keep_layers)
        _check_room(source, precisions, writer.folder, quantizer is not None and quantizer.runs_float32)
        try:
            if tokenizer:
                shutil.copyfile(tokenizer, writer.folder / TOKENIZER)
            if (null_embeds := source.null_embeds()) is not None:
                document["text"]["null_embeds"] = write_null_embeds(null_embeds, writer.folder)
            for done, part in enumerate(graphs):
                tell = _teller(report, part, done, len(graphs))
                needed = (decoder if part in DECODERS else quantizer) if precisions[part] in QUANTIZED else None
                reports.append(
                    export_graph(source, part, precisions[part], writer.folder, document, verify, tell, needed)
                )
            if quantizer:
                quantizer.write()
        except OSError as error:
            raise ExportError(
                f"{writer.target.parent} cannot be written: {error}. Free some space, or choose another --out."
            ) from error
        return ExportResult(writer.commit(document), tuple(reports))


def _teller(report: Callable[[Progress], None] | None, part: str, done: int, total: int) -> Tell:
    return lambda stage, *size: report(Progress(part, stage, done, total, *size)) if report else None


def _manifest(
    source: Source, preset: Preset, parts: tuple[str, ...], tokenizer: str | None, graphs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": source.model, "family": source.family, **source.model_entry()},
        "sampler": dict(preset.sampler),
        "latents": source.latents_entry(),
        "video": dict(FAMILIES[source.family].videos.get(source.model, preset.video)),
        "text": {"tokenizer": tokenizer, **source.text_entry()},
        **_vocabulary(source),
        "graphs": graphs,
        "provenance": {
            "source": source.origin,
            "source_sha256": source.sha256(parts),
            **({"loras": list(loras)} if (loras := source.loras()) else {}),
            "tool": f"tmd-export {_version('tmd-runtime') or 'from its sources'}",
            "versions": _versions(),
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }


def _vocabulary(source: Source) -> dict[str, Any]:
    """The manifest's `draws` of a built-in model, which knows only what it was trained on; nothing of another one."""
    if source.model not in built_in():
        return {}
    return {"draws": _draws(still=MANIFEST_FAMILIES[source.family].makes_stills)}


def _draws(still: bool) -> dict[str, Any]:
    """What the built-in models were trained on, and so all that they can draw."""
    moving = captions.caption(Scene("circle", "red", "black", "right"))
    example = "a red circle on a black background" if still else moving
    return {"words": captions.vocabulary(), "description": captions.in_words(still), "example": example}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    """The libraries that shape a graph or measured it."""
    libraries = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
    found = {"python": platform.python_version(), **{name: _version(name) for name in libraries}}
    return {name: number for name, number in found.items() if number}


def _check_room(source: Source, precisions: dict[str, str], folder: Path, calibrating: bool) -> None:
    """Says at once, and not after an hour, that the disk is too small. Raises ExportError."""
    built = {part: build(source, part, precision)[1] for part, precision in precisions.items()}
    in_int8 = {part for part, precision in precisions.items() if precision == "int8-weights"}
    needed = sum(int8_bytes(built[part]) if part in in_int8 else built[part].bytes() for part in built)
    if calibrating:  # and both graphs in float32 beside them, for a while
        needed += sum(build(source, part)[1].bytes() for part in QUANTIZABLE)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"the bundle takes about {format_size(needed)}, and {format_size(free)} are free in {folder.parent}: "
            "free some space, choose another --out, fewer --parts, or --precision bf16."
        )
