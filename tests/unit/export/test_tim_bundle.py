"""Transition Models as bundles: both graphs against the reference, and the runtime's loop against its sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.tim_models import CLASSES_16, PARTS, TEXT_16, network, run
from tmd_engines import Bundle
from tmd_export import ExportError, ExportResult, export_bundle, open_source
from tmd_export.sources.tim import RandomTiM, TiMFolder
from tmd_ref.tim import model as reference
from tmd_ref.tim.model import TiMConfig
from tmd_ref.tim.sampling import tim_sample
from tmd_ref.tim.split import uncut
from tmd_runtime import StepInfo
from tmd_runtime.errors import RuntimeFailure, UsageFailure
from tmd_runtime.pipeline import Pipeline
from tmd_runtime.sampling.schedule import tim_rope_tables


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[RandomTiM, ExportResult]:
    source = RandomTiM("small-text", 3, TEXT_16)
    return source, export_bundle(source, tmp_path_factory.mktemp("tim") / "text", PARTS)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[RandomTiM, ExportResult]:
    source = RandomTiM("small-classes", 3, CLASSES_16)
    return source, export_bundle(source, tmp_path_factory.mktemp("tim") / "classes", PARTS, precision="bf16")


def test_manifest_says_what_the_graphs_are(text: Any, classes: Any) -> None:
    manifest = text[1].bundle.manifest
    assert (manifest.model.family, manifest.model.rope, manifest.model.classes) == ("tim", "index", None)
    assert manifest.sampler.rule == "flow_map" and manifest.video.frames == 1
    assert [spec.name for spec in manifest.graphs["flow_head"].inputs] == [
        "x", "t", "r", "guidance", "context", "rope_cos", "rope_sin",
    ]  # fmt: skip
    assert manifest.graphs["backbone"].outputs[0].shape == (2, "batch", "text", 96)
    manifest = classes[1].bundle.manifest
    assert manifest.model.classes == 5 and manifest.model.patch_size == (1, 2, 2)
    assert manifest.graphs["backbone"].inputs[0].dtype == "int64"
    assert all(graph.accuracy and graph.accuracy.cosine > 0.9999 for graph in classes[1].graphs)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_guided_transition_of_both_graphs_is_the_reference(text: Any, engine: str) -> None:
    pytest.importorskip(engine)
    source, exported = text
    model, config = network(source), source.config
    x, y = torch.randn(1, 16, 1, 2, 5).expand(2, -1, -1, -1, -1).contiguous(), torch.randn(2, 7, 20)
    dims = {"batch": 2, "text": 7, "height": 2, "width": 5, "tokens": 10}
    for t, r in ((1.0, 0.0), (0.7, 0.7), (0.4, 0.1)):
        at, to = torch.full((2,), t), torch.full((2,), r)
        f, null = model(x.squeeze(2), at, to, y)
        expected = x[0, :, 0] - (t - r) * (null + 3 * (f - null))
        context = torch.from_numpy(run(exported.bundle, "backbone", {"prompt_embeds": y}, dims, engine))
        cos, sin = reference.rope_tables(2, 5, config.head_dim)
        given = {"x": x, "t": at, "r": to, "guidance": torch.tensor([[3.0, -2.0], [3.0, -2.0]]), "context": context}
        found = run(exported.bundle, "flow_head", {**given, "rope_cos": cos, "rope_sin": sin}, dims, engine)
        np.testing.assert_allclose(found[0, :, 0], expected, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("rope", ["index", "grid"])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (5, 2)])
def test_rope_tables_are_those_of_the_reference(rope: str, grid: tuple[int, int]) -> None:
    for found, expected in zip(
        tim_rope_tables(*grid, 24, rope), reference.rope_tables(*grid, 24, rope=rope), strict=True
    ):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-7)
    for wrong in ((0, 2, 24), (1025, 1, 24), (2, 2, 26)):
        with pytest.raises(ValueError):
            tim_rope_tables(*wrong, rope)


@pytest.mark.parametrize(
    ("wishes", "interval"),
    [
        ({"steps": 1}, (0.0, 1.0)),
        ({"steps": 3, "guidance": 1.0}, (0.0, 1.0)),
        ({"steps": 4, "guidance": 2.0}, (0.0, 1.0)),
        ({"schedule": (1.0, 0.85, 0.3, 0.0), "guidance": 2.5}, (0.4, 1.5)),
        ({"steps": 4, "guidance": 2.0, "rho": 0.7}, (0.0, 1.0)),
    ],
)
def test_the_loop_follows_the_reference_sampler(
    text: Any, wishes: dict[str, Any], interval: tuple[float, float]
) -> None:
    source, exported = text
    manifest = exported.bundle.manifest
    assert manifest.sampler.guidance == 1
    sampler = manifest.sampler.model_copy(update={"guidance_interval": interval})
    bundle = Bundle(exported.bundle.folder, manifest.model_copy(update={"sampler": sampler}))
    y, null = torch.randn(1, 6, 20), torch.randn(1, 6, 20)
    steps: list[Any] = []

    def heard(info: StepInfo) -> bool:
        steps.append(info)
        return True

    with Pipeline(bundle, "onnxruntime") as pipeline:
        size: dict[str, Any] = {"seed": 5, "size": (5 * 8, 3 * 8), "callback": heard}
        found = pipeline.denoise(y.numpy(), **size, negative_embeds=null.numpy(), **wishes)
        settings = pipeline.settings(**wishes)
    generator = torch.Generator().manual_seed(5)
    noise, rho = torch.randn(1, 16, 3, 5, generator=generator), wishes.get("rho", 0.0)
    expected = tim_sample(
        network(source), noise, y, settings.times, null, settings.guidance, interval, rho=rho, generator=generator
    )
    assert found.shape == (1, 16, 1, 3, 5) and expected.std() > 0.1
    np.testing.assert_allclose(found[:, :, 0], expected, rtol=0, atol=5e-5)
    heads = [info for info in steps if info.stage == "flow_head"]
    assert len(heads) == len(settings.times) - 1 == settings.steps
    assert settings.nfe == {1: 1, 3: 5 if len(wishes) and "schedule" in wishes else 3, 4: 7}[settings.steps]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"steps": 0}, "choose 1 to 1000"),
        ({"schedule": (1.0, 0.5)}, "must fall from 1"),
        ({"schedule": ()}, "must fall from 1"),
        ({"schedule": (1.0,)}, "must fall from 1"),
        ({"schedule": (0.9, 0.0)}, "must fall from 1"),
        ({"schedule": (1.0, 0.5, 0.5, 0.0)}, "must fall from 1"),
        ({"schedule": (1.0, 0.0), "steps": 1}, "leave the steps out"),
        ({"inner_steps": 2}, "no inner steps"),
        ({"shift": 3.0}, "no shift"),
        ({"frames": 5}, "makes stills"),
        ({"guidance": -1.0}, "out of range"),
        ({"rho": -0.1}, "a rho of -0.1 is out of range"),
        ({"guidance": 1.0, "negative_prompt": "x"}, "needs guidance"),
    ],
)
def test_wishes_that_cannot_be_are_refused(text: Any, wishes: dict[str, Any], message: str) -> None:
    with Pipeline(text[1].bundle) as pipeline, pytest.raises(UsageFailure, match=message):
        pipeline.settings(**wishes)


def test_guidance_without_a_step_that_takes_it_is_said(text: Any, classes: Any) -> None:
    pipeline = Pipeline(text[1].bundle)
    silent, said = pipeline.settings(steps=1, size=(32, 32)), pipeline.settings(steps=1, guidance=3.0)
    assert (silent.guidance, silent.nfe) == (1, 1) and not any("guidance" in line for line in silent.warnings)
    assert said.guidance == 1 and any("no step begins at a time between 0 and 1" in line for line in said.warnings)
    with pytest.raises(RuntimeFailure, match="numbered classes"):
        Pipeline(classes[1].bundle).settings()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    tensors = {name: weight.bfloat16() for name, weight in network(RandomTiM("x", 0, TEXT_16)).state_dict().items()}
    torch.save({**tensors, "projector.0.weight": torch.zeros(2, 2)}, tmp_path / "t2i_model.bin")
    tensors = {name: weight.half() for name, weight in network(RandomTiM("x", 0, CLASSES_16)).state_dict().items()}
    save_file(tensors, tmp_path / "c2i_model_256.safetensors")
    return tmp_path


@pytest.mark.parametrize(("model", "config"), [("tim-t2i", TEXT_16), ("tim-c2i-256", CLASSES_16)])
def test_released_files_are_a_source(released: Path, model: str, config: TiMConfig) -> None:
    source = TiMFolder(released, model, config)
    source.check(PARTS)
    weights = dict(network(RandomTiM("x", 0, config)).named_parameters())
    dtype = torch.bfloat16 if config is TEXT_16 else torch.float16
    for name, _ in source.module("student").named_parameters():
        assert torch.equal(source.tensor("student", name), weights[uncut(name)].to(dtype))
    assert source.default_parts == PARTS and list(source.sha256(PARTS)) == [source._file.name]
    with pytest.raises(ExportError, match="gives no decoder_first"):
        source.check(("decoder_first",))
    for said, wrong in (("t2i_model.bin does not hold", "tim-t2i"), ("has no c2i_model_512", "tim-c2i-512")):
        with pytest.raises(ExportError, match=said):
            open_source(wrong, released)


def test_sources_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for arguments, said in (
        (("tim-t2i",), "no built-in weights"),
        (("tim-tiny", tmp_path, 1), "either"),
        (("tim-tiny", tmp_path), "has no tim.safetensors"),
        (("tim-tiny", None, 0, "decoder.pth"), "tim-tiny has a decoder of its own"),
        (("tim-t2i", None, 0, "decoder.pth"), "has no config.json: --decoder takes the folder of an autoencoder"),
    ):
        with pytest.raises(ExportError, match=said):
            open_source(*arguments)
