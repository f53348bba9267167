"""Damaged and hostile files: each is refused in one sentence, and none runs anything."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small

State = dict[str, Any]


@pytest.fixture
def transformer() -> State:
    return made.models().state("transformer")


class Program:
    """What a hostile pickle looks like: unpickling it runs a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("place", ["beside the weights", "instead of a weight", "as the whole file"])
@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.ckpt", "model.bin"])
def test_a_pickle_that_would_run_a_program_runs_nothing(
    place: str, name: str, transformer: State, tmp_path: Path
) -> None:
    program = Program(tmp_path / "ran")
    content = {
        "beside the weights": {"generator": transformer, "config": program},
        "instead of a weight": {**transformer, "head.modulation": program},
        "as the whole file": program,
    }[place]
    path = saved(tmp_path / name, content)
    said = refusal(lambda: small(path))
    assert not program.trace.exists()
    assert "could run a program hidden in it: refused" in said and "system'" in said
    torch.load(path, weights_only=False)
    assert program.trace.exists()  # a working one


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"step": 3}, "'step' is of type int"),
        ({"config": {"dim": 48}}, "'config' is of type dict"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is a tensor of a special kind"),
        ({3: torch.ones(2)}, "the name 3 is no text"),
        ({"w": None}, "'w' is of type NoneType"),
    ],
)
def test_a_file_with_anything_but_tensors_is_refused(
    extra: State, said: str, transformer: State, tmp_path: Path
) -> None:
    for state in ({**transformer, **extra}, {"model": {**transformer, **extra}}):
        found = refusal(partial(small, saved(tmp_path / "model.pt", state)))
        assert said in found and "holds more than tensors" in found
    contents: tuple[Any, ...] = (transformer["head.modulation"], {}, [1])
    for content in contents:
        assert "holds no tensors by name" in refusal(partial(small, saved(tmp_path / "model.pt", content)))


def test_a_dictionary_that_contains_itself_ends(transformer: State, tmp_path: Path) -> None:
    ring: State = {}
    ring["model"] = ring
    assert "holds more than tensors" in refusal(lambda: small(saved(tmp_path / "model.pt", ring)))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("cut", [0, 7, 1000, -1])
def test_a_truncated_file_is_one_sentence(name: str, cut: int, transformer: State, tmp_path: Path) -> None:
    path = saved(tmp_path / name, transformer)
    path.write_bytes(path.read_bytes()[:cut])
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
    assert f"{path} is not a complete {kind} file" in refusal(lambda: small(path))


def test_formats_that_cannot_be_mapped_are_refused(transformer: State, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(transformer, path, _use_new_zipfile_serialization=False)
    assert "before 1.6 must be saved again" in refusal(lambda: small(path))
    saved(path, transformer)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    assert "is compressed or too large" in refusal(lambda: small(tmp_path / "z.pth"))
    (tmp_path / "model.txt").touch()
    assert "is no file of weights" in refusal(lambda: small(tmp_path / "model.txt"))


def test_a_number_type_that_nobody_knows_is_named(transformer: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors", transformer)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"'))
    assert "numbers of a type that is unknown here (`F99`)" in refusal(lambda: small(path))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return made.write_original(tmp_path / "Wan2.1-T2V-14B", shards=3)


def rewrite(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = change(document["weight_map"]) or document["weight_map"]
    index.write_text(json.dumps(document))


def test_a_missing_shard_or_index_is_named(sharded: Path) -> None:
    second = sharded / "diffusion_pytorch_model-00002-of-00003.safetensors"
    kept = second.read_bytes()
    second.unlink()
    assert f"lacks {second.name} (1 of 3 shards" in refusal(lambda: small(sharded))
    second.write_bytes(kept)
    small(sharded)
    (sharded / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "but not diffusion_pytorch_model.safetensors.index.json" in refusal(lambda: small(sharded))


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..\\out.safetensors", "x.pth", ".safetensors",
             "a\n.safetensors", ""],
)  # fmt: skip
def test_an_index_leads_nowhere_but_beside_itself(name: str, sharded: Path) -> None:
    (sharded.parent / "out.safetensors").write_bytes(
        (sharded / "diffusion_pytorch_model-00001-of-00003.safetensors").read_bytes()
    )
    rewrite(sharded, lambda weight_map: {**weight_map, "head.modulation": name})
    assert "a checkpoint must not lead elsewhere" in refusal(lambda: small(sharded))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is a list in JSON"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        (" " * ((16 << 20) + 1), "larger than 16 MiB"),
    ],
)
def test_a_broken_index_is_one_sentence(text: str, said: str, sharded: Path) -> None:
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    assert said in refusal(lambda: small(sharded))


