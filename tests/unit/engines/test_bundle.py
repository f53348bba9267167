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


NAMES = ["manifest.json", "backbone.onnx", "backbone.onnx.data", "tokenizer.model"]


@pytest.mark.parametrize("name", NAMES)
def test_links_are_followed(synthetic_bundle: Path, tmp_path: Path, name: str) -> None:
    """As in the cache of Hugging Face's hub: what is promised is the content."""
    (tmp_path / "blobs").mkdir()
    (synthetic_bundle / name).rename(tmp_path / "blobs" / "same-content")
    os.symlink("blobs/same-content", tmp_path / "first")
    os.symlink("../first", synthetic_bundle / name)
    Bundle.open(synthetic_bundle)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_link_to_other_content_is_refused(synthetic_bundle: Path, tmp_path: Path, name: str) -> None:
    content = bytearray((synthetic_bundle / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "other").write_bytes(content)
    (synthetic_bundle / name).unlink()
    os.symlink(tmp_path / "other", synthetic_bundle / name)
    assert "another sha256" in refused(synthetic_bundle)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["dangling", "folder", "pipe", "device", "loop", "itself"])
def test_links_to_anything_else_are_refused(
    synthetic_bundle: Path, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, path = tmp_path / "target", synthetic_bundle / name
    path.unlink()
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "device":
        target = Path("/dev/zero")
    elif kind == "loop":
        os.symlink(path, target)
    os.symlink(path.name if kind == "itself" else target, path)
    opened = os.open
    monkeypatch.setattr(os, "open", lambda name, *more: opened(name, *more) if str(name) != str(path) else 1 / 0)
    said = {
        "dangling": "is a link to a file that is not there",
        "loop": "cannot be opened: too many levels of symbolic links",
        "itself": "cannot be opened: too many levels of symbolic links",
    }
    assert f"{name} {said.get(kind, 'is a link to something that is not a regular file')}" in refused(synthetic_bundle)


def test_what_stands_alone_may_not_be_a_link(tmp_path: Path) -> None:
    """Entries of a cache and plans, which no manifest of a bundle holds to a sha256."""
    (tmp_path / "content").write_bytes(b"x")
    os.symlink("content", tmp_path / "link")
    with pytest.raises(BundleError, match="link is a symbolic link"):
        open_regular(tmp_path, "link")


def test_link_exchanged_after_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is opened without following links, if the first look saw a plain file."""
    (tmp_path / "content").write_bytes(b"x")
    os.symlink("content", tmp_path / "link")
    plain = os.lstat(tmp_path / "content")
    monkeypatch.setattr(Path, "lstat", lambda self: plain)
    for follow in (False, True):
        with pytest.raises(BundleError, match="link cannot be opened"):
            open_regular(tmp_path, "link", follow)


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
