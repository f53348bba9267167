"""A bundle is opened whole or not at all: one test per rule of folder, manifest and files, each a clear sentence."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle_tools import edit_manifest, refused
from tmd_engines import Bundle, BundleError, EngineError
from tmd_engines.bundle.files import open_regular, read_up_to

# --- the good case ---


def test_reading_stops_at_its_limit(tmp_path: Path) -> None:
    """Whatever a file claims to be, and however it grows meanwhile."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with open_regular(tmp_path, "file") as file:
        assert read_up_to(file, 10) == bytes(range(10))
        assert read_up_to(file, 1000) == bytes(range(10, 100))


def test_complete_bundle_opens(synthetic_bundle: Path) -> None:
    bundle = Bundle.open(synthetic_bundle)
    assert bundle.folder == synthetic_bundle.resolve()
    assert bundle.graph_path("backbone") == bundle.folder / "backbone.onnx"
    assert bundle.read_graph("backbone") == (synthetic_bundle / "backbone.onnx").read_bytes()
    assert set(bundle.manifest.files) == {path.name for path in synthetic_bundle.iterdir()} - {"manifest.json"}


def test_unlisted_files_are_ignored(synthetic_bundle: Path) -> None:
    (synthetic_bundle / "notes.txt").write_text("mine")
    os.symlink("/nowhere", synthetic_bundle / "dangling")
    Bundle.open(synthetic_bundle)


def test_hard_links_are_accepted(synthetic_bundle: Path, tmp_path: Path) -> None:
    """Package installers link files from their cache; the sha256 holds their content."""
    os.link(synthetic_bundle / "backbone.onnx", tmp_path / "cached")
    Bundle.open(synthetic_bundle)


def test_folder_itself_may_be_reached_through_a_link(synthetic_bundle: Path, tmp_path: Path) -> None:
    os.symlink(synthetic_bundle, tmp_path / "current")
    assert Bundle.open(tmp_path / "current").folder == synthetic_bundle.resolve()


def test_missing_graph_is_named_with_what_to_do(synthetic_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"no graph 'vae_encoder'.*--parts"):
        Bundle.open(synthetic_bundle).graph_path("vae_encoder")


# --- the folder and the manifest ---


def test_missing_folder(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")


def test_a_file_is_no_bundle(synthetic_bundle: Path) -> None:
    assert "is a file" in refused(synthetic_bundle / "manifest.json")


def test_impossible_path(tmp_path: Path) -> None:
    assert "cannot be opened" in refused(tmp_path / "nul\0byte")


def test_missing_manifest(synthetic_bundle: Path) -> None:
    (synthetic_bundle / "manifest.json").unlink()
    assert "manifest.json is missing" in refused(synthetic_bundle)


def test_linked_manifest(synthetic_bundle: Path, tmp_path: Path) -> None:
    (synthetic_bundle / "manifest.json").rename(tmp_path / "elsewhere.json")
    os.symlink(tmp_path / "elsewhere.json", synthetic_bundle / "manifest.json")
    assert "symbolic link" in refused(synthetic_bundle)


def test_manifest_of_100_megabytes_is_refused_unread(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(synthetic_bundle / "manifest.json", "ab") as file:
        file.truncate(100_000_000)
    monkeypatch.setattr("tmd_engines.bundle.reader.read_up_to", lambda *_: pytest.fail("the manifest was read"))
    assert "100.0 MB" in refused(synthetic_bundle)


def test_truncated_manifest(synthetic_bundle: Path) -> None:
    path = synthetic_bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:-100])
    assert "not valid JSON" in refused(synthetic_bundle)


def test_wrong_type_in_manifest(synthetic_bundle: Path) -> None:
    edit_manifest(synthetic_bundle, lambda document: document["sampler"].update(steps="2"))
    assert "sampler.steps" in refused(synthetic_bundle)


def test_unknown_schema_version(synthetic_bundle: Path) -> None:
    edit_manifest(synthetic_bundle, lambda document: document.update(schema_version=1))
    assert "schema_version 1" in refused(synthetic_bundle)


# --- the files ---


def rename_in_manifest(folder: Path, old: str, new: str) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["files"][new] = document["files"].pop(old)
        document["text"]["tokenizer"] = new

    edit_manifest(folder, edit)


