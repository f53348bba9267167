"""The engine onnxruntime, on the CPU and on an NVIDIA GPU, and how a graph is lowered for it."""

from __future__ import annotations

SILENT = 4
"""Of the library's log: errors come as exceptions, and would stand on stderr too, coloured, before our own line."""
