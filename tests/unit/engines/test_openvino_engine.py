"""What is OpenVINO's own: precision as the graph is typed, one compiled graph per size, and the cache of these."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import tmd_runtime
from tests.helpers.bundle_tools import edit_graph, edit_manifest
from tests.helpers.engine_tools import Buffers, buffers, plain_session
from tests.helpers.synthetic_tim import write_plain_bundle
from tmd_engines import Bundle, EngineError, engine, load
from tmd_engines.cache_folder import cache_folder
from tmd_engines.device.plan_cache import PlanCache
from tmd_engines.openvino import engine as openvino_engine
from tmd_engines.registry import choose

openvino = pytest.importorskip("openvino")


@pytest.fixture
def bundle(synthetic_bundle: Path) -> Bundle:
    return Bundle.open(synthetic_bundle)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("TMD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What OpenVINO was asked to do, in order."""
    calls: list[str] = []
    real = openvino_engine._core()

    class Recording:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(real, name)

    monkeypatch.setattr(openvino_engine, "_core", Recording)
    return calls


def run(bundle: Bundle, graph: str, **dims: int) -> Buffers:
    with load(bundle, graph, "openvino", threads=1) as loaded:
        inputs, outputs = buffers(loaded, **dims)
        loaded.run(inputs, outputs)
        return outputs


def test_graph_is_compiled_once_per_size_while_a_step_uses_it(bundle: Bundle, cache: Path, done: list[str]) -> None:
    with load(bundle, "text_encoder", "openvino", threads=1) as loaded:
        first = loaded.bind(*buffers(loaded))
        loaded.bind(*buffers(loaded, seed=4))
        second = loaded.bind(*buffers(loaded, text=9))
        loaded.bind(*buffers(loaded))
        assert done.count("compile_model") == 2
        first()
        second()
        del first, second
        loaded.bind(*buffers(loaded, batch=2))  # only the latest is kept without a step
        loaded.bind(*buffers(loaded, text=9))
        assert done.count("compile_model") + done.count("import_model") > 3


def test_steps_of_two_sizes_do_not_disturb_each_other(bundle: Bundle) -> None:
    with load(bundle, "flow_head", "openvino", threads=1) as loaded:
        pairs = [buffers(loaded), buffers(loaded, frames=1, tokens=12, text=9)]
        steps = [loaded.bind(*pair) for pair in pairs]
        for step in (*steps, *steps):
            step()
        for inputs, outputs in pairs:
            assert np.abs(outputs["y_next"] - plain_session(bundle, "flow_head", inputs)[0]).max() < 1e-5


@pytest.mark.parametrize(("threads", "expected"), [(1, "1"), (2, "2"), (None, None)])
def test_settings_that_change_numbers_are_given(threads: int | None, expected: str | None) -> None:
    properties = openvino_engine.compile_properties(threads)
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert properties.get("INFERENCE_NUM_THREADS") == expected


def test_products_of_a_bf16_graph_are_bfloat16_and_the_rest_is_not(synthetic_bundle: Path) -> None:
    """Rounded where the graph says so: the error is that of bfloat16 operands, and not of a bfloat16 layer norm."""

    def edit(model: Any) -> None:
        nodes = []
        for node in model.graph.node:
            if node.op_type != "MatMul":
                nodes.append(node)
                continue
            result = node.output[0]
            for slot, name in enumerate(list(node.input)):
                node.input[slot] = f"{result}.{slot}"
                nodes.append(helper.make_node("Cast", [name], [f"{result}.{slot}"], to=TensorProto.BFLOAT16))
            node.output[0] = f"{result}.low"
            nodes += [node, helper.make_node("Cast", [f"{result}.low"], [result], to=TensorProto.FLOAT)]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    expected = run(Bundle.open(synthetic_bundle), "backbone")
    edit_graph(synthetic_bundle, edit)
    edit_manifest(synthetic_bundle, lambda document: document["graphs"]["backbone"].update(precision="bf16"))
    found = run(Bundle.open(synthetic_bundle), "backbone")
    for name, exact in expected.items():
        error = np.abs(found[name] - exact).max() / np.abs(exact).max()
        assert 1e-4 < error < 2e-2, name
    # Layer norm in float32: rows have mean 0 to float32's precision, not to bfloat16's.
    assert np.abs(found["features"].mean(-1)).max() < 1e-6


