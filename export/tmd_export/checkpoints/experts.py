"""The two transformers of a Wan2.2-A14B, one for high and one for low noise, each with exactly Wan2.1-14B's tensors.

Neither makes a video by itself, and its tensors cannot tell. Only names do: of a folder, a file, a prefix of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tmd_engines.errors import quote

from ..errors import ExportError

_EXPERT = re.compile(r"(?<![a-z])(high|low)[-_. ]?noise|^transformer_2$", re.IGNORECASE)
_MODEL = re.compile(r"a14b", re.IGNORECASE)


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
        "video. One alone shows noise, and both together are not exported yet: take Wan2.1-T2V-14B or a model made "
        "from it."
    )
