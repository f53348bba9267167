"""The kinds of value that a manifest holds: names, counts, dimensions, times, each with its bounds."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

MANIFEST_NAME = "manifest.json"
MAX_DIMENSION = 1 << 31

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIMENSION = re.compile(r"(?:([1-9][0-9]{0,5})\*)?([A-Za-z_][A-Za-z0-9_]{0,31})")


def _check_file_name(name: str) -> str:
    """A plain name only: it is joined to the bundle's folder, and nothing else may come of that."""
    if "/" in name or "\\" in name:
        raise ValueError("a file name must be a plain name, without folders (no separator, no '..', not absolute)")
    if name == MANIFEST_NAME:
        raise ValueError("the manifest cannot list itself")
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(
            "a file name may hold letters, digits, '.', '_' and '-', at most 128, and not start with '.' or '-'"
        )
    return name


def _check_dimension(value: int | str) -> int | str:
    if isinstance(value, int):
        if not 1 <= value <= MAX_DIMENSION:
            raise ValueError(f"a fixed dimension must be from 1 to {MAX_DIMENSION}")
    elif not _DIMENSION.fullmatch(value):
        raise ValueError("a symbolic dimension is a name such as 'height', or a multiple of one such as '8*height'")
    return value


# Free text is printed by `tmd-engine inspect`: control characters could rewrite the terminal.
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$"
Text = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=_PRINTABLE)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,63}$")]
FileName = Annotated[str, AfterValidator(_check_file_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Dimension = Annotated[int | str, AfterValidator(_check_dimension)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]
StepCount = Annotated[int, Field(ge=1, le=1000)]
Shift = Annotated[float, Field(ge=1.0, le=1000.0)]
TimeLevel = Annotated[float, Field(gt=0.0, le=1.0)]


class Part(BaseModel):
    """An object of the manifest: nothing converted, no unknown field, not to be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
