"""Weights that an engine has packed are not resident a second time, as pages of the file that they came from."""

from __future__ import annotations

import mmap
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.helpers.engine_tools import buffers, plain_session
from tests.helpers.resident import resident_file_bytes, widen_backbone
from tests.helpers.synthetic_tim import write_plain_bundle
from tmd_engines import Bundle, load
from tmd_engines.device.resident_pages import drop, dropping, mapped_ranges

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
LARGE = 16_000_000


@pytest.fixture
def mapping(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A file of 4 MiB whose name is gone, and its bytes, mapped for reading."""
    path = tmp_path / "weights with spaces.data"
    path.write_bytes(np.random.default_rng(0).bytes(4 << 20))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    path.unlink()
    return path, np.frombuffer(mapped, np.uint8)


def test_pages_leave_and_come_back_with_the_same_bytes(mapping: tuple[Path, np.ndarray]) -> None:
    path, values = mapping
    ranges = mapped_ranges(path)
    assert sum(length for _, length in ranges) == values.nbytes and ranges[0][0] == values.ctypes.data
    before = values.copy()
    assert resident_file_bytes(path.name) == values.nbytes
    drop(ranges)
    assert resident_file_bytes(path.name) == 0
    assert np.array_equal(values, before)


def test_pages_leave_while_the_work_goes_on(mapping: tuple[Path, np.ndarray]) -> None:
    path, values = mapping

    def become(reached: Callable[[], bool]) -> bool:
        end = time.monotonic() + 10
        while not reached() and time.monotonic() < end:
            time.sleep(0.002)
        return reached()

    with dropping(mapped_ranges(path)):
        values.sum()
        assert become(lambda: resident_file_bytes(path.name) == 0)
        values.sum()
    assert resident_file_bytes(path.name) == 0


def test_a_file_that_can_be_written_is_left_alone(tmp_path: Path) -> None:
    """What somebody wrote into private pages would be lost."""
    path = tmp_path / "weights.data"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[0] = 1
        assert mapped_ranges(path) == ()
        drop(mapped_ranges(path))
        assert mapped[0] == 1
    assert mapped_ranges(path) == ()


def test_without_proc_an_engine_loads_all_the_same(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linked data files too, which OpenVINO reads under a second name alone."""
    pytest.importorskip("openvino")
    data = synthetic_bundle / "backbone.onnx.data"
    data.rename(elsewhere := synthetic_bundle.with_name("elsewhere.data"))
    data.symlink_to(elsewhere)
    bundle, read_text = Bundle.open(synthetic_bundle), Path.read_text

    def reading(path: Path, *arguments: Any, **more: Any) -> str:
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read_text(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", reading)
    with load(bundle, "backbone", "openvino", threads=1) as loaded:
        loaded.bind(*buffers(loaded))()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_packed_weights_are_in_memory_once(synthetic_bundle: Path, engine: str) -> None:
    pytest.importorskip(engine)
    assert widen_backbone(synthetic_bundle) > LARGE
    with load(Bundle.open(synthetic_bundle), "backbone", engine, threads=1) as loaded:
        loaded.bind(*buffers(loaded))()
        assert resident_file_bytes("backbone.onnx.data") < LARGE / 20


def test_packed_weights_for_any_length_of_text_are_in_memory_once(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    folder = write_plain_bundle(tmp_path / "plain")
    assert widen_backbone(folder) > LARGE
    with load(Bundle.open(folder), "backbone", "openvino", threads=1) as loaded:
        loaded.bind(*buffers(loaded))()
        assert resident_file_bytes("backbone.onnx.data") < LARGE / 20


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_onnx_runtime_leaves_large_weights_in_16_bits_in_their_file(synthetic_bundle: Path, dtype: str) -> None:
    """Widened once, they would be anonymous memory of twice the size, and no page of the file would be left."""
    pytest.importorskip("onnxruntime")
    plain = Bundle.open(shutil.copytree(synthetic_bundle, synthetic_bundle.with_name("plain")))
    size = widen_backbone(synthetic_bundle, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    with load(Bundle.open(synthetic_bundle), "backbone", "onnxruntime", threads=1) as loaded:
        inputs, outputs = buffers(loaded)
        loaded.bind(inputs, outputs)()
        assert resident_file_bytes("backbone.onnx.data") > 0.9 * size
    graph = onnx.load(synthetic_bundle / "backbone.onnx").graph
    weights = {weight.name: numpy_helper.to_array(weight).astype(np.float32) for weight in graph.initializer}
    inputs["prompt_embeds"] = inputs["prompt_embeds"] @ weights["wide.up"] @ weights["wide.down"]
    for name, expected in zip(outputs, plain_session(plain, "backbone", inputs), strict=True):
        np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=1e-4)