def test_plan_is_read_back_and_computes_the_same_bits(bundle: Bundle, cache: Path, done: list[str]) -> None:
    cold = run(bundle, "decoder_step")
    assert done.count("compile_model") == 1
    (entry,) = cache.glob("*.plan")
    assert entry.stat().st_size > 10_000 and entry.stat().st_mode & 0o077 == 0 and cache.stat().st_mode & 0o077 == 0
    done.clear()
    warm = run(bundle, "decoder_step")
    assert "compile_model" not in done and "import_model" in done
    assert all(np.array_equal(cold[name], warm[name]) for name in cold)


@pytest.mark.parametrize("graph", ["backbone", "flow_head"])
def test_second_run_computes_the_same_bits(bundle: Bundle, cache: Path, graph: str) -> None:
    """These have rotary embeddings, which OpenVINO's own export spoils."""
    cold, warm = run(bundle, graph), run(bundle, graph)
    assert all(np.array_equal(cold[name], warm[name]) for name in cold)


def test_prompts_of_any_length_share_one_compiled_graph(tmp_path: Path, cache: Path, done: list[str]) -> None:
    bundle = Bundle.open(write_plain_bundle(tmp_path / "plain"))
    rng = np.random.default_rng(0)
    for graph in ("text_encoder", "backbone", "flow_head"):
        with load(bundle, graph, "onnxruntime") as wanted, load(bundle, graph, "openvino") as found:
            for text in (3, 32, 1, 7):
                sizes = {"batch": 2, "frames": 1, "height": 4, "width": 6, "tokens": 6, "text": text}
                given = {name: rng.integers(0, 2, spec.resolve(**sizes)).astype(spec.dtype) if "int" in spec.dtype
                         else rng.standard_normal(spec.resolve(**sizes), np.float32)
                         for name, spec in found.inputs.items()}  # fmt: skip
                made = [{name: each.empty(name, **sizes) for name in each.outputs} for each in (wanted, found)]
                wanted.run(given, made[0])
                found.run(given, made[1])
                for name, values in made[0].items():
                    np.testing.assert_allclose(made[1][name], values, rtol=0, atol=1e-5)
    assert done.count("compile_model") == 3, "one for each graph"
    kept = [key["engine"] for key in PlanCache(cache).known() if key["engine"].startswith("openvino")]
    assert "import_model" not in done and not kept, "a plan is checked at one length only"


def test_a_prompt_of_another_length_compiles_nothing(tmp_path: Path, cache: Path, done: list[str]) -> None:
    with tmd_runtime.load(write_plain_bundle(tmp_path / "plain"), engine="openvino", threads=1) as pipeline:
        pipeline("a red circle", seed=1, steps=2)
        # text encoder and decoder; backbone, flow head and update for steps without guidance and with
        assert done.count("compile_model") == 8
        assert len(list(cache.glob("*.plan"))) == 3, "the decoder's, and those of the update"
        done.clear()
        for prompt in ("a small blue square growing slowly", "star", "a red circle"):
            assert pipeline(prompt, seed=1, steps=2).frames.std() > 1
        assert "compile_model" not in done and "import_model" not in done
        pipeline("a red circle", seed=1, steps=2, size=(96, 64))
        assert "compile_model" in done


def test_weights_that_were_replaced_after_the_check_are_not_kept(bundle: Bundle, cache: Path) -> None:
    data = bundle.folder / "backbone.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    with load(bundle, "backbone", "openvino") as engine:
        engine.run(*buffers(engine))
    assert not list(cache.glob("*.plan"))


