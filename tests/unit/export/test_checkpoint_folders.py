"""A folder is used whole or refused: experts, parts that are named and absent, links to nothing, what lies beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small
from tmd_export import FolderSource, open_source
from tmd_export.checkpoints.experts import experts_of
from tmd_export.cli import command
from tmd_export.parts import MODEL_OF, VIDEO_PARTS
from tmd_export.sources.source import built_in_folder
from tmd_export.sources.wan import WanSource

ONE_EXPERT = "one of the two experts of Wan2.2-A14B"


@pytest.fixture(scope="module")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "diffusers": made.write_diffusers(root / "Wan2.1-T2V-Diffusers"),
        "original": made.write_original(root / "Wan2.1-T2V"),
    }


@pytest.fixture
def diffusers(_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A complete folder in diffusers' layout, free to be damaged."""
    return Path(shutil.copytree(_folders["diffusers"], tmp_path / "Wan2.1-T2V-Diffusers"))


@pytest.fixture
def official(_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A complete official folder, free to be damaged."""
    return Path(shutil.copytree(_folders["original"], tmp_path / "Wan2.1-T2V"))


def edit_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# Experts


def as_two_transformers(folder: Path) -> Path:
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    edit_index(folder, transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875)
    return folder


def test_one_expert_of_an_a14b_in_the_layout_of_diffusers_is_refused(diffusers: Path) -> None:
    as_two_transformers(diffusers)
    index = next((diffusers / "transformer").glob("*.index.json"))
    for one in (diffusers / "transformer", diffusers / "transformer_2", index):
        assert ONE_EXPERT in refusal(lambda one=one: small(one))  # type: ignore[misc]
    shutil.rmtree(diffusers / "transformer")
    assert "'transformer_2'" in refusal(lambda: small(diffusers))
    (diffusers / "model_index.json").unlink()
    assert ONE_EXPERT in refusal(lambda: small(diffusers))


def test_an_index_of_an_a14b_is_refused_without_its_second_transformer(diffusers: Path) -> None:
    """An interrupted download: the folder has one transformer, and only the index tells of the other."""
    edit_index(diffusers, boundary_ratio=0.875)
    assert experts_of([diffusers]) is None and "complete the download" in refusal(lambda: small(diffusers))


@pytest.mark.parametrize("which", ["high", "low"])
def test_one_expert_of_an_a14b_in_its_own_layout_is_refused(which: str, official: Path) -> None:
    expert = official / f"{which}_noise_model"
    expert.mkdir()
    for file in ("diffusion_pytorch_model.safetensors", "config.json"):
        shutil.move(official / file, expert)
    assert ONE_EXPERT in refusal(lambda: small(expert))
    assert experts_of([official]) is None and ONE_EXPERT in refusal(lambda: small(official))


@pytest.mark.parametrize(
    "name",
    [
        "wan2.2_t2v_high_noise_14B_fp16.safetensors",
        "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
        "Wan2.2-T2V-A14B-LowNoise.pth",
        "wan2.2_t2v_A14b_high_noise_lightx2v_4step.safetensors",
    ],
)
def test_a_file_that_is_called_an_expert_is_refused(name: str, tmp_path: Path) -> None:
    state = made.models().state("transformer")
    assert ONE_EXPERT in refusal(lambda: small(saved(tmp_path / name, state)))


def test_tensors_that_are_called_an_experts_are_refused(tmp_path: Path) -> None:
    state = {f"high_noise_model.{name}": weight for name, weight in made.models().state("transformer").items()}
    assert ONE_EXPERT in refusal(lambda: small(saved(tmp_path / "model.safetensors", state)))


@pytest.mark.parametrize("name", ["flow_noise.safetensors", "14b.safetensors", "highlights.safetensors"])
def test_names_that_only_look_alike_are_taken(name: str, tmp_path: Path) -> None:
    small(saved(tmp_path / name, made.models().state("transformer")))


def test_text_encoder_and_vae_of_an_a14b_can_be_used(official: Path, tmp_path: Path) -> None:
    """Both are Wan2.1's own; only a transformer is refused by the name of the model."""
    folder = official.rename(tmp_path / "Wan2.2-T2V-A14B")
    transformer = shutil.move(folder / "diffusion_pytorch_model.safetensors", tmp_path / "distilled.safetensors")
    assert small(Path(transformer), folder).default_parts == VIDEO_PARTS


# What an index names


MODEL_OF_FILE = {"transformer": "student", "text_encoder": "text_encoder", "vae": "vae"}


@pytest.mark.parametrize("part", MODEL_OF_FILE)
def test_a_model_that_is_named_and_absent_is_an_incomplete_download(part: str, diffusers: Path) -> None:
    shutil.rmtree(diffusers / part)
    source = small(diffusers)
    assert "incomplete" in refusal(lambda: source.check(source.default_parts))
    present = tuple(graph for graph in source.default_parts if MODEL_OF[graph] != MODEL_OF_FILE[part])
    source.check(present)


def test_a_model_that_is_named_and_absent_may_come_from_elsewhere(diffusers: Path, tmp_path: Path) -> None:
    shutil.rmtree(diffusers / "transformer")
    distilled = saved(tmp_path / "distilled.safetensors", made.models().state("transformer"))
    source = small(distilled, diffusers)
    source.check(VIDEO_PARTS)
    assert source.default_parts == VIDEO_PARTS


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("image_encoder", ["transformers", "CLIPVisionModel"], "an image-to-video model"),
        ("image_processor", ["transformers", "CLIPImageProcessor"], "an image-to-video model"),
        ("guardian", ["elsewhere", "Guardian"], "a part that is unknown here"),
    ],
)
def test_an_entry_that_would_be_left_out_is_refused(entry: str, value: Any, said: str, diffusers: Path) -> None:
    edit_index(diffusers, **{entry: value})
    message = refusal(lambda: small(diffusers))
    assert repr(entry) in message and said in message