def test_file_outside_by_dots(synthetic_bundle: Path) -> None:
    (synthetic_bundle / "tokenizer.model").rename(synthetic_bundle.parent / "tokenizer.model")
    rename_in_manifest(synthetic_bundle, "tokenizer.model", "../tokenizer.model")
    assert "plain name" in refused(synthetic_bundle)


def test_file_outside_by_absolute_path(synthetic_bundle: Path) -> None:
    rename_in_manifest(synthetic_bundle, "tokenizer.model", str(synthetic_bundle / "tokenizer.model"))
    assert "plain name" in refused(synthetic_bundle)


def test_file_in_a_subfolder(synthetic_bundle: Path) -> None:
    (synthetic_bundle / "text").mkdir()
    (synthetic_bundle / "tokenizer.model").rename(synthetic_bundle / "text" / "tokenizer.model")
    rename_in_manifest(synthetic_bundle, "tokenizer.model", "text/tokenizer.model")
    assert "plain name" in refused(synthetic_bundle)


@pytest.mark.parametrize("name", ["backbone.onnx", "backbone.onnx.data", "tokenizer.model"])
def test_symbolic_link(synthetic_bundle: Path, tmp_path: Path, name: str) -> None:
    (synthetic_bundle / name).rename(tmp_path / "same-content")
    os.symlink(tmp_path / "same-content", synthetic_bundle / name)
    assert f"{name} is a symbolic link" in refused(synthetic_bundle)


def test_link_exchanged_after_the_first_look(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened without following links, even if the first look saw a plain file."""
    target = synthetic_bundle / "tokenizer.model"
    target.rename(synthetic_bundle / "same-content")
    os.symlink("same-content", target)
    plain = os.lstat(synthetic_bundle / "backbone.onnx")
    monkeypatch.setattr(Path, "lstat", lambda self: plain)
    assert "tokenizer.model cannot be opened" in refused(synthetic_bundle)


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket"])
def test_other_kinds_of_file(synthetic_bundle: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = synthetic_bundle / "tokenizer.model"
    path.unlink()
    monkeypatch.chdir(synthetic_bundle)  # the address of a socket must be short
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        socket.socket(socket.AF_UNIX).bind(path.name)
    message = refused(synthetic_bundle)
    assert "not a regular file" in message or "cannot be opened" in message


@pytest.mark.parametrize("name", ["backbone.onnx", "backbone.onnx.data", "tokenizer.model"])
def test_missing_file(synthetic_bundle: Path, name: str) -> None:
    (synthetic_bundle / name).unlink()
    assert f"{name} is missing" in refused(synthetic_bundle)


@pytest.mark.parametrize("name", ["backbone.onnx", "backbone.onnx.data", "tokenizer.model"])
@pytest.mark.parametrize(("change", "cause"), [(-1, "incomplete"), (1, "changed or replaced")])
def test_wrong_size(synthetic_bundle: Path, name: str, change: int, cause: str) -> None:
    path = synthetic_bundle / name
    os.truncate(path, path.stat().st_size + change)
    message = refused(synthetic_bundle)
    assert name in message and cause in message


def test_sizes_are_checked_before_anything_is_hashed(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(synthetic_bundle / "tokenizer.model", 1)
    monkeypatch.setattr("tmd_engines.bundle.reader._check_content", lambda *_, **__: pytest.fail("a file was read"))
    assert "incomplete" in refused(synthetic_bundle)


@pytest.mark.parametrize("name", ["backbone.onnx", "backbone.onnx.data", "tokenizer.model"])
def test_wrong_hash(synthetic_bundle: Path, name: str) -> None:
    content = bytearray((synthetic_bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (synthetic_bundle / name).write_bytes(content)
    message = refused(synthetic_bundle)
    assert name in message and "sha256" in message


def test_nothing_is_parsed_before_every_hash_is_right(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray((synthetic_bundle / "tokenizer.model").read_bytes())
    content[0] ^= 1
    (synthetic_bundle / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr("tmd_engines.bundle.reader.parse_graph", lambda *_: pytest.fail("a graph was parsed"))
    assert "sha256" in refused(synthetic_bundle)


def test_graph_changed_after_opening_is_noticed(synthetic_bundle: Path) -> None:
    bundle = Bundle.open(synthetic_bundle)
    content = bytearray((synthetic_bundle / "backbone.onnx").read_bytes())
    content[20] ^= 1
    (synthetic_bundle / "backbone.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="sha256"):
        bundle.read_graph("backbone")
