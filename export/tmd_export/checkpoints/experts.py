"""The two transformers of a Wan2.2-A14B, one for high and one for low noise, each with exactly Wan2.1-14B's tensors.

Neither makes a video by itself, and its tensors cannot tell. Only names do: of a folder, a file, a prefix of tensors.
Where both are there, `experts_of` says which is which; one alone is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tmd_engines.errors import quote

from ..errors import ExportError

_EXPERT = re.compile(r"(?<![a-z])(high|low)[-_. ]?noise|^transformer_2$", re.IGNORECASE)
_MODEL = re.compile(r"a14b", re.IGNORECASE)
_SIDE = re.compile(r"(?<![a-z])(high|low)(?=[-_. ]?noise|[-_. ]|$)", re.IGNORECASE)
FOLDERS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))  # Wan's own, diffusers'


@dataclass(frozen=True)
class Experts:
    """Where the two transformers of one model are, the one for `high` noise and the one for `low`, and what else the
    user named. `given` are the user's own paths."""

    given: tuple[Path, ...]
    high: Path
    low: Path
    others: tuple[Path, ...]


def experts_of(paths: Sequence[Path]) -> Experts | None:
    """The two experts among `paths`: files and folders that are called so, in whose absence those in a folder; None
    unless there are one of each. Raises ExportError if it is unclear which one is meant."""
    itself: dict[str, list[Path]] = {"high": [], "low": []}
    inside: dict[str, list[Path]] = {"high": [], "low": []}
    others = []
    for path in paths:
        pair = next((pair for pair in FOLDERS if all((path / name).is_dir() for name in pair)), None)
        side = expert_named(path)
        if pair is not None:
            for which, name in zip(inside, pair, strict=True):
                inside[which].append(path / name)
        elif side is not None:
            itself[side].append(path)
            continue
        others.append(path)
    found = {which: itself[which] or inside[which] for which in itself}
    if not found["high"] or not found["low"]:
        return None
    for which, there in found.items():
        if len(there) > 1:
            raise ExportError(f"{there[0]} and {there[1]} are both the expert for {which} noise: give one of each.")
    return Experts(tuple(paths), found["high"][0], found["low"][0], tuple(others))


def expert_named(path: Path) -> str | None:
    """ "high" or "low" if a file or folder is called like one of the two experts."""
    match = _SIDE.search(path.name)
    return match[1].lower() if match else None


def expert_of_lora(path: Path) -> str | None:
    """ "high" or "low" if a LoRA's file or folder is called so, or lies in a folder of that noise."""
    around = _EXPERT.search(path.parent.name)
    return expert_named(path) or (around[1].lower() if around and around[1] else None)


def has_experts(folder: Path) -> bool:
    """Whether `folder` holds both."""
    return any(all((folder / name).is_dir() for name in pair) for pair in FOLDERS)


def is_of_expert(path: Path, folder: Path) -> bool:
    """Whether a file in `folder` is a part of one of the experts that it holds."""
    return path.relative_to(folder).parts[0] in {name for pair in FOLDERS for name in pair}


def refuse_experts_in(folder: Path) -> None:
    """Raises ExportError if `folder` holds a folder that is called like an expert."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _EXPERT.search(path.name):
            raise ExportError(_refusal(str(folder), f"holds {quote(path.name)}"))


def refuse_expert_tensors(where: str, names: Iterable[str]) -> None:
    """Raises ExportError if the tensors in `where` say by their names that they are an expert's."""
    found = next((name for name in names if _EXPERT.search(name)), None)
    if found is not None:
        raise ExportError(_refusal(where, f"holds {quote(found)}"))


def refuse_expert_files(files: Iterable[Path]) -> None:
    """Raises ExportError if the files of a transformer, or the folders around them, are called like an expert."""
    for path in files:
        folder = path.absolute().parent
        for called in (path.name, folder.name):
            if _EXPERT.search(called) or _MODEL.search(path.name):
                raise ExportError(_refusal(str(path), f"is called {quote(called)}"))
        if folder.name == "transformer" and (folder.parent / "transformer_2").is_dir():
            raise ExportError(_refusal(str(path), "has 'transformer_2' beside its folder"))


def _refusal(where: str, sign: str) -> str:
    return (
        f"{where} {sign}: it is one of the two experts of Wan2.2-A14B (high noise, low noise), which take turns in one "
        "video. One alone shows noise: give the folder that holds both, or both files, by names that say which is high "
        "noise and which is low noise."
    )
