"""Small quantized bundles, exported once for all tests of a run, and their linear layers as torch rounds them."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx_ir
import torch

from tests.helpers.export_tools import small_export, small_graph, small_source
from tmd_export import ExportResult, export_bundle, graph_export
from tmd_export.graphs.graph import Graph
from tmd_export.graphs.trace import trace
from tmd_export.weights.weights import Weights


def known_or_traced(graph: Graph, weights: Weights) -> onnx_ir.Model:
    """The graphs in float32 are those of `small_export`, which saves their tracing."""
    low = any(dtype != torch.float32 for _, dtype in weights.specs.values())
    return trace(graph, weights) if low else small_graph(graph)


@cache
def quantized(precision: str = "backbone=fp8,flow_head=int8") -> ExportResult:
    """Backbone and flow head of `small_source()`. Read only."""
    folder = tempfile.TemporaryDirectory(prefix="tmd-test-")
    atexit.register(folder.cleanup)
    return export_small(Path(folder.name) / "bundle", precision=precision, calibration=("one", "two"))


def export_small(
    out: Path, seed: int = 0, parts: tuple[str, ...] = ("backbone", "flow_head"), **options: Any
) -> ExportResult:
    small_export()
    with patch.object(graph_export, "trace", known_or_traced):
        return export_bundle(small_source(seed), out, parts, **options)
