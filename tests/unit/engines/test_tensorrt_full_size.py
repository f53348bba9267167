"""Attention is fused at full size: Wan2.1 1.3B and 14B, 81 frames of 832x480, for two generations of cards (slow).

The builder's own figure is the proof. Scores of all heads of 32,760 tokens that do not stay inside a kernel are scratch
memory: for 1.3B (12 heads) 25.8 GB in 16 bits and 12.9 GB in 8, for 14B (40 heads) 86 GB and 43 GB. Weights are random;
three blocks stand for 30 and 40, because blocks are fused one by one and run one after the other.

    python -m pytest -m slow tests/unit/engines/test_tensorrt_full_size.py       about 40 minutes on two cores
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.nvidia_builder import CANONICAL, PRIMITIVES, build_graph, figures_of, nvidia_builder
from tmd_engines import Bundle
from tmd_engines.command.device_memory import predicted
from tmd_export import RandomSource, export_bundle
from tmd_ref.wan import WAN_CONFIGS

pytestmark = pytest.mark.slow
pytest.importorskip("tensorrt_rtx", reason="pip install '.[rtx]'")

SIZE = (832, 480, 81)
BOUND = {"wan1.3b": 2_000_000_000, "wan14b": 5_000_000_000}
UNPACKED = 1.1  # of the bundle's weights: those in fp8 that became 16 bits would be 1.8 times as large


@pytest.fixture(scope="module", autouse=True)
def _builder() -> Iterator[None]:
    with nvidia_builder():
        yield


@cache
def exported(model: str, precision: str) -> Bundle:
    folder = tempfile.TemporaryDirectory(prefix="tmd-test-")
    atexit.register(folder.cleanup)
    source = RandomSource(model, 0, wan=replace(WAN_CONFIGS[model], num_layers=3), head_blocks=1)
    given: dict[str, Any] = (
        {"calibration": ["a red circle"], "keep_layers": False} if precision in ("fp8", "nvfp4") else {}
    )
    out = Path(folder.name) / "bundle"
    return export_bundle(source, out, ("backbone", "flow_head"), precision=precision, verify=False, **given).bundle


@pytest.mark.parametrize("graph", ["backbone", "flow_head"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8", "nvfp4"])
@pytest.mark.parametrize("model", BOUND)
def test_scratch_memory_has_no_room_for_the_scores_of_attention(model: str, precision: str, graph: str) -> None:
    bundle = exported(model, precision)
    weights = bundle.manifest.files[f"{graph}.onnx.data"].size
    for version in (CANONICAL,) if precision in ("bf16", "nvfp4") else (CANONICAL, PRIMITIVES):
        for target in ("12.0",) if precision == "nvfp4" else ("8.9", "12.0"):
            lowered, ranges = build_graph(bundle, graph, version, (SIZE,))
            figures = figures_of(lowered, ranges, str(bundle.graph_path(graph)), (target,))
            print(f"{model} {graph} {precision} {version} {target}: {figures}")
            assert figures["scratch"] < BOUND[model]
            assert figures["weights"] < UNPACKED * weights
            told = predicted(bundle, SIZE)[graph]
            assert abs(told["weights"] - figures["weights"]) < 0.01 * figures["weights"]
            # Of 1.3B's flow head in fp16 it is 32 % more.
            assert -0.25 * figures["scratch"] < told["scratch"] - figures["scratch"] < 0.35 * figures["scratch"]
