"""What every engine promises: the graphs' numbers in the caller's buffers, and a clear sentence for every wrong use."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundle_tools import edit_graph, impossible_transpose, move_behind_links
from tests.helpers.engine_tools import Buffers, buffers, plain_session
from tests.helpers.synthetic import GRAPHS
from tmd_engines import Bundle, BundleError, EngineError, load


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine_name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture
def bundle(synthetic_bundle: Path) -> Bundle:
    return Bundle.open(synthetic_bundle)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("dims", [{}, {"batch": 2}, {"frames": 1, "tokens": 12, "text": 9}])
def test_engine_computes_the_stored_graph(engine_name: str, bundle: Bundle, graph: str, dims: dict[str, int]) -> None:
    with load(bundle, graph, engine_name, threads=1) as engine:
        inputs, outputs = buffers(engine, **dims)
        engine.run(inputs, outputs)
        for expected, found in zip(plain_session(bundle, graph, inputs), outputs.values(), strict=True):
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert np.abs(found.astype(np.float64) - expected).max() < (2 if found.dtype == np.uint8 else 1e-5)


@pytest.mark.parametrize("graph", GRAPHS)
def test_weights_may_lie_behind_links(engine_name: str, synthetic_bundle: Path, tmp_path: Path, graph: str) -> None:
    """As Hugging Face's hub keeps them: under other names, in a folder of its own."""
    linked = Bundle.open(move_behind_links(synthetic_bundle, tmp_path / "blobs"))
    with load(linked, graph, engine_name, threads=1) as engine:
        inputs, outputs = buffers(engine)
        engine.run(inputs, outputs)
    copied = Bundle.open(shutil.copytree(synthetic_bundle, tmp_path / "copied"))
    for expected, found in zip(plain_session(copied, graph, inputs), outputs.values(), strict=True):
        assert np.abs(found.astype(np.float64) - expected).max() < (2 if found.dtype == np.uint8 else 1e-5)
    assert len(list((tmp_path / "blobs").iterdir())) == len(list(synthetic_bundle.iterdir())), "nothing else is there"


def test_bound_step_reads_and_writes_the_same_buffers_every_time(engine_name: str, bundle: Bundle) -> None:
    with load(bundle, "flow_head", engine_name, threads=1) as engine:
        inputs, outputs = buffers(engine)
        step = engine.bind(inputs, outputs)
        addresses = {name: array.ctypes.data for name, array in outputs.items()}
        for seed in (4, 5):
            for name, array in buffers(engine, seed)[0].items():
                inputs[name][...] = array
            step()
            assert np.abs(outputs["y_next"] - plain_session(bundle, "flow_head", inputs)[0]).max() < 1e-5
        assert {name: array.ctypes.data for name, array in outputs.items()} == addresses


def test_step_keeps_its_buffers_alive(engine_name: str, bundle: Bundle) -> None:
    with load(bundle, "text_encoder", engine_name, threads=1) as engine:
        inputs, outputs = buffers(engine)
        expected = plain_session(bundle, "text_encoder", inputs)[0]
        step = engine.bind(inputs, outputs)
        result = outputs["prompt_embeds"]
        alive = weakref.ref(inputs.pop("input_ids"))
        del inputs, outputs
        gc.collect()
        assert alive() is not None
        step()
        assert np.array_equal(result, expected)


def test_inputs_may_share_memory(engine_name: str, bundle: Bundle) -> None:
    """The first inner step starts at the noise: y and noise are one buffer."""
    with load(bundle, "flow_head", engine_name, threads=1) as engine:
        inputs, outputs = buffers(engine)
        inputs["y"] = inputs["noise"]
        engine.run(inputs, outputs)
        assert np.abs(outputs["y_next"] - plain_session(bundle, "flow_head", inputs)[0]).max() < 1e-5


def test_specs_and_empty(engine_name: str, bundle: Bundle) -> None:
    with load(bundle, "decoder_step", engine_name) as engine:
        assert engine.outputs["frames"].shape == ("batch", 4, "8*height", "8*width", 3)
        frames = engine.empty("frames", batch=2, height=3, width=5, unused=9)
        assert frames.shape == (2, 4, 24, 40, 3) and frames.dtype == np.uint8
        one: Any = np.int64(1)  # as the shape of an array may give it
        assert engine.empty("cache_31", batch=one, height=3, width=5).shape == (1, 1, 1, 3, 5)


