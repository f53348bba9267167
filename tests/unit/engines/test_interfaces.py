"""A bundle whose manifest and graphs agree with each other, and not with the loop that would run them, is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from tests.helpers.built_in import BUNDLES as BUILT_IN
from tests.helpers.bundle_tools import edit_graph, edit_manifest, refused
from tests.helpers.synthetic import CHANNELS, GRAPHS, flow_map_sampler, velocity_sampler, write_synthetic_bundle
from tests.helpers.synthetic_tim import write_plain_bundle, write_tim_bundle
from tmd_engines import Bundle
from tmd_engines.bundle.families import FAMILIES

_TYPES = {"float32": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8, "int64": onnx.TensorProto.INT64}
BUNDLES: dict[str, Callable[[Path], Path]] = {
    "tmd": write_synthetic_bundle,
    "wan": lambda folder: write_synthetic_bundle(folder, sampler=velocity_sampler()),
    "held": lambda folder: write_synthetic_bundle(folder, ("encoder", *GRAPHS), velocity_sampler(), holds=True),
    "anyflow": lambda folder: write_synthetic_bundle(folder, sampler=flow_map_sampler()),
    "tim": lambda folder: write_tim_bundle(folder, pictures=True),
    "classes": lambda folder: write_tim_bundle(folder, classes=True),
    "plain": write_plain_bundle,
}


def change(folder: Path, graph: str, tensor: str, **changes: Any) -> None:
    """Another name, dtype or shape for an input or output, in the manifest and in the graph alike."""

    def in_manifest(document: dict[str, Any]) -> None:
        entry = document["graphs"][graph]
        spec = next(each for each in (*entry["inputs"], *entry["outputs"]) if each["name"] == tensor)
        spec |= changes

    def in_graph(model: onnx.ModelProto) -> None:
        value = next(each for each in (*model.graph.input, *model.graph.output) if each.name == tensor)
        spec = next(
            each
            for side in (
                Bundle.open(folder).manifest.graphs[graph].inputs,
                Bundle.open(folder).manifest.graphs[graph].outputs,
            )
            for each in side
            if each.name == tensor
        )
        found = {"name": tensor, "dtype": spec.dtype, "shape": list(spec.shape), **changes}
        value.CopyFrom(helper.make_tensor_value_info(found["name"], _TYPES[found["dtype"]], found["shape"]))
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [found["name"] if each == tensor else each for each in names]

    edit_graph(folder, in_graph, graph)
    edit_manifest(folder, in_manifest)


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles_of_every_family_are_as_their_signatures_say(name: str, tmp_path: Path) -> None:
    manifest = Bundle.open(BUNDLES[name](tmp_path / "bundle")).manifest
    assert manifest.family is FAMILIES[manifest.model.family]
    assert set(manifest.graphs) <= set(manifest.family.signatures)


@pytest.mark.parametrize(
    ("bundle", "graph", "tensor", "changes"),
    [
        ("tmd", "backbone", "x", {"shape": ["batch", 4096, "frames", "height", "width"]}),
        ("tmd", "backbone", "x", {"shape": ["batch", CHANNELS, "frames", "height", "2*width"]}),
        ("tmd", "backbone", "t", {"shape": [1]}),
        ("tmd", "backbone", "prompt_embeds", {"shape": ["batch", "text", 65]}),
        ("tmd", "backbone", "rope_cos", {"shape": ["tokens", 4]}),
        ("tmd", "backbone", "features", {"shape": ["batch", "tokens", 31]}),
        ("tmd", "flow_head", "noise", {"dtype": "uint8"}),
        ("tmd", "flow_head", "s", {"shape": [1_000_000]}),
        ("tmd", "flow_head", "s", {"shape": ["steps"]}),
        ("tmd", "flow_head", "y_next", {"shape": ["batch", CHANNELS, "frames", "height"]}),
        ("tmd", "update", "coefficients", {"shape": [8]}),
        ("held", "backbone", "held", {"shape": ["tokens"]}),
        ("held", "update", "picture", {"shape": ["batch", CHANNELS, "frames", "height", "width"]}),
        ("held", "flow_head", "held", {"name": "hold"}),
        ("tmd", "update", "magnitude", {"shape": ["batch"]}),
        ("tmd", "text_encoder", "input_ids", {"name": "ids"}),
        ("tmd", "text_encoder", "prompt_embeds", {"shape": ["batch", "text", 63]}),
        ("tmd", "decoder_first", "latents", {"shape": ["batch", CHANNELS, 2, "height", "width"]}),
        ("tmd", "decoder_first", "latents", {"shape": ["batch", 8, 1, "height", "width"]}),
        ("tmd", "decoder_first", "frames", {"shape": ["batch", 1, "16*height", "8*width", 3]}),
        ("tmd", "decoder_step", "frames", {"shape": ["batch", 8, "8*height", "8*width", 3]}),
        ("tmd", "decoder_first", "cache_00", {"shape": ["batch", 2, 1, "height", "width"]}),
        ("tmd", "decoder_first", "cache_00", {"name": "cache_99"}),
        ("tmd", "decoder_step", "cache_03", {"shape": ["batch", 1, 1, "height", "tokens"]}),
        ("tmd", "decoder_step", "cache_03_next", {"name": "cache_03_after"}),
        ("wan", "flow_head", "velocity", {"shape": [1]}),
        ("wan", "flow_head", "x", {"name": "y"}),
        ("anyflow", "flow_head", "r", {"name": "s"}),
        ("wan", "update", "negative", {"shape": ["batch", 1, "frames", "height", "width"]}),
        ("tim", "flow_head", "guidance", {"shape": [2, 2]}),
        ("tim", "flow_head", "context", {"shape": ["batch", "text", 33]}),
        ("tim", "backbone", "context", {"shape": ["batch", "words", 32]}),
        ("tim", "flow_head", "x", {"shape": ["batch", CHANNELS, "frames", "height", "width"]}),
        ("tim", "encoder", "latents", {"shape": ["batch", CHANNELS + 1, 1, "height", "width"]}),
        ("tim", "encoder", "frames", {"dtype": "float32"}),
        ("classes", "backbone", "labels", {"name": "prompt_embeds"}),
        ("classes", "backbone", "labels", {"dtype": "float32"}),
        ("plain", "text_encoder", "input_ids", {"shape": ["batch", 77]}),
    ],
)
def test_a_tensor_that_the_loop_would_not_expect_is_refused(
    bundle: str, graph: str, tensor: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = BUNDLES[bundle](tmp_path / "bundle")
    change(folder, graph, tensor, **changes)
    message = refused(folder)
    assert graph in message or "caches" in message, message


def test_a_graph_with_one_input_more_is_refused(synthetic_bundle: Path) -> None:
    extra = {"name": "extra", "dtype": "float32", "shape": ["batch"]}

    def in_graph(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("extra", _TYPES["float32"], ["batch"]))

    edit_graph(synthetic_bundle, in_graph, "flow_head")
    edit_manifest(synthetic_bundle, lambda document: document["graphs"]["flow_head"]["inputs"].append(extra))
    assert "'extra' is not an input of graph 'flow_head'" in refused(synthetic_bundle)


@pytest.mark.parametrize("name", ["decoder_first", "decoder_step"])
def test_a_cache_in_a_place_of_its_own_is_refused(synthetic_bundle: Path, name: str) -> None:
    """What looks like a cache and is none would be an input that nobody fills."""
    spare: dict[str, Any] = {"name": "cache_90", "dtype": "float32", "shape": ["batch", 1, 1, "height", "width"]}

    def in_graph(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("cache_90", _TYPES["float32"], spare["shape"]))

    edit_graph(synthetic_bundle, in_graph, name)
    edit_manifest(synthetic_bundle, lambda document: document["graphs"][name]["inputs"].append(spare))
    assert "cache" in refused(synthetic_bundle)


def test_a_graph_that_the_family_does_not_know_is_refused(synthetic_bundle: Path) -> None:
    def rename(document: dict[str, Any]) -> None:
        document["graphs"]["upscaler"] = document["graphs"].pop("decoder_step")

    edit_manifest(synthetic_bundle, rename)
    assert "no graph 'upscaler' in family 'tmd'" in refused(synthetic_bundle)


def test_a_bundle_may_lack_any_graph(tmp_path: Path) -> None:
    for graph in ("text_encoder", "backbone", "flow_head", "update", "decoder_first"):
        folder = write_synthetic_bundle(tmp_path / graph, (graph,))
        assert list(Bundle.open(folder).manifest.graphs) == [graph]


@pytest.mark.parametrize("name", ["tiny", "tim-tiny", "tmd", "wan", "tim"])
@pytest.mark.parametrize("patch", [[1, 2, 1], [1, 4, 1], [1, 1, 4], [2, 2, 2], [1, 1, 1], [2, 1, 2], [1, 4, 4]])
def test_patches_that_the_graphs_do_not_make_are_refused(name: str, patch: list[int], tmp_path: Path) -> None:
    folder = bundle_of(name, tmp_path)

    def edit(document: dict[str, Any]) -> None:
        document["model"]["patch_size"] = patch
        document["video"] |= {"width": 64, "height": 64}

    edit_manifest(folder, edit)
    assert "model.patch_size" in refused(folder)


@pytest.mark.parametrize("name", ["tiny", "tim-tiny", "tmd", "wan", "tim", "classes"])
@pytest.mark.parametrize(("layers", "head"), [(0, 1), (1, 0), (2, 0), (1000, 0), (5, 5), (8, 2), (8, 8), (-4, -1)])
def test_shares_of_blocks_that_the_graphs_do_not_have_are_refused(
    name: str, layers: int, head: int, tmp_path: Path
) -> None:
    folder = bundle_of(name, tmp_path)

    def edit(document: dict[str, Any]) -> None:
        document["model"]["num_layers"] += layers
        document["model"]["head_blocks"] += head

    edit_manifest(folder, edit)
    assert "num_layers" in refused(folder)


def bundle_of(name: str, folder: Path) -> Path:
    """A copy of a built-in bundle, or one of `BUNDLES`."""
    if name in BUNDLES:
        return BUNDLES[name](folder / "bundle")
    return Path(shutil.copytree(BUILT_IN / name, folder / "bundle"))
