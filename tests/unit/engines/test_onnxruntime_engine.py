"""What is ONNX Runtime's own; what all engines share is in `test_engine_contract.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from tmd_engines import Bundle, EngineError, load


@pytest.fixture
def bundle(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("TMD_CACHE", "off")  # what is kept is in `test_kept_graphs.py`
    return Bundle.open(synthetic_bundle)


def test_attention_is_lowered_in_memory_only(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bundle.graph_path("backbone").read_bytes()
    seen = []
    session = onnxruntime.InferenceSession

    def recording(model: bytes, *args: Any, **kwargs: Any) -> Any:
        seen.append(model)
        return session(model, *args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    load(bundle, "backbone", "onnxruntime", threads=1)
    assert seen[0].count(b"MultiHeadAttention") == 2
    assert b"MultiHeadAttention" not in before and bundle.graph_path("backbone").read_bytes() == before


def test_threads_are_passed_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    session = onnxruntime.InferenceSession

    def recording(model: bytes, options: Any, **kwargs: Any) -> Any:
        seen.append(options.intra_op_num_threads)
        return session(model, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    for threads in (None, 1, 2):
        load(bundle, "text_encoder", "onnxruntime", threads=threads)
    assert seen == [0, 1, 2]


def test_missing_onnxruntime_says_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="pip install onnxruntime"):
        load(bundle, "backbone", "onnxruntime")


def test_onnx_runtime_records_nothing(tmp_path: Path) -> None:
    """Version 1.31 writes a device id and a database of events, in the user's cache, when it is imported."""
    script = (
        "from tmd_engines import Bundle, load\n"
        "from tmd_runtime.built_in import BUILT_IN\n"
        "load(Bundle.open(BUILT_IN), 'update', 'onnxruntime', 'cpu', 1)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert not list(tmp_path.iterdir())
