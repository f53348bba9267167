"""ONNX Runtime's optimised graphs in the cache: they compute the same, or they are not kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.helpers.bundle_tools import edit_graph, refused
from tests.helpers.engine_tools import buffers
from tmd_engines import Bundle, EngineError, load
from tmd_engines.bundle import reader
from tmd_engines.device.running import stop_step
from tmd_engines.onnxruntime import kept


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle(synthetic_bundle: Path, cache: Path) -> Bundle:
    return Bundle.open(synthetic_bundle)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What sessions were made of: a graph, or what was kept of it."""
    seen: list[str] = []
    session = onnxruntime.InferenceSession

    def recording(model: bytes, options: Any, **more: Any) -> Any:
        seen.append("kept" if model[4:8] == b"ORTM" else "graph")
        return session(model, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    return seen


def run(bundle: Bundle, graph: str, threads: int = 1) -> list[bytes]:
    with load(bundle, graph, "onnxruntime", threads=threads) as engine:
        inputs, outputs = buffers(engine)
        engine.run(inputs, outputs)
        return [outputs[name].tobytes() for name in engine.outputs]


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.plan"))


@pytest.mark.parametrize("graph", ["text_encoder", "backbone", "flow_head", "decoder_first", "decoder_step"])
def test_a_kept_graph_computes_the_same_bits(
    bundle: Bundle, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    first = run(bundle, graph)
    assert made == ["graph", "kept"] and len(entries(cache)) == 1
    assert run(bundle, graph) == first and made == ["graph", "kept", "kept"]
    monkeypatch.setenv("TMD_CACHE", "off")
    assert run(bundle, graph) == first and made[3:] == ["graph"]


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-9] + b"123456789"])
def test_a_damaged_entry_is_made_anew(
    bundle: Bundle, cache: Path, made: list[str], damage: Callable[[bytes], bytes]
) -> None:
    first = run(bundle, "backbone")
    (entry,) = entries(cache)
    entry.write_bytes(damage(entry.read_bytes()))
    assert run(bundle, "backbone") == first and made[2:] == ["graph", "kept"]
    assert run(bundle, "backbone") == first and made[4:] == ["kept"]


def test_an_entry_that_onnx_runtime_does_not_take_is_made_anew(
    bundle: Bundle, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(bundle, "backbone")
    monkeypatch.setattr(kept.PlanCache, "map", lambda *_: memoryview(b"\0\0\0\0ORTM, but no graph"))
    assert run(bundle, "backbone") == first and made[2:] == ["kept", "graph", "kept"]


def test_what_computes_something_else_is_not_kept(
    bundle: Bundle, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = onnxruntime.InferenceSession

    class Wrong:
        def __init__(self, session: Any) -> None:
            self._session = session

        def run(self, *arguments: Any) -> Any:
            first, *rest = self._session.run(*arguments)
            return [np.nextafter(first, np.float32(np.inf)), *rest]

    def session(model: bytes, options: Any, **more: Any) -> Any:
        found = plain(model, options, **more)
        return Wrong(found) if model[4:8] == b"ORTM" else found

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    first = run(bundle, "backbone")
    assert run(bundle, "backbone") == first
    assert made == ["graph", "kept", "graph"], "that it was tried is kept"


def test_a_large_graph_is_not_copied(
    bundle: Bundle, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MAX_BYTES", 1000)
    run(bundle, "backbone")
    assert made == ["graph"] and not entries(cache)


def test_another_number_of_threads_or_another_lowering_has_an_entry_of_its_own(
    bundle: Bundle, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(bundle, "backbone", threads=1)
    run(bundle, "backbone", threads=2)
    monkeypatch.setattr(kept, "code_key", lambda *_: "another version")
    run(bundle, "backbone", threads=1)
    assert made == ["graph", "kept"] * 3 and len(entries(cache)) == 3


def test_graphs_that_passed_are_not_parsed_again_and_others_are(
    synthetic_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = reader.parse_graph

    def parsing(data: bytes, where: str) -> Any:
        parsed.append(where)
        return parse(data, where)

    monkeypatch.setattr(reader, "parse_graph", parsing)
    Bundle.open(synthetic_bundle)
    first = len(parsed)
    Bundle.open(synthetic_bundle)
    assert len(parsed) == first > 0
    edit_graph(synthetic_bundle, lambda model: setattr(model.graph.node[0], "op_type", "Loop"))
    assert "Loop" in refused(synthetic_bundle)
    assert "Loop" in refused(synthetic_bundle), "a refusal is not kept"


def test_weights_that_were_replaced_after_the_check_are_not_kept_for_the_ones_that_were_checked(
    bundle: Bundle, cache: Path, made: list[str]
) -> None:
    good = run(bundle, "backbone", threads=2)
    data = bundle.folder / "backbone.onnx.data"
    weights = data.read_bytes()
    data.write_bytes(bytes(len(weights)))
    run(bundle, "backbone", threads=1)
    data.write_bytes(weights)
    assert run(Bundle.open(bundle.folder), "backbone", threads=1) == good


def test_a_check_can_be_stopped_and_keeps_nothing(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take as long as the run that it comes before, and Ctrl-C has to end both."""
    session = onnxruntime.InferenceSession

    class Stopped(session):  # type: ignore[misc, valid-type]
        def run(self, *arguments: Any) -> Any:
            stop_step(threading.get_ident())
            return super().run(*arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Stopped)
    with load(bundle, "backbone", "onnxruntime", threads=1) as engine:
        with pytest.raises(EngineError, match="backbone was stopped"):
            engine.bind(*buffers(engine))
        assert not entries(cache)
        engine.bind(*buffers(engine))()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_another_thread_may_close_the_engine_while_a_check_runs(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    pytest.importorskip(engine)
    with load(bundle, "backbone", engine, threads=1) as loaded:
        arrays = buffers(loaded)
        owner = kept.KeptGraph if engine == "onnxruntime" else kept.PlanCache
        name = "check" if engine == "onnxruntime" else "load"
        monkeypatch.setattr(owner, name, lambda *_: loaded.close())
        loaded.bind(*arrays)()
        assert all(np.isfinite(values).all() for values in arrays[1].values())