def test_an_index_and_shards_that_do_not_belong_together_are_refused(sharded: Path) -> None:
    first = "diffusion_pytorch_model-00001-of-00003.safetensors"
    rewrite(sharded, lambda weight_map: dict.fromkeys(weight_map, first) | {"x": weight_map["head.modulation"]})
    assert "and it is not there (and " in refusal(lambda: small(sharded))
    rewrite(sharded, lambda weight_map: dict.fromkeys(weight_map, first))
    shutil.copy(sharded / first, sharded / "copy.safetensors")
    rewrite(sharded, lambda weight_map: {**weight_map, "head.modulation": "copy.safetensors"})
    assert "the shards do not belong together" in refusal(lambda: small(sharded))


def test_a_folder_with_nothing_known_says_what_belongs_there(tmp_path: Path, transformer: State) -> None:
    saved(tmp_path / "distilled.safetensors", transformer)
    said = refusal(lambda: small(tmp_path))
    assert "has no student.safetensors" in said and "official Wan folder" in said
    assert "To use distilled.safetensors, give that file itself" in said


def test_a_file_under_the_name_of_another_says_what_it_is(transformer: State, tmp_path: Path) -> None:
    safetensors = saved(tmp_path / "right.safetensors", transformer).read_bytes()
    pickled = saved(tmp_path / "right.pth", transformer).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070424\n"
    for name, content, said in (
        ("model.safetensors", b"GGUF\x03\x00\x00\x00", "is a GGUF file by its content"),
        ("model.pth", b"GGUF\x03\x00\x00\x00", "give it the ending .gguf"),
        ("model.safetensors", pickled, "is a PyTorch file by its content, and its name says otherwise"),
        ("model.pth", safetensors, "give it the ending .safetensors"),
        ("model.gguf", safetensors, "is a safetensors file by its content"),
        ("model.safetensors", pointer, "is a git-lfs pointer: it says where the weights are"),
        ("model.gguf", pointer, "Run git lfs pull in that folder"),
        ("model.pth", b"\n<!DOCTYPE html><html>", "is a web page and no file of weights"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert said in refusal(partial(small, path))


@pytest.mark.parametrize(
    "beside",
    [
        {"epoch": 3, "global_step": 12_000, "name": "rcm", "lr": 1e-5, "best": None},
        {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}},
        {"ema_decay": 0.99, "state_dict_of_the_critic": {"w": torch.ones(2)}},
    ],
)
@pytest.mark.parametrize("wrapper", ["state_dict", "ema_state_dict"])
def test_numbers_and_text_beside_the_dictionary_of_weights_do_not_matter(
    wrapper: str, beside: State, transformer: State, tmp_path: Path
) -> None:
    source = small(saved(tmp_path / "model.pt", {wrapper: transformer, **beside}))
    assert torch.equal(source.tensor("student", "backbone.text_embedding.0.bias"), transformer["text_embedding.0.bias"])
    assert source.notes == (f"of {tmp_path / 'model.pt'}, the weights under {wrapper!r} are taken.",)


def test_averaged_weights_come_before_the_others(transformer: State, tmp_path: Path) -> None:
    other = {name: weight + 1 for name, weight in transformer.items()}
    source = small(saved(tmp_path / "model.pt", {"state_dict": other, "ema_state_dict": transformer, "epoch": 3}))
    assert torch.equal(source.tensor("student", "backbone.text_embedding.0.bias"), transformer["text_embedding.0.bias"])