@pytest.mark.parametrize("value", [[None, None], None, False])
def test_an_entry_that_stands_for_nothing_is_nothing(value: Any, diffusers: Path) -> None:
    edit_index(diffusers, transformer_2=value, image_encoder=value, expand_timesteps=value, boundary_ratio=value)
    small(diffusers).check(VIDEO_PARTS)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1, "a": 2}', " " * (2 << 20)])
def test_an_index_that_is_none_is_refused(content: str, diffusers: Path) -> None:
    (diffusers / "model_index.json").write_text(content)
    assert "model_index.json" in refusal(lambda: small(diffusers))


# Links and downloads that lead to nothing


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth",
     "google/umt5-xxl/spiece.model", "config.json"],
)  # fmt: skip
def test_a_link_to_nothing_is_an_interrupted_download(name: str, official: Path) -> None:
    (official / name).unlink()
    (official / name).symlink_to("../blobs/absent")
    message = refusal(lambda: small(official))
    assert name in message and "interrupted" in message


def test_a_link_to_nothing_in_a_folder_of_our_own_is_refused(tmp_path: Path) -> None:
    shutil.copytree(built_in_folder(), tmp_path / "run")
    (tmp_path / "run" / "vae.safetensors").unlink()
    (tmp_path / "run" / "vae.safetensors").symlink_to("gone")
    assert "interrupted" in refusal(lambda: FolderSource(tmp_path / "run", "tiny"))