def test_plan_that_computes_something_else_is_never_used(
    bundle: Bundle, cache: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bundle.open(bundle.folder)
    with load(other, "decoder_first", "openvino", threads=1) as loaded:
        sizes = tuple(array.shape for array in buffers(loaded)[0].values())
        wrong = loaded._compile(loaded._model, sizes, sizes)  # type: ignore[attr-defined]
    for path in cache.glob("*.plan"):
        path.unlink()
    real = openvino_engine.OpenVinoEngine._checked_plan

    class Spoilt:
        """A compiled graph whose export is another graph's."""

        def __init__(self, compiled: Any) -> None:
            self._compiled = compiled

        def __call__(self, inputs: Buffers) -> Any:
            return {k: -v if v.dtype.kind == "f" else v for k, v in self._compiled(inputs).items()}

        def export_model(self) -> Any:
            return wrong.export_model()

    monkeypatch.setattr(
        openvino_engine.OpenVinoEngine, "_checked_plan", lambda self, plan, shapes: real(self, Spoilt(plan), shapes)
    )
    run(bundle, "decoder_first")
    (entry,) = cache.glob("*.plan")
    assert entry.read_bytes().endswith(b"}\n")  # tried, and nothing kept
    done.clear()
    run(bundle, "decoder_first")
    assert done.count("compile_model") == 1 and "import_model" not in done


@pytest.mark.parametrize("limit", ["KEPT_BYTES", "CHECKED_BYTES"])
def test_what_is_large_is_neither_checked_nor_kept(
    bundle: Bundle, cache: Path, done: list[str], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(openvino_engine, limit, 100)
    run(bundle, "decoder_step")
    assert not list(cache.glob("*.plan")) and "import_model" not in done


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.write_bytes(b""),
        lambda entry: entry.write_bytes(entry.read_bytes()[:-1]),
        lambda entry: entry.write_bytes(entry.read_bytes()[:-1] + b"\0"),
        lambda entry: entry.write_bytes(entry.read_bytes().replace(b"decoder", b"DECODER").replace(b'"key"', b'"kez"')),
        lambda entry: (entry.unlink(), entry.mkdir()),
        lambda entry: (entry.rename(entry.with_suffix(".other")), entry.symlink_to(entry.with_suffix(".other"))),
    ],
    ids=["empty", "cut", "changed", "other key", "folder", "link"],
)
def test_damaged_entry_is_built_anew(bundle: Bundle, cache: Path, done: list[str], damage: Any) -> None:
    cold = run(bundle, "decoder_first")
    damage(next(cache.glob("*.plan")))
    done.clear()
    again = run(bundle, "decoder_first")
    assert done.count("compile_model") == 1
    assert all(np.array_equal(cold[name], again[name]) for name in cold)


def test_whole_entry_that_openvino_does_not_take_is_built_anew(bundle: Bundle, cache: Path, done: list[str]) -> None:
    with load(bundle, "text_encoder", "openvino", threads=1) as loaded:
        pair = buffers(loaded)
        shapes = tuple(array.shape for array in pair[0].values())
        key = {**loaded._key, "shapes": str(shapes)}  # type: ignore[attr-defined]
        PlanCache(cache).store(key, b"not a plan")
        loaded.run(*pair)
        assert np.abs(pair[1]["prompt_embeds"] - plain_session(bundle, "text_encoder", pair[0])[0]).max() < 1e-5
    assert done.count("compile_model") == 1
    assert (PlanCache(cache).load(key) or b"") != b"not a plan"


def test_key_names_everything_a_plan_depends_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(hashes: list[str], threads: int) -> dict[str, str]:
        return openvino_engine._base_key(openvino, hashes, openvino_engine.compile_properties(threads))

    keys = [key(["a"], 1), key(["b"], 1), key(["a"], 2)]
    monkeypatch.setattr(openvino, "__version__", "1.2.3")
    keys.append(key(["a"], 1))
    cpu = {"name": "Another", "cores": 3, "features": ["amx_bf16"]}
    monkeypatch.setattr("tmd_engines.device.cpu.describe_cpu", lambda: cpu)
    keys.append(key(["a"], 1))
    assert len({tuple(sorted(each.items())) for each in keys}) == len(keys)


