"""The nodes for ComfyUI keep its contract and make the runtime's own videos. ComfyUI itself is stood in for."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tmd_runtime
from tests.helpers.built_in import BUILT_IN
from tests.helpers.comfyui_host import PACK, Host, Interrupted, load_pack, run_workflow, unload_pack
from tests.helpers.synthetic import GRAPHS, velocity_sampler, write_synthetic_bundle
from tmd_runtime import UsageFailure

torch = pytest.importorskip("torch")

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN"}
PROMPT = "a red circle moving right on a black background"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    found = Host(tmp_path / "models")
    yield found
    unload_pack(found)


@pytest.fixture
def pack(host: Host) -> ModuleType:
    return load_pack(host)


def workflow(name: str, **sampler: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((PACK / "workflows" / f"{name}.json").read_text())
    for node in found.values():
        if node["class_type"] == "TMDSampler":
            node["inputs"].update(sampler)
    return found


def test_every_node_is_what_comfyui_expects(pack: ModuleType) -> None:
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        assert name.startswith("TMD") and node.CATEGORY == "tmd" and node.DESCRIPTION.endswith(".")
        assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
        inputs = node.INPUT_TYPES()
        names = [*inputs["required"], *inputs.get("optional", {})]
        arguments = list(inspect.signature(getattr(node, node.FUNCTION)).parameters)[1:]
        assert sorted(arguments) == sorted(names), name
        for kind, *more in (*inputs["required"].values(), *inputs.get("optional", {}).values()):
            assert isinstance(kind, list) or kind in WIDGETS or kind.isupper()
            if not isinstance(kind, list) and kind in WIDGETS:
                assert "default" in more[0], name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_nodes_and_inputs_that_are_there(path: Path, pack: ModuleType) -> None:
    for node in json.loads(path.read_text()).values():
        if node["class_type"].startswith("TMD"):
            inputs = pack.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
            assert set(node["inputs"]) <= {*inputs["required"], *inputs.get("optional", {})}


def test_a_workflow_makes_the_video_of_the_runtime_with_progress_and_previews(pack: ModuleType, host: Host) -> None:
    done = run_workflow(pack.NODE_CLASS_MAPPINGS, workflow("text_to_video", seed=7, frames=5), {})
    images, fps = done["4"]
    with tmd_runtime.load() as pipeline:
        expected = pipeline(PROMPT, seed=7, frames=5)
    assert images.dtype == torch.float32 and tuple(images.shape) == (5, 64, 64, 3)
    assert np.array_equal((255 * images).round().numpy().astype(np.uint8), expected.frames)
    assert fps == expected.fps == done["1"][1]
    assert (4, 4) in host.updates and (2, 2) in host.updates, "two outer times two inner steps, then two latent frames"
    ((kind, picture, _),) = host.previews
    assert kind == "JPEG" and picture.size == (64, 64)


def test_latents_are_those_of_comfyuis_own_vae(pack: ModuleType) -> None:
    """Between nodes ComfyUI keeps x·std + mean; what other nodes make of it comes back within a level."""
    nodes = pack.NODE_CLASS_MAPPINGS
    done = run_workflow(nodes, workflow("text_to_video", seed=7, frames=5, preview=False), {})
    bundle, (latent,), (images, _) = done["1"][0], done["3"], done["4"]
    with tmd_runtime.load() as pipeline:
        ours = pipeline.denoise(pipeline.encode(PROMPT), seed=7, frames=5)
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1, 1)
        for values in (bundle.manifest.latents.mean, bundle.manifest.latents.std)
    )
    torch.testing.assert_close(
        latent["samples"].double(), torch.from_numpy(ours).double() * deviation + mean, rtol=0, atol=1e-5
    )
    (again, _) = nodes["TMDDecode"]().decode(bundle, {"samples": latent["samples"].clone()})
    assert (255 * (again - images)).abs().max() < 1.01
    (changed, _) = nodes["TMDDecode"]().decode(bundle, {**latent, "samples": 0.5 * latent["samples"]})
    assert (255 * (changed - images)).abs().max() > 10, "what another node changed is not forgotten"
    with pytest.raises(ValueError, match=r"this bundle takes one video of \[1, 16, frames"):
        nodes["TMDDecode"]().decode(bundle, {"samples": torch.zeros(1, 4, 8, 8)})


def test_a_picture_becomes_another_one(pack: ModuleType) -> None:
    nodes = pack.NODE_CLASS_MAPPINGS
    picture = torch.linspace(0, 1, 64 * 64 * 3).view(1, 64, 64, 3)
    done = run_workflow(nodes, workflow("picture_to_picture"), {"2": (picture, None)})
    with tmd_runtime.load("builtin:tim-tiny") as pipeline:
        image = (255 * picture[0]).round().numpy().astype(np.uint8)
        wishes: dict[str, Any] = {"seed": 1, "steps": 8, "strength": 0.6, "size": (64, 64)}
        expected = pipeline("a red star on a navy background", image=image, **wishes).frames
    assert np.array_equal((255 * done["6"][0]).round().numpy().astype(np.uint8), expected)


def test_a_model_that_holds_a_first_frame_gets_it_without_a_strength(pack: ModuleType, tmp_path: Path) -> None:
    sampler = velocity_sampler(rule="euler", steps=2, allowed_steps=[2], times=[1.0, 0.8], time_rounding="none")
    folder = tmp_path / "models" / "tmd" / "holds"
    folder.parent.mkdir(parents=True)
    write_synthetic_bundle(folder, ("encoder", *GRAPHS), sampler, holds=True)
    nodes = pack.NODE_CLASS_MAPPINGS
    picture = np.random.default_rng(3).integers(0, 256, (32, 48, 3), np.uint8)
    bundle, _ = nodes["TMDLoadBundle"]().load("holds")
    (positive,) = nodes["TMDEncodePrompt"]().encode(bundle, PROMPT)
    (first,) = nodes["TMDEncodeImage"]().encode(bundle, torch.from_numpy(picture[None] / np.float32(255)), 48, 32)
    (latent,) = nodes["TMDSampler"]().sample(bundle, positive, 7, frames=5, latents=first, preview=False)
    images, _ = nodes["TMDDecode"]().decode(bundle, latent)
    with tmd_runtime.load(folder) as pipeline:
        expected = pipeline(PROMPT, seed=7, frames=5, size=(48, 32), image=picture).frames
    assert np.array_equal((255 * images).round().numpy().astype(np.uint8), expected)


def test_the_button_stops_a_run_and_the_next_one_works(pack: ModuleType, host: Host) -> None:
    nodes = pack.NODE_CLASS_MAPPINGS
    bundle, _ = nodes["TMDLoadBundle"]().load("builtin:tiny")
    (positive,) = nodes["TMDEncodePrompt"]().encode(bundle, PROMPT)
    host.interrupt_after = 1
    with pytest.raises(Interrupted):
        nodes["TMDSampler"]().sample(bundle, positive, 1, frames=5, preview=False)
    assert host.updates == [(1, 4)], "after the step at which it was pressed"
    (latent,) = nodes["TMDSampler"]().sample(bundle, positive, 1, frames=5, preview=False)
    host.interrupt_after = len(host.updates) + 1
    with pytest.raises(Interrupted):
        nodes["TMDDecode"]().decode(bundle, latent)


def test_workflows_name_bundles_and_no_paths(pack: ModuleType, host: Host, tmp_path: Path) -> None:
    nodes = pack.NODE_CLASS_MAPPINGS
    choice = nodes["TMDLoadBundle"].INPUT_TYPES()["required"]["bundle"][0]
    assert choice == ["builtin:tim-tiny", "builtin:tiny"]
    shutil.copytree(BUILT_IN, tmp_path / "models" / "tmd" / "mine")
    assert nodes["TMDLoadBundle"].INPUT_TYPES()["required"]["bundle"][0][-1] == "mine"
    before = nodes["TMDLoadBundle"].IS_CHANGED("mine")
    (tmp_path / "models" / "tmd" / "mine" / "manifest.json").touch()
    assert nodes["TMDLoadBundle"].IS_CHANGED("mine") != before, "exported again, loaded again"
    assert nodes["TMDLoadBundle"]().load("mine")[1] == 8
    with pytest.raises(KeyError):
        nodes["TMDLoadBundle"]().load(str(BUILT_IN))


def test_what_a_model_cannot_do_is_said_in_the_runtimes_words(pack: ModuleType) -> None:
    with pytest.raises(UsageFailure, match="this model does not do 9 steps: choose 1, 2, 3 or 4"):
        run_workflow(pack.NODE_CLASS_MAPPINGS, workflow("text_to_video", steps=9), {})
    bundle, _ = pack.NODE_CLASS_MAPPINGS["TMDLoadBundle"]().load("builtin:tiny")
    (one,) = pack.NODE_CLASS_MAPPINGS["TMDEncodePrompt"]().encode(bundle, PROMPT)
    with pytest.raises(ValueError, match="positive holds 2 prompts"):
        pack.NODE_CLASS_MAPPINGS["TMDSampler"]().sample(bundle, one + one, 1)
