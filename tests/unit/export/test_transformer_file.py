"""A Wan's transformer in one file: readable by others, with LoRAs merged and stored formats dequantised."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small
from tests.helpers.lora_files import random_lora, weights
from tmd_export import ExportError, RandomSource, open_source
from tmd_export.cli import command
from tmd_export.sources.loras import WithLoras
from tmd_export.transformer_file import names_of, write_transformer
from tmd_ref.distill.weights import load_teacher
from tmd_ref.wan import WAN_CONFIGS


@pytest.mark.parametrize("write", [made.write_original, made.write_diffusers])
def test_either_layout_becomes_the_authors_file(write, tmp_path):
    source = small(write(tmp_path / "Wan"))
    write_transformer(source, tmp_path / "t.safetensors")
    found, expected = load_file(tmp_path / "t.safetensors"), weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    teacher = load_teacher(tmp_path / "t.safetensors", made.WAN).state_dict()
    assert torch.equal(teacher["blocks.2.ffn.0.weight"], expected["blocks.2.ffn.0.weight"])


def test_the_header_fits_whatever_the_types_are(tmp_path):
    source = RandomSource("tiny", 0, fusion=None)
    for dtype, word in ((torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")):
        path = tmp_path / f"{word}.safetensors"
        write_transformer(source, path, dtype)
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {word}  # noqa: SIM118
    name, own = next(iter(names_of(source).items()))
    assert torch.equal(load_file(path)[name], source.tensor("student", own).bfloat16())


def test_loras_are_merged(tmp_path):
    lora = random_lora()
    file = saved(tmp_path / "lora.safetensors", lora.tensors())
    source = WithLoras(small(made.write_original(tmp_path / "Wan")), [(file, 0.5)])
    write_transformer(source, tmp_path / "t.safetensors")
    found, expected = load_file(tmp_path / "t.safetensors"), lora.merged(weights(), 0.5)
    assert all((found[name] - weight.float()).abs().max() < 1e-5 for name, weight in expected.items())
    assert not torch.equal(found["blocks.0.ffn.0.weight"], weights()["blocks.0.ffn.0.weight"])


def test_what_is_not_one_transformer_is_refused(tmp_path):
    done = CliRunner().invoke(command, ["--model", "tiny", "--transformer", str(tmp_path / "t.safetensors")])
    assert done.exit_code == 1 and "a TMD student is no Wan" in done.output and "distilled from" in done.output
    still = refusal(lambda: write_transformer(open_source("tim-tiny"), tmp_path / "t.safetensors"))
    assert "not one transformer of Wan" in still
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="cannot be written"):
        write_transformer(RandomSource("tiny", 0, fusion=None), tmp_path / "nowhere" / "t.safetensors")


def test_the_command_writes_it_in_the_place_of_a_bundle(tmp_path):
    path = tmp_path / "t.safetensors"
    given = ["--model", "tiny", "--random-weights", "0", "--preset", "wan", "--transformer", str(path)]
    done = CliRunner().invoke(command, given)
    assert done.exit_code == 0, done.output
    assert load_teacher(path, WAN_CONFIGS["tiny"]).config == WAN_CONFIGS["tiny"]
    done = CliRunner().invoke(command, [*given, "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 2 and "leave --out and --inspect out" in done.output


def test_a_file_that_is_there_is_replaced_only_on_request(tmp_path):
    """It may be the only copy of the checkpoint that is read."""
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"a checkpoint")
    given = ["--model", "tiny", "--random-weights", "0", "--preset", "wan", "--transformer", str(path), "--json"]
    done = CliRunner().invoke(command, given)
    assert done.exit_code == 1 and "--overwrite" in done.output and path.read_bytes() == b"a checkpoint"
    done = CliRunner().invoke(command, [*given, "--overwrite"])
    assert json.loads(done.stdout) == {"transformer": str(path), "bytes": path.stat().st_size} and load_file(path)


@pytest.mark.parametrize("option", ["--parts backbone", "--precision bf16", "--grid diffusers", "--no-verify"])
def test_an_option_that_would_do_nothing_is_refused(tmp_path, option):
    given = ["--model", "tiny", "--random-weights", "0", "--transformer", str(tmp_path / "t.safetensors")]
    done = CliRunner().invoke(command, [*given, *option.split()])
    assert done.exit_code == 2 and option.split()[0] in done.output and "is for a bundle" in done.output
    assert not list(tmp_path.iterdir())
