"""Fixtures shared by the unit tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.synthetic import write_synthetic_bundle


@pytest.fixture(scope="session")
def _synthetic_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_bundle(tmp_path_factory.mktemp("synthetic") / "bundle")


@pytest.fixture
def synthetic_bundle(_synthetic_original: Path, tmp_path: Path) -> Path:
    """Folder of a complete, valid bundle with tiny graphs; a fresh copy, free to be damaged."""
    return Path(shutil.copytree(_synthetic_original, tmp_path / "bundle"))
