"""Whole runs of the C++ library on made-up bundles: what they are called, what fails in them, and their launches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.helpers.bundle_tools import edit_graph, move_behind_links, reseal
from tests.helpers.cpp_tools import RUN, Twin, engine_options, onnxruntime_library, program, twin
from tests.helpers.synthetic import (
    GRAPHS,
    SECOND,
    TEXT_DIM,
    TEXT_LENGTH,
    VOCABULARY,
    flow_map_sampler,
    velocity_sampler,
    write_synthetic_bundle,
)
from tests.helpers.synthetic_tim import CLASSES, write_tim_bundle
from tmd_engines import Bundle
from tmd_engines.device.plan_cache import PlanCache
from tmd_runtime.text.tokenizer import Tokenizer

PROMPT = "a red circle moving right"
BUNDLES: dict[str, Callable[[Path], Path]] = {
    "tmd": write_synthetic_bundle,
    "euler": lambda folder: write_synthetic_bundle(folder, sampler=velocity_sampler(rule="euler")),
    "renoise": lambda folder: write_synthetic_bundle(folder, sampler=velocity_sampler(rule="renoise")),
    "unipc, guided": lambda folder: write_synthetic_bundle(folder, sampler=velocity_sampler(steps=5, guidance=3.0)),
    "flow map, guided": lambda folder: write_synthetic_bundle(folder, sampler=flow_map_sampler(guidance=3.0)),
    "two transformers": lambda folder: write_synthetic_bundle(
        folder, (*GRAPHS, *SECOND), velocity_sampler(steps=4, guidance=3.0, boundary=0.875)
    ),
    "tim": write_tim_bundle,
    "tim, guided": lambda folder: write_tim_bundle(folder, guidance=3.0),
}


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    engine_options(request.param)
    name: str = request.param
    return name


def ask(do: str, bundle: Path, engine: str, **more: Any) -> dict[str, Any]:
    library = str(onnxruntime_library()) if engine == "onnxruntime" else ""
    return twin().ask(do, bundle=str(bundle), engine=engine, library=library, **more)


def test_a_description_names_family_architecture_and_rule(tmp_path: Path, engine: str) -> None:
    student = ask("describe", write_synthetic_bundle(tmp_path / "student"), engine)["ok"]
    assert (student["family"], student["architecture"], student["rule"]) == ("tmd", "wan2.1-t2v", "euler")
    assert (student["allowed_steps"], student["allowed_inner_steps"]) == ([1, 2, 3, 4], [1, 2, 4])
    stills = ask("describe", write_tim_bundle(tmp_path / "stills", classes=True), engine)["ok"]
    assert (stills["family"], stills["rule"], stills["allowed_steps"]) == ("tim", "flow_map", [])
    assert (stills["inner_steps"], stills["classes"], stills["can_denoise"]) == (1, CLASSES, 1)


@pytest.mark.parametrize("stage", ["backbone", "flow_head"])
@pytest.mark.parametrize("name", ["tmd", "unipc, guided", "tim"])
def test_nan_is_an_error_that_names_its_stage(tmp_path: Path, engine: str, name: str, stage: str) -> None:
    bundle = BUNDLES[name](tmp_path / "bundle")
    weights = bundle / f"{stage}.onnx.data"
    weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, np.float32).tobytes())
    reseal(bundle)
    answer = ask("run", bundle, engine, prompt=PROMPT, wishes={"seed": 1})
    assert answer.get("status") == RUN and f"the stage {stage} gave NaN" in answer["error"], answer


def overflow_from(folder: Path, graph: str, name: str) -> None:
    """Makes `graph` take the root of the root of its input's fourth power: Inf for what is above 1e9 or so."""

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = ["size" if each == name else each for each in node.input]
        steps = [("Mul", [name, name], "square"), ("Mul", ["square", "square"], "fourth"),
                 ("Sqrt", ["fourth"], "root"), ("Sqrt", ["root"], "size")]  # fmt: skip
        for place, (kind, inputs, output) in enumerate(steps):
            model.graph.node.insert(place, helper.make_node(kind, inputs, [output], name=f"of {output}"))

    edit_graph(folder, edit, graph)


