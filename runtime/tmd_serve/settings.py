"""The settings of a server, as its command line gives them. Nothing changes them while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much may wait.

    `pixels` of one frame, width·height; `frames` of one video; `steps` counts outer steps; `seconds` is the estimated
    time of a run on this machine. `picture_pixels` bounds an uploaded picture before it is decoded.
    """

    pixels: int = 1280 * 720
    frames: int = 161
    steps: int = 100
    seconds: float = 3600.0
    prompt_chars: int = 8000
    upload_bytes: int = 20 << 20
    picture_pixels: int = 1 << 25
    waiting: int = 32
    streams: int = 64

    @property
    def body_bytes(self) -> int:
        """Of a whole request: an upload as base64, and room for the other fields."""
        return self.upload_bytes * 4 // 3 + (1 << 18)


@dataclass(frozen=True)
class ServeSettings:
    """One server. `needs_key` asks every request under /v1 for an API key; `hosts` are the accepted names in the header
    Host (None: any); `origins` are the web pages of other places that may use it (CORS)."""

    data: Path
    limits: Limits = field(default_factory=Limits)
    needs_key: bool = False
    hosts: frozenset[str] | None = frozenset({"127.0.0.1", "localhost", "::1"})
    origins: frozenset[str] = frozenset()
