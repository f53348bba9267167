"""A model smaller than tiny, and its bundle exported once for all tests of a run."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path

import onnx_ir
import pytest

from tmd_export import ExportResult, RandomSource, Source, export_bundle, graph_export
from tmd_export.families.build import build
from tmd_export.graphs.graph import Graph
from tmd_export.weights.weights import Weights
from tmd_ref.umt5 import UMT5Config
from tmd_ref.vae import WanVAEConfig
from tmd_ref.wan import WanConfig

WAN = WanConfig(dim=48, ffn_dim=64, num_heads=3, num_layers=2, freq_dim=32, text_dim=24, text_len=8)
TEXT = UMT5Config(vocab_size=50, dim=24, num_heads=2, head_dim=8, ffn_dim=32, num_layers=1)
VAE = WanVAEConfig(dim=4, dim_mult=(1, 1), num_res_blocks=0, temporal_downsample=(True,))


def small_source(seed: int = 0, fusion: str = "gated") -> RandomSource:
    return RandomSource("small", seed, wan=WAN, head_blocks=1, fusion=fusion, vae=VAE, text=TEXT)


@cache
def small_export() -> ExportResult:
    """All five graphs of `small_source()`. Read only: every test of the run shares it."""
    folder = tempfile.TemporaryDirectory(prefix="tmd-test-")
    atexit.register(folder.cleanup)
    return export_bundle(small_source(), Path(folder.name) / "bundle")


def small_graph(graph: Graph, _: Weights | None = None) -> onnx_ir.Model:
    """What tracing `graph` of `small_source()` gives, without its seconds: a fresh copy from `small_export()`."""
    return onnx_ir.load(small_export().bundle.graph_path(graph.name))


def skip_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, exports of `small_source()` take their graphs from `small_export()`."""
    small_export()  # which traces, if it is the first time
    monkeypatch.setattr(graph_export, "trace", small_graph)


def with_weights(source: Source, part: str) -> Graph:
    """The graph `part` with its weights in float32: the reference."""
    graph, weights = build(source, part)
    weights.fill(graph.module)
    return graph
