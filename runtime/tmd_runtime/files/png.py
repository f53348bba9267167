"""One picture as a PNG file, with words about it inside: `tEXt`, or `iTXt` for what Latin-1 cannot say."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ..settings import Settings
    from .tensor_files import Latents

_HEADER = 8 + 25  # the signature and the chunk IHDR, which all others follow
_LONGEST_KEYWORD = 79


def describe(made: Settings | Latents, model: str, prompt: str) -> dict[str, str]:
    """What made a picture, as keywords and texts: settings of a run, or what a latents file says of one.

    The negative prompt is not among them: a file of embeddings may have brought another one than the settings say.
    """
    texts = {"model": model, "prompt": prompt, "seed": str(made.seed), "steps": str(made.steps)}
    if made.inner_steps != 1:
        texts["inner_steps"] = str(made.inner_steps)
    if made.guidance != 1:
        texts["guidance"] = f"{made.guidance:g}"
    return {keyword: text for keyword, text in (texts | made.details).items() if text}


def png(image: NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> bytes:
    """A PNG file of uint8 `[H, W, 3]`, with `texts` by keyword (Latin-1, at most 79 characters)."""
    import av
    import numpy as np

    encoder: Any = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1, 1)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    # FFmpeg's PNG packets are whole files.
    file = b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])
    words = b"".join(_text_chunk(keyword, text) for keyword, text in (texts or {}).items())
    return file[:_HEADER] + words + file[_HEADER:]


def _text_chunk(keyword: str, text: str) -> bytes:
    name = keyword.encode("latin-1")
    if not 1 <= len(name) <= _LONGEST_KEYWORD:
        raise ValueError(f"a PNG keyword has 1 to {_LONGEST_KEYWORD} characters, not {len(name)}")
    text = text.replace("\0", "")
    try:
        kind, content = b"tEXt", name + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        # not compressed, in no language, the keyword not translated (PNG 11.3.3.4)
        kind, content = b"iTXt", name + b"\0\0\0\0\0" + text.encode("utf-8", errors="replace")
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