@pytest.mark.parametrize(
    ("name", "dims", "said"),
    [
        ("pixels", {}, "no input or output 'pixels'"),
        ("frames", {"batch": 1, "height": 2}, "a value for width"),
        ("frames", {"batch": 1, "height": 0, "width": 2}, "at least 1"),
        ("frames", {"batch": 1, "height": -4, "width": 2}, "at least 1"),
        ("frames", {"batch": 1, "height": 2.0, "width": 2}, "at least 1"),
    ],
)
def test_empty_says_what_is_wrong(engine_name: str, bundle: Bundle, name: str, dims: dict[str, Any], said: str) -> None:
    with load(bundle, "decoder_first", engine_name) as engine, pytest.raises(EngineError, match=said):
        engine.empty(name, **dims)


def without(name: str) -> Any:
    return lambda inputs, outputs: inputs.pop(name)


def replaced(name: str, change: Any) -> Any:
    def edit(inputs: Buffers, outputs: Buffers) -> None:
        side = inputs if name in inputs else outputs
        side[name] = change(side[name])

    return edit


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def unaligned(array: np.ndarray) -> np.ndarray:
    return np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without("noise"), "misses the input noise"),
        (lambda inputs, outputs: outputs.clear(), "misses the output y_next"),
        (lambda inputs, outputs: inputs.update(z=inputs["y"]), "has no input 'z'"),
        (replaced("y", lambda a: a.tolist()), "is a list"),
        (replaced("y", lambda a: a.astype(np.float64)), "dtype float64"),
        (replaced("y", lambda a: a.astype(">f4")), "dtype >f4"),
        (replaced("y", lambda a: np.asfortranarray(a)), "C-contiguous"),
        (replaced("y", lambda a: np.repeat(a, 2, axis=4)[..., ::2]), "C-contiguous"),
        (replaced("y", unaligned), "aligned"),
        (replaced("y_next", read_only), "read-only"),
        (replaced("y", lambda a: a[0]), r"shape \[16, 5, 8, 6\]"),
        (replaced("y", lambda a: np.ascontiguousarray(a[:, :8])), r"shape \[1, 8, 5, 8, 6\]"),
        (replaced("y", lambda a: a[:, :, :0]), r"shape \[1, 16, 0, 8, 6\]"),
        (replaced("noise", lambda a: np.ascontiguousarray(a[:, :, :2])), "frames is 5 by the shape of y"),
        (replaced("y_next", lambda a: np.zeros((2, *a.shape[1:]), a.dtype)), "batch is 1 by the shape of y"),
        (lambda inputs, outputs: outputs.update(y_next=inputs["y"]), "shares memory with y"),
    ],
)
def test_bind_says_what_is_wrong(engine_name: str, bundle: Bundle, edit: Any, said: str) -> None:
    with load(bundle, "flow_head", engine_name, threads=1) as engine:
        inputs, outputs = buffers(engine)
        edit(inputs, outputs)
        with pytest.raises(EngineError, match=said):
            engine.bind(inputs, outputs)


def test_partly_shared_memory_is_noticed(engine_name: str, bundle: Bundle) -> None:
    with load(bundle, "decoder_step", engine_name, threads=1) as engine:
        inputs, outputs = buffers(engine)
        block = np.zeros((33, *inputs["cache_00"].shape), np.float32)
        inputs |= {f"cache_{k:02d}": block[k] for k in range(32)}
        engine.bind(inputs, outputs)  # neighbours, no overlap
        outputs["cache_07_next"] = block.reshape(-1)[5 : 5 + block[0].size].reshape(block[0].shape)
        with pytest.raises(EngineError, match=r"cache_07_next .* shares memory with cache_0"):
            engine.bind(inputs, outputs)
        inputs["latents"] = block.reshape(-1)[: inputs["latents"].size].reshape(inputs["latents"].shape)
        inputs["cache_00"] = block[1]  # ends before the latents end, in which both lie
        inputs |= {f"cache_{k:02d}": block[17 + k % 8] for k in range(1, 32)}
        outputs["cache_07_next"] = block[5]
        with pytest.raises(EngineError, match="shares memory with latents"):
            engine.bind(inputs, outputs)
        outputs["cache_07_next"] = outputs["cache_08_next"]
        with pytest.raises(EngineError, match="shares memory with cache_0"):
            engine.bind(inputs, outputs)


