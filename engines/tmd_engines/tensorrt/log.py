"""What the library says while it works: its latest errors, and the figures of a build. Import after `library.use`."""

from __future__ import annotations

import re

from .library import trt

_KEPT_MESSAGES = 3
_FIGURES = {
    "scratch": "Max Scratch Memory",
    "activations": "Total Activation Memory",
    "weights": "Total Weights Memory",
}


class Log(trt.ILogger):
    """Keeps the latest errors, to say them in ours, and the bytes of `figures`; prints nothing."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)  # pybind11 wants it by name
        self.errors: list[str] = []
        self.figures: dict[str, int] = {}

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by the library, from any thread."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors = [*self.errors, " ".join(msg.split())][-_KEPT_MESSAGES:]
        elif severity == trt.ILogger.Severity.INFO:
            for name, words in _FIGURES.items():
                match = re.fullmatch(rf"{words}: (\d+) bytes", msg.strip())
                if match:
                    self.figures[name] = int(match[1])

    def reason(self) -> str:
        """The latest errors as the end of a sentence, and forgets them."""
        text, self.errors = "; ".join(self.errors)[:600], []
        return text or "it gave no reason"