def enlarge_tokens(folder: Path, prompt: str, but: str) -> None:
    """Multiplies the embeddings of tokens that are in `prompt` and not in `but` by 1e18, which is finite."""
    ids = [
        set(Tokenizer(folder / "tokenizer.model", TEXT_LENGTH)(text).input_ids.ravel().tolist())
        for text in (prompt, but)
    ]
    table = next(
        weight
        for weight in onnx.load(folder / "text_encoder.onnx", load_external_data=False).graph.initializer
        if list(weight.dims) == [VOCABULARY, TEXT_DIM]
    )
    offset = int({entry.key: entry.value for entry in table.external_data}.get("offset", "0"))
    rows = np.memmap(folder / "text_encoder.onnx.data", np.float32, "r+", offset, (VOCABULARY, TEXT_DIM))
    rows[sorted(ids[0] - ids[1])] *= 1e18
    rows.flush()
    reseal(folder)


@pytest.mark.parametrize(("stage", "name"), [("backbone", "prompt_embeds"), ("flow_head", "context")])
def test_nan_of_the_negative_pass_alone_names_its_stage(tmp_path: Path, engine: str, stage: str, name: str) -> None:
    sampler = velocity_sampler(steps=2, guidance=3.0, negative_prompt="a small blue square")
    bundle = write_synthetic_bundle(tmp_path / "bundle", sampler=sampler)
    overflow_from(bundle, stage, name)
    enlarge_tokens(bundle, "a small blue square", but=PROMPT)
    answer = ask("run", bundle, engine, prompt=PROMPT, wishes={"seed": 1, "frames": 1})
    assert answer.get("status") == RUN and f"the stage {stage} gave NaN" in answer["error"], answer
    assert "ok" in ask("run", bundle, engine, prompt=PROMPT, wishes={"seed": 1, "frames": 1, "guidance": 1.0})


def test_a_bundle_without_the_update_says_so(tmp_path: Path, engine: str) -> None:
    bundle = write_synthetic_bundle(tmp_path / "bundle", ("text_encoder", "backbone", "flow_head", "decoder_first"))
    assert ask("describe", bundle, engine)["ok"]["can_denoise"] == 0
    answer = ask("run", bundle, engine, prompt=PROMPT, wishes={"seed": 1, "frames": 1})
    assert answer.get("status") == RUN and "no graph update" in answer["error"], answer


def test_weights_may_lie_behind_links(tmp_path: Path, engine: str) -> None:
    """As in the cache of Hugging Face's hub: the same frames, and no trace beside the files themselves."""
    bundle = write_synthetic_bundle(tmp_path / "bundle")
    expected = ask("run", bundle, engine, prompt=PROMPT, wishes={"seed": 1})
    assert "ok" in expected
    count = len(list(bundle.iterdir()))
    linked = move_behind_links(bundle, tmp_path / "blobs")
    assert ask("run", linked, engine, prompt=PROMPT, wishes={"seed": 1})["ok"] == expected["ok"]
    assert len(list((tmp_path / "blobs").iterdir())) == count


def test_weights_behind_links_may_lie_in_another_file_system(tmp_path: Path) -> None:
    """OpenVINO wants a second name of them, which must be in theirs."""
    engine_options("openvino")
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system")
    linked = move_behind_links(write_synthetic_bundle(tmp_path / "bundle"), tmp_path / "blobs")
    question = {"bundle": str(linked), "engine": "openvino", "prompt": PROMPT, "wishes": {"seed": 1}}
    assert Twin(TMPDIR="/dev/shm").ask("run", **question)["ok"] == twin().ask("run", **question)["ok"]


def test_onnx_runtime_records_nothing(tmp_path: Path) -> None:
    """Version 1.31 writes a device id and a database of events, in the user's cache, when it starts."""
    engine_options("onnxruntime")
    (tmp_path / "home").mkdir()
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path / "home"))
    question = {"engine": "onnxruntime", "library": str(onnxruntime_library()), "prompt": PROMPT}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        found = Twin(**places).ask(
            "run", bundle=str(write_synthetic_bundle(tmp_path / "b")), **question, wishes={"seed": 1}
        )
    assert "ok" in found and not list((tmp_path / "home").iterdir())


