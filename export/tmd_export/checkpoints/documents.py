"""The small files of JSON that lie in a checkpoint's folder: configurations and indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tmd_engines.bundle.strict_json import read_json
from tmd_engines.errors import quote

from ..errors import ExportError


def read_document(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in the file `path`, which may have `limit` bytes, whole MiB.

    Raises ExportError for a larger file, one that cannot be read, and anything but one object in strict JSON.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ExportError(
            f"{path} cannot be read ({error.strerror}): check its permissions, or copy it again."
        ) from None
    if len(data) > limit:
        raise ExportError(f"{path} is larger than {limit >> 20} MiB, and no such file of JSON is: copy it again.")
    return parse_document(str(path), data)


def parse_document(where: str, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, which `where` names in the message. Raises ExportError for anything else."""
    try:
        document = read_json(data)
    except ValueError as error:
        raise ExportError(f"{where} cannot be read as JSON ({error}): copy it again.") from None
    if not isinstance(document, dict):
        raise ExportError(f"{where} is {quote(document, 40)} in JSON, where an object belongs: copy it again.")
    return document