def test_links_that_lead_somewhere_are_followed(official: Path, tmp_path: Path) -> None:
    """As a hub's cache stores a model: links from names to contents."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in official.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    small(official).check(VIDEO_PARTS)


def test_a_download_that_goes_on_is_refused(official: Path) -> None:
    (official / "Wan2.1_VAE.pth.incomplete").write_bytes(b"")
    assert "has not ended" in refusal(lambda: small(official))


# What lies beside


def beside_gguf(folder: Path) -> Path:
    (folder / "wan2.1-t2v-Q4_K_M.gguf").write_bytes(b"GGUF")
    return folder / "wan2.1-t2v-Q4_K_M.gguf"


def beside_index(folder: Path) -> Path:
    path = folder / "diffusion_pytorch_model.fp16.safetensors.index.json"
    path.write_text('{"weight_map": {}}')
    return path


def beside_folder(folder: Path) -> Path:
    (folder / "refiner").mkdir()
    return saved(folder / "refiner" / "model.safetensors", {"w": torch.zeros(1)})


@pytest.mark.parametrize("put", [beside_gguf, beside_index, beside_folder])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_weights_that_would_not_be_used_are_refused(
    put: Callable[[Path], Path], layout: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(layout)
    path = put(folder)
    message = refusal(lambda: small(folder))
    assert path.name in message and "not used" in message


def test_what_the_user_names_is_used(official: Path) -> None:
    """A file inside of the folder, given by itself, replaces the folder's own part."""
    distilled = official / "distilled"
    distilled.mkdir()
    own = saved(distilled / "student.safetensors", made.models().state("transformer"))
    small(own, official).check(VIDEO_PARTS)


def test_loose_files_of_weights_get_a_note(official: Path) -> None:
    save_file({"w": torch.zeros(1)}, official / "another.safetensors")
    assert any("not used" in note and "another.safetensors" in note for note in small(official).notes)
    assert not any("Wan2.1_VAE" in note for note in small(official).notes)


# The scheduler of a folder


def test_the_scheduler_of_the_folder_is_followed_and_said(diffusers: Path) -> None:
    import diffusers as library

    made.write_scheduler(diffusers, library.UniPCMultistepScheduler(**{**made.UNIPC, "flow_shift": 5.0}))
    source = small(diffusers)
    assert source.sampler is not None and (source.sampler["rule"], source.sampler["shift"]) == ("unipc", 5.0)
    assert source.sampler_note is not None and "UniPCMultistepScheduler, shift 5" in source.sampler_note
    made.write_scheduler(diffusers, library.FlowMatchEulerDiscreteScheduler(shift=8.0))
    source = small(diffusers)
    assert source.sampler is not None and (source.sampler["rule"], source.sampler["shift"]) == ("euler", 8.0)
    assert source.sampler["time_rounding"] == "none" and source.sampler["guidance"] == 5.0


def test_the_scheduler_is_not_that_of_a_transformer_from_elsewhere(diffusers: Path, tmp_path: Path) -> None:
    source = small(saved(tmp_path / "distilled.safetensors", made.models().state("transformer")), diffusers)
    assert source.sampler is None and source.sampler_note is None


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("LCMScheduler", {}, "'LCMScheduler'"),
        ("EulerDiscreteScheduler", {}, "'EulerDiscreteScheduler'"),
        ("UniPCMultistepScheduler", {**made.UNIPC, "solver_order": 3}, "solver_order to 3"),
        ("UniPCMultistepScheduler", {**made.UNIPC, "solver_type": "bh1"}, "solver_type to 'bh1'"),
        ("UniPCMultistepScheduler", {}, "prediction_type to 'epsilon'"),
        ("UniPCMultistepScheduler", {**made.UNIPC, "flow_shift": 0.5}, "flow_shift to 0.5"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting to True"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling to True"),
    ],
)
def test_a_scheduler_that_is_not_computed_here_is_refused(
    name: str, settings: dict[str, Any], said: str, diffusers: Path
) -> None:
    import diffusers as library

    made.write_scheduler(diffusers, getattr(library, name)(**settings))
    source = small(diffusers)
    message = refusal(lambda: source.sampler)
    assert said in message and "--preset" in message


# Without --model


