"""The source of weights that a command line means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ExportError
from ..hub.places import local_checkpoints, local_loras
from ..hub.repository import silent
from ..loras import LoraFile
from ..sources.source import Source
from . import FAMILIES, Request, find_preset, models, presets


def open_source(
    model: str | None,
    checkpoint: str | Path | Sequence[str | Path] | None = None,
    random_seed: int | None = None,
    decoder: str | Path | None = None,
    preset: str | None = None,
    text_encoder: str | Path | None = None,
    loras: Sequence[LoraFile | tuple[str | Path, float]] = (),
) -> Source:
    """Raises ExportError if there are no such weights.

    `model` None: what the checkpoint is, its files say. `checkpoint`: a folder as tmd-distill leaves it (see
    `FolderSource`), or one or more published checkpoints (see `WanSource`); the transformer must have the sizes of
    `model`. `random_seed`: weights from this seed, for a model of
    the family that `preset` is for. Neither: the weights that come with the package. `decoder`: a file with another
    decoder (see `decoders.WithDecoder`), for a Transition Model a folder (see `still_vae.VAEFolder`). `text_encoder`:
    for tim-t2i the folder of its text encoder (see `gemma.GemmaFolder`). `loras`: files and strengths to merge into the
    weights of the denoiser (see `loras.WithLoras`). Each path can be a name on the Hugging Face hub (`hf:ORG/NAME`, see
    `hub.name`), which is downloaded then.
    """
    given = tuple(map(Path, [checkpoint] if isinstance(checkpoint, str | Path) else checkpoint or ()))
    paths = local_checkpoints(given, say=silent)
    if model is None:
        model = _found_in(paths)
    candidates = [
        family for family in FAMILIES.values() if (family.any_size if model is None else model in family.models)
    ]
    if not candidates:
        raise ExportError(f"there is no model {model!r}: choose one of {', '.join(models())}.")
    fitting = [family for family in candidates if preset is None or preset in family.presets]
    if not fitting:
        found = presets().get(preset or "") or find_preset(candidates[0], preset)  # which says that there is none
        possible = ", ".join(name for family in candidates for name in family.presets)
        which = model or "this checkpoint"
        raise ExportError(f"the preset {preset} is for {found.about}, and {which} is not: choose among {possible}.")
    others = [
        None if path is None else local_checkpoints([Path(path)], say=silent)[0] for path in (decoder, text_encoder)
    ]
    source = fitting[0].open(Request(model, paths, random_seed, *others))
    if not loras:
        return source
    from ..sources.loras import with_loras

    return with_loras(source, local_loras(loras, silent))


def _found_in(paths: Sequence[Path]) -> str | None:
    """The model that a family knows these paths to be; None for one that is told by its tensors. Raises ExportError."""
    if not paths:
        raise ExportError(f"no model is named and there is no checkpoint to tell: choose one of {', '.join(models())}.")
    found = list(dict.fromkeys(model for family in FAMILIES.values() for model in family.found_in(paths)))
    if len(found) > 1:
        raise ExportError(f"the checkpoint holds {' and '.join(found)}: name the one that is meant with --model.")
    return found[0] if found else None
