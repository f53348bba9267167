"""Files that are not what their name says, told by their first bytes."""

from __future__ import annotations

from pathlib import Path

from ..errors import ExportError

_ENOUGH = 256  # bytes


def check_first_bytes(path: Path, pickles: tuple[str, ...]) -> None:
    """Raises ExportError for a git-lfs pointer, a web page, or a container with the ending of another one.

    `pickles`: the endings of PyTorch's own files. What is wrong with any other file is for its reader to say.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_ENOUGH)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from None
    if head.startswith(b"version https://git-lfs"):
        raise ExportError(
            f"{path} is a git-lfs pointer: it says where the weights are and does not hold them. "
            "Run git lfs pull in that folder, or download the file itself."
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ExportError(
            f"{path} is a web page and no file of weights: the download led to a page, perhaps one that asks for a "
            "login. Download it again from its publisher."
        )
    found = _container(head, pickles)
    if found is not None and path.suffix not in found[1]:
        name, endings = found
        raise ExportError(
            f"{path} is {name} by its content, and its name says otherwise: give it the ending {endings[0]}."
        )


def _container(head: bytes, pickles: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """What a file is, and the endings that it may have; None where the first bytes do not tell."""
    if head.startswith(b"GGUF"):
        return "a GGUF file", (".gguf",)
    if head.startswith(b"PK\x03\x04"):
        return "a PyTorch file", pickles
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file", (".safetensors",)
    return None