def test_sizes_are_read_from_the_tensors(official: Path, diffusers: Path) -> None:
    for folder in (official, diffusers):
        source = WanSource([folder], vae=made.VAE, text=made.TEXT)
        assert source.wan.dim == made.WAN.dim and source.wan.num_heads == made.WAN.num_heads
        assert source.model == "wan-48x3" and source.head_blocks == 1
    source = WanSource([official], vae=made.VAE, text=made.TEXT)
    assert source.wan == made.WAN, "text_len stands in the original config.json only"
    source.check(("backbone", "flow_head"))


@pytest.mark.parametrize("model", ["wan1.3b", "wan14b", "wan2.2-ti2v-5b"])
def test_the_published_sizes_have_their_names(model: str, tmp_path: Path) -> None:
    from tmd_ref.wan import WAN_CONFIGS, WanTransformer

    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in WanTransformer(WAN_CONFIGS[model]).named_parameters()}
    path = made.write_hollow(tmp_path / "model.safetensors", shapes)
    source = open_source(None, path)
    assert source.model == model and source.default_parts == ("backbone", "flow_head")


def test_heads_that_nothing_tells_are_asked_for(official: Path) -> None:
    (official / "config.json").unlink()
    assert "number of attention heads" in refusal(lambda: WanSource([official]))


@pytest.mark.parametrize(("name", "value"), [("num_layers", 30), ("dim", 1536), ("ffn_dim", 1), ("num_heads", 5)])
def test_a_config_that_contradicts_its_tensors_is_refused(name: str, value: int, official: Path) -> None:
    config = made.original_config() | {name: value}
    (official / "config.json").write_text(json.dumps(config))
    assert name in refusal(lambda: small(official)) or name == "num_heads"
    assert "config.json" in refusal(lambda: WanSource([official]))


@pytest.mark.parametrize("content", ["[]", "{", " " * ((1 << 20) + 1)])
@pytest.mark.parametrize("name", ["config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_a_document_of_json_that_is_none_is_refused(name: str, content: str, official: Path) -> None:
    (official / "scheduler").mkdir()
    (official / name).write_text(content)
    said = {"[": "is a list in JSON", "{": "cannot be read as JSON", " ": "is larger than 1 MiB"}[content[0]]
    assert f"{name} {said}" in refusal(lambda: small(official).sampler)


def test_parts_alone_do_not_tell_a_model(official: Path) -> None:
    assert "--model" in refusal(lambda: open_source(None, official / "Wan2.1_VAE.pth"))


def test_folders_of_our_own_need_no_name() -> None:
    assert open_source(None, built_in_folder() / "student.safetensors").model == "tiny"
    assert open_source(None, built_in_folder() / "tim.safetensors").model == "tim-tiny"


# What --inspect tells


def test_inspect_tells_model_parts_and_sampling_and_writes_nothing(diffusers: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["--checkpoint", str(diffusers), "--inspect", "--json"])
    assert done.exit_code == 1, "a text encoder of small width does not fit UMT5-XXL"
    for name in ("text_encoder", "vae", "tokenizer"):
        shutil.rmtree(diffusers / name)
    (diffusers / "model_index.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(command, ["--checkpoint", str(diffusers), "--inspect", "--json"])
    found = json.loads(done.stdout)
    assert (found["model"], found["family"], found["num_heads"]) == ("wan-48x3", "wan", made.WAN.num_heads)
    assert found["parts"] == ["backbone", "flow_head"] and "decoder_first" in found["absent"]
    assert found["sampler"].startswith("unipc: 50 steps (of any number), shift 3") and len(found["notes"]) == 1
    shown = CliRunner().invoke(command, ["--checkpoint", str(diffusers), "--inspect", "--preset", "rcm"])
    assert "renoise" in shown.output and "wan-48x3" in shown.output and "note:" not in shown.output
    assert sorted(tmp_path.rglob("*")) == before


def test_without_out_and_inspect_nothing_is_done() -> None:
    done = CliRunner().invoke(command, ["--model", "tiny"])
    assert done.exit_code == 2 and "--out" in done.output and "--inspect" in done.output