@pytest.mark.parametrize("state", ["off", "writable by others", "a file"])
def test_without_a_cache_it_runs_all_the_same(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: list[str], state: str
) -> None:
    folder = tmp_path / "elsewhere"
    if state == "a file":
        folder.write_bytes(b"")
    elif state != "off":
        folder.mkdir()
        os.chmod(folder, 0o777)
    monkeypatch.setenv("TMD_CACHE", "off" if state == "off" else str(folder))
    run(bundle, "text_encoder")
    run(bundle, "text_encoder")
    assert done.count("compile_model") == 2
    assert not list(tmp_path.rglob("*.plan"))


def test_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TMD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tmd"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tmd"


def test_old_entries_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmd_engines.device.plan_cache.MAX_FOLDER_BYTES", 3000)
    plans = PlanCache(cache)
    for number in range(5):
        plans.store({"number": str(number)}, bytes(1000))
        os.utime(max(cache.glob("*.plan"), key=lambda path: path.stat().st_mtime_ns), ns=(number, number))
    kept = [number for number in range(5) if plans.load({"number": str(number)})]
    assert kept == [3, 4]


@pytest.mark.parametrize(
    ("precision", "features", "installed", "chosen"),
    [
        ("bf16", ["avx512f", "avx512_bf16"], True, "openvino"),
        ("bf16", ["amx_bf16"], True, "openvino"),
        ("bf16", ["amx_bf16"], False, "onnxruntime"),
        ("bf16", ["avx512f"], True, "onnxruntime"),
        ("bf16", None, True, "onnxruntime"),
        ("fp32", ["amx_bf16"], True, "onnxruntime"),
        ("fp16", ["avx512f"], True, "onnxruntime"),  # this one is small
        ("int8", ["avx512_vnni"], True, "openvino"),
        ("int8", ["avx512f"], True, "onnxruntime"),
        ("fp8", ["amx_bf16", "amx_int8"], True, "onnxruntime"),
    ],
)
def test_auto_takes_openvino_only_where_it_was_measured_faster(
    synthetic_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    features: list[str] | None,
    installed: bool,
    chosen: str,
) -> None:
    edit_manifest(synthetic_bundle, lambda document: document["graphs"]["backbone"].update(precision=precision))
    monkeypatch.setattr(openvino_engine, "describe_cpu", lambda: {"features": features})
    real = importlib.util.find_spec
    monkeypatch.setattr(engine, "find_spec", lambda name: real(name) if installed or name != "openvino" else None)
    assert choose(Bundle.open(synthetic_bundle), "backbone", device="cpu") == (chosen, "cpu")


@pytest.mark.parametrize(
    ("graph", "features", "chosen"),
    [
        ("decoder_first", ["avx512f"], "openvino"),
        ("decoder_first", ["avx2"], "onnxruntime"),
        ("backbone", ["avx512f"], "onnxruntime"),  # whose weights would be there twice in float32
    ],
)
def test_auto_takes_openvino_for_large_decoders_in_fp16(
    synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch, graph: str, features: list[str], chosen: str
) -> None:
    def lower(document: dict[str, Any]) -> None:
        for name in ("backbone", "decoder_first", "decoder_step"):
            document["graphs"][name]["precision"] = "fp16"

    edit_manifest(synthetic_bundle, lower)
    monkeypatch.setattr(openvino_engine, "describe_cpu", lambda: {"features": features})
    monkeypatch.setattr(openvino_engine, "SMALL_BYTES", 0)
    assert choose(Bundle.open(synthetic_bundle), graph, device="cpu") == (chosen, "cpu")


def test_missing_openvino_says_what_to_install(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match="pip install openvino"):
        load(bundle, "backbone", "openvino")


def test_the_graph_that_was_checked_is_the_one_that_runs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, done: list[str]
) -> None:
    """Somebody exchanges the file after it was read and hashed."""
    expected = run(bundle, "decoder_step")
    path, read = bundle.graph_path("decoder_step"), Bundle.read_graph

    def exchanged(self: Bundle, graph: str) -> bytes:
        content = read(self, graph)
        path.write_bytes(self.graph_path("decoder_first").read_bytes())
        return content

    monkeypatch.setattr(Bundle, "read_graph", exchanged)
    found = run(bundle, "decoder_step")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