def test_sizes_that_only_the_graph_can_relate_are_one_sentence(engine_name: str, bundle: Bundle) -> None:
    """OpenVINO finds out when it compiles for the sizes, ONNX Runtime when it runs."""
    with load(bundle, "flow_head", engine_name, threads=1) as engine:
        with pytest.raises(EngineError, match=r"(ONNX Runtime failed in|OpenVINO cannot compile) graph flow_head") as e:
            engine.run(*buffers(engine, tokens=59))
        assert "\n" not in str(e.value)
        engine.run(*buffers(engine))  # and goes on working


def test_read_only_inputs_are_read(engine_name: str, bundle: Bundle) -> None:
    with load(bundle, "text_encoder", engine_name, threads=1) as engine:
        inputs, outputs = buffers(engine)
        engine.run({name: read_only(array) for name, array in inputs.items()}, outputs)
        expected = plain_session(bundle, "text_encoder", inputs)[0]
        assert np.abs(outputs["prompt_embeds"] - expected).max() < 1e-5


def test_closed_engine_frees_its_graph_and_says_so(engine_name: str, bundle: Bundle) -> None:
    engine = load(bundle, "backbone", engine_name, threads=1)
    step = engine.bind(*buffers(engine))
    held = "_session" if engine_name == "onnxruntime" else "_latest"
    graph = weakref.ref(getattr(engine, held))
    engine.close()
    engine.close()
    gc.collect()
    assert graph() is None
    with pytest.raises(EngineError, match="was closed"):
        step()
    with pytest.raises(EngineError, match="is closed"):
        engine.bind({}, {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"engine": "magic"}, r"no engine 'magic'.*onnxruntime"),
        ({"engine": "tensorrt", "device": "cpu"}, "tensorrt runs on device cuda, not on cpu"),
        ({"engine": "openvino", "device": "cuda"}, "openvino runs on device cpu, not on cuda"),
        ({"engine": "openvino", "device": "cuda:1"}, "openvino runs on device cpu, not on cuda:1"),
        ({"device": "tpu"}, "no device 'tpu'.*auto, cpu, cuda"),
        ({"device": "cpu:1"}, "no device 'cpu:1'"),
        ({"device": "cuda:N"}, "no device 'cuda:N'"),
        ({"device": None}, "no device None"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": True}, "threads is True"),
        ({"threads": "2"}, "threads is '2'"),
        ({"graph": "encoder"}, "no graph 'encoder'"),
    ],
)
def test_load_says_what_is_not_to_be_had(
    engine_name: str, bundle: Bundle, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(EngineError, match=said):
        load(bundle, **({"graph": "backbone", "engine": engine_name} | arguments))


def test_graph_exchanged_after_opening_is_not_loaded(engine_name: str, bundle: Bundle) -> None:
    path = bundle.folder / "backbone.onnx"
    path.write_bytes((bundle.folder / "flow_head.onnx").read_bytes())
    with pytest.raises(BundleError):
        load(bundle, "backbone", engine_name)


def test_weights_cut_after_opening_do_not_load(engine_name: str, bundle: Bundle) -> None:
    (bundle.folder / "backbone.onnx.data").write_bytes(b"")
    with pytest.raises(EngineError, match="cannot load"):
        load(bundle, "backbone", engine_name)


def test_graph_that_the_engine_cannot_load_is_one_sentence(engine_name: str, synthetic_bundle: Path) -> None:
    edit_graph(synthetic_bundle, impossible_transpose)
    with pytest.raises(EngineError, match=r"cannot load .*backbone.onnx: ") as caught:
        load(Bundle.open(synthetic_bundle), "backbone", engine_name)
    assert "\n" not in str(caught.value)
