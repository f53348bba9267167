"""Checkpoints of small models as files, and what the export says of a bad one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import synthetic_checkpoints as made
from tmd_export import ExportError
from tmd_export.sources.wan import WanSource

State = dict[str, Any]


def small(*paths: Path, **sizes: Any) -> WanSource:
    return WanSource(paths, "small", **{**made.SIZES, **sizes})


def saved(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(ExportError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1500
    return message
