"""What made a video, as words inside its file: tags of MP4 and WebM, the comment of a GIF.

`comment` is one JSON object of the keywords and texts that a PNG file holds, and `description` is the prompt alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmd_engines.utf8 import json_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_COMMENT = b"\x21\xfe"  # GIF89a, section 24: an extension of sub-blocks, ended by an empty one
_HEADER, _PACKED = 13, 10  # signature and screen descriptor, and where its flags are (sections 17 and 18)
_LONGEST_BLOCK = 255


def tags(texts: Mapping[str, str]) -> dict[str, str]:
    """The tags of a container, by the names that FFmpeg has for them; none without texts."""
    if not texts:
        return {}
    prompt = texts.get("prompt", "").replace("\0", "")  # FFmpeg's texts end at a NUL
    described = {"description": _unicode(prompt)} if prompt else {}
    return {"comment": json_text(dict(texts), None), **described}


def with_comment(gif: bytes, texts: Mapping[str, str]) -> bytes:
    """A GIF file with `texts` as a comment before its first frame, in JSON of ASCII, which GIF89a asks for."""
    if not texts:
        return gif
    text = json_text(dict(texts), None).encode("ascii")
    blocks = (text[start : start + _LONGEST_BLOCK] for start in range(0, len(text), _LONGEST_BLOCK))
    comment = _COMMENT + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    packed = gif[_PACKED]
    header = _HEADER + (3 << (packed & 7) + 1 if packed & 0x80 else 0)  # with the colours that all frames share
    return gif[:header] + comment + gif[header:]


def _unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
