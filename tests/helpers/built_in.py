"""Where the built-in bundles lie."""

from __future__ import annotations

from pathlib import Path

BUNDLES = Path(__file__).parents[2] / "runtime" / "tmd_runtime" / "bundles"
BUILT_IN = BUNDLES / "tiny"
