"""What `hf:ORG/NAME[@REVISION][/FILE]` names. Nothing is imported: the command line reads this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tmd_engines.errors import quote

from ..errors import ExportError

_SCHEME = "hf:"
_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_NAME = re.compile(rf"hf:/{{0,2}}({_PART}/{_PART})(?:@(refs/pr/\d+|[\w.%+-]+))?(?:/(.+))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A repository of models, its revision (None: the default branch) and one of its files (None: what is needed)."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{_SCHEME}{self.repo}{revision}" + ("" if self.file is None else f"/{self.file}")


def is_hub_name(path: Path | None) -> bool:
    """Whether the user means the hub; a file on the disk with such a name is `./hf:...`."""
    return path is not None and str(path).startswith(_SCHEME)


def parse_hub_name(path: Path) -> HubName:
    """Raises ExportError for anything but the form above."""
    match = _NAME.fullmatch(str(path))
    if match is None or not is_plain(match[3] or "file"):
        raise ExportError(
            f"{quote(str(path), 200)} is no name on the hub: write hf:ORG/NAME, hf:ORG/NAME@REVISION, or with a file "
            "of it hf:ORG/NAME/path/to/file.safetensors (hf:ORG/NAME@REVISION/path/to/file.safetensors)."
        )
    revision = match[2].replace("%2F", "/") if match[2] else None
    return HubName(match[1], revision, match[3])


def is_plain(file: str) -> bool:
    """Whether the name of a file in a repository leads nowhere but into a folder of its own."""
    return file.isprintable() and "\\" not in file and not {"", ".", ".."} & set(file.split("/"))
