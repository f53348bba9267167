"""Sends a finished file: whole, a part of it, or the word that the client has it already (RFC 9110)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from starlette.responses import Response, StreamingResponse

from ..errors import Refusal

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_PIECE = 1 << 18


def send_file(path: Path, kind: str, tag: str, headers: Mapping[str, str], name: str) -> Response:
    """An answer with the file at `path`, whose content `tag` names for ever.

    Raises FileNotFoundError, and Refusal for a part that the file does not have.
    """
    etag = f'"{tag}"'
    about = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": f'inline; filename="{name}"',
    }
    if _names(headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=about)
    file = open(path, "rb")  # noqa: SIM115  # `_pieces` closes it; a deletion does not disturb who has it open
    size = os.fstat(file.fileno()).st_size
    # A part of what the client had before is of no use if that was another file.
    wanted = headers.get("range", "") if headers.get("if-range", etag) == etag else ""
    try:
        part = _part(wanted, size)
    except Refusal:
        file.close()
        raise
    if part is None:
        return StreamingResponse(_pieces(file, 0, size), 200, {**about, "Content-Length": str(size)}, kind)
    start, end = part
    about |= {"Content-Range": f"bytes {start}-{end - 1}/{size}", "Content-Length": str(end - start)}
    return StreamingResponse(_pieces(file, start, end), 206, about, kind)


def _names(tags: str, etag: str) -> bool:
    return tags.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in tags.split(","))


def _part(wanted: str, size: int) -> tuple[int, int] | None:
    """The part [start, end) of `size` bytes; None: the whole file, which also answers what is not understood."""
    match = _RANGE.fullmatch(wanted.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first == "":
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), size if last == "" else min(int(last) + 1, size)
        if last != "" and int(last) < start:
            return None
    if start >= size or start >= end:
        why = f"the file has {size} bytes, and none of those in the header Range."
        raise Refusal(why, 416, "invalid_range", "Range", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while start < end:
            piece = file.read(min(_PIECE, end - start))
            if not piece:
                return
            start += len(piece)
            yield piece