def test_openvino_reads_graphs_from_a_folder_of_our_own(tmp_path: Path) -> None:
    """Where there can be one; it is gone afterwards."""
    engine_options("openvino")
    question = {"bundle": str(write_synthetic_bundle(tmp_path / "bundle")), "engine": "openvino", "prompt": PROMPT}
    expected = twin().ask("run", **question, wishes={"seed": 1})
    folder = tmp_path / "own"
    folder.mkdir()
    os.utime(folder, (0, 0))
    found = Twin(TMPDIR=str(folder)).ask("run", **question, wishes={"seed": 1})
    assert found["ok"] == expected["ok"]
    assert list(folder.iterdir()) == [] and folder.stat().st_mtime > 0  # was used
    nowhere = Twin(TMPDIR=str(tmp_path / "nowhere")).ask("run", **question, wishes={"seed": 1})
    assert nowhere["ok"] == expected["ok"]


@pytest.fixture(scope="module")
def stand_in() -> tuple[Twin, str]:
    """A twin that finds the stand-in for CUDA, and the stand-in for TensorRT."""
    library = program("tmd_twin").with_name("libtmd_fake_tensorrt.so")
    if not library.exists():
        pytest.skip("the engine tensorrt was built without NVIDIA's headers")
    engine_options("onnxruntime")
    return Twin(LD_LIBRARY_PATH=str(library.parent / "fake_cuda")), str(library)


@pytest.mark.parametrize("name", BUNDLES)
def test_steps_as_launches_give_the_same_frames(tmp_path: Path, stand_in: tuple[Twin, str], name: str) -> None:
    """The first step runs call by call, the others as one launch each. Two runs: the second finds what was recorded."""
    there, library = stand_in
    bundle = BUNDLES[name](tmp_path / "bundle")
    device = {"bundle": str(bundle), "engine": "tensorrt", "library": library, "plan_cache": str(tmp_path / "cache")}
    version = there.ask("describe", **device)["ok"]["engine_version"]
    put_plans(there, bundle, tmp_path / "cache", version)
    wishes = {"seed": 5, "rho": 0.5} if name.startswith("tim") else {"seed": 5}
    expected = ask("run", bundle, "onnxruntime", prompt=PROMPT, wishes=wishes, previews=True)
    for _ in range(2):
        found = there.ask("run", **device, prompt=PROMPT, wishes=wishes, previews=True)
        assert "ok" in found, found
        assert (found["ok"], found["previews"]) == (expected["ok"], expected["previews"])
        assert found["fractions"][-1] == 1


def put_plans(there: Twin, bundle: Path, cache: Path, version: str) -> None:
    """The entries that `tmd-engine build` would leave, of plans that the stand-in reads."""
    manifest = Bundle.open(bundle).manifest
    video, patch = manifest.video, manifest.model.patch_size
    frames = (video.frames - 1) // manifest.latents.temporal_stride + 1
    height, width = (side // manifest.latents.spatial_stride for side in (video.height, video.width))
    tokens = frames * (height // patch[1]) * (width // patch[2])
    dims = {"frames": frames, "height": height, "width": width, "tokens": tokens, "text": manifest.text.max_length}
    (cache / "tensorrt").mkdir(parents=True, mode=0o700)
    for name, graph in manifest.graphs.items():
        for rows in (1, 2):
            shapes = {spec.name: spec.resolve(batch=rows, **dims) for spec in graph.inputs}
            target = {"version": version, "device": "Fake GPU", "capability": "12.0", "streaming": False}
            key = there.ask("plan_key", bundle=str(bundle), graph=name, shapes=shapes, **target)["ok"]
            PlanCache(cache / "tensorrt").store(key | {"lowered": "a" * 64}, f"{bundle}\n{name}".encode())
