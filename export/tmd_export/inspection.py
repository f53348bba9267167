"""What a checkpoint is and what an export of it would hold, without making one: files' headers are read, no weights."""

from __future__ import annotations

import json
from typing import Any

import click

from tmd_engines.bundle.families import FAMILIES as ENGINE_FAMILIES

from .families import FAMILIES, sampling_of
from .families.build import sections
from .plan import planned
from .sources.source import Source


def inspect(
    source: Source,
    preset: str | None,
    grid: str | None,
    parts: tuple[str, ...] | None = None,
    precision: str = "fp32",
    text_encoder_weights: str | None = None,
) -> dict[str, Any]:
    """What `tmd-export` would make of `source`; arguments as of `export.export_bundle`. Raises ExportError if the parts
    do not fit together, and for what an export refuses before any work."""
    sampling = sampling_of(source, preset, grid)
    precisions = planned(source, parts, precision, text_encoder_weights)
    family, model = ENGINE_FAMILIES[source.family], sections(source).model
    sampler = family.sampler.model_validate_json(json.dumps(dict(sampling.sampler)))
    said = source.sampler_note if preset is None else None
    latents = source.latents_entry()
    return {
        "source": source.origin,
        "model": source.model,
        "family": source.family,
        "architecture": model.architecture,
        "dim": model.dim,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "latents": {name: latents[name] for name in ("channels", "temporal_stride", "spatial_stride")},
        "parts": list(precisions),
        "precision": precisions,
        "absent": [part for part in source.parts if part not in source.default_parts],
        "sampler": family.describe(sampler),
        "notes": [*source.notes, *([said] if said else [])],
    }


def print_inspection(found: dict[str, Any]) -> None:
    sides = found["latents"]
    sizes = f"width {found['dim']}, {found['num_layers']} blocks, {found['num_heads']} heads"
    rows = [
        ("checkpoint", found["source"]),
        ("model", f"{found['model']}: {found['architecture']}, {sizes}"),
        (
            "latents",
            "{channels} channels for {temporal_stride}x{spatial_stride}x{spatial_stride} pixels".format(**sides),
        ),
        ("family", f"{found['family']}: this checkpoint {FAMILIES[found['family']].known_by}"),
        ("exported", ", ".join(found["parts"])),
        ("precision", _in_short(found["precision"])),
        ("sampled", found["sampler"]),
    ]
    if found["absent"]:
        rows.insert(4, ("no weights", ", ".join(found["absent"])))
    for title, text in rows:
        click.echo(f"{title:<12}{text}")
    for note in found["notes"]:
        click.echo(f"note: {note}")


def _in_short(precisions: dict[str, str]) -> str:
    """One word if all parts have the same."""
    if len(set(precisions.values())) == 1:
        return next(iter(precisions.values()))
    return ", ".join(f"{part} {precision}" for part, precision in precisions.items())
