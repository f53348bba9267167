"""From trained weights to a bundle: torch modules traced to ONNX graphs, checked, compared with the reference, written.

This package reads checkpoints and writes what `tmd_engines` reads; it does not train, and it runs a model only to
compare. A family of models is one module in `families`, with a `Source` in `sources` and its builders in `graphs`.

    from tmd_export import export_bundle, open_source

    result = export_bundle(open_source("tiny"), "my-bundle")
    print(result.bundle.folder, result.graphs[0].accuracy)

Names are imported when first used, so that `import tmd_export` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ExportError

if TYPE_CHECKING:
    from .export import ExportResult, GraphReport, Progress, export_bundle
    from .families.open import open_source
    from .loras import LoraFile
    from .sources.folder import FolderSource
    from .sources.loras import WithLoras
    from .sources.random_wan import RandomSource
    from .sources.source import Source
    from .sources.wan import WanSource

__all__ = [
    "ExportError",
    "ExportResult",
    "FolderSource",
    "GraphReport",
    "LoraFile",
    "Progress",
    "RandomSource",
    "Source",
    "WanSource",
    "WithLoras",
    "export_bundle",
    "open_source",
]

_HOME = {
    "ExportResult": "export",
    "GraphReport": "export",
    "Progress": "export",
    "export_bundle": "export",
    "FolderSource": "sources.folder",
    "RandomSource": "sources.random_wan",
    "Source": "sources.source",
    "LoraFile": "loras",
    "open_source": "families.open",
    "WanSource": "sources.wan",
    "WithLoras": "sources.loras",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
