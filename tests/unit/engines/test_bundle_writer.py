"""A bundle appears under its name complete, or not at all, and nothing else is ever lost for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle_tools import Edit
from tests.helpers.synthetic import backbone, manifest_without_files, write_graph
from tmd_engines import Bundle, BundleError, BundleWriter


def fill(writer: BundleWriter) -> dict[str, Any]:
    (writer.folder / "tokenizer.model").write_bytes(b"any")
    return manifest_without_files({"backbone": write_graph(writer.folder, backbone())})


def test_bundle_appears_complete_under_its_name(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    with BundleWriter(target) as writer:
        manifest = fill(writer)
        assert not target.exists() and writer.folder.parent == target.parent
        bundle = writer.commit(manifest)
    assert bundle == Bundle.open(target)
    assert list(target.parent.iterdir()) == [target]
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {target.stat().st_mode & 0o666}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_writing_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "bundle") as writer:
        fill(writer)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        fill(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda manifest: manifest["model"].update(dim="32"), "model.dim"),
        (lambda manifest: manifest["sampler"].update(t_max=float("nan")), "JSON"),
        (lambda manifest: manifest["model"].update(name=object()), "JSON"),
        (
            lambda manifest: manifest["graphs"]["backbone"].update(file="other.onnx", data="other.onnx.data"),
            "not in files",
        ),
    ],
)
def test_invalid_bundle_is_never_put_in_place(tmp_path: Path, edit: Edit, said: str) -> None:
    with pytest.raises(BundleError, match=said), BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill(writer)
        edit(manifest)
        writer.commit(manifest)
    assert list(tmp_path.iterdir()) == []


def test_existing_bundle_is_kept_unless_overwriting(synthetic_bundle: Path) -> None:
    with pytest.raises(BundleError, match="exists already"), BundleWriter(synthetic_bundle):
        pytest.fail("the writer began")
    assert len(Bundle.open(synthetic_bundle).manifest.graphs) == 6

    with pytest.raises(RuntimeError), BundleWriter(synthetic_bundle, overwrite=True):
        raise RuntimeError
    assert len(Bundle.open(synthetic_bundle).manifest.graphs) == 6

    with BundleWriter(synthetic_bundle, overwrite=True) as writer:
        writer.commit(fill(writer))
    assert len(Bundle.open(synthetic_bundle).manifest.graphs) == 1
    assert list(synthetic_bundle.parent.iterdir()) == [synthetic_bundle]


def test_failed_exchange_keeps_the_old_bundle(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise PermissionError(13, "no")
        rename(source, target)

    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(BundleError, match="put in place"), BundleWriter(synthetic_bundle, overwrite=True) as writer:
        writer.commit(fill(writer))
    assert len(Bundle.open(synthetic_bundle).manifest.graphs) == 6
    assert list(synthetic_bundle.parent.iterdir()) == [synthetic_bundle]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with (
        pytest.raises(BundleError, match="neither empty nor a bundle"),
        BundleWriter(tmp_path / "home", overwrite=True),
    ):
        pytest.fail("the writer began")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="not a folder"), BundleWriter(tmp_path / "file", overwrite=True):
        pytest.fail("the writer began")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_a_link_in_the_written_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="symbolic link"), BundleWriter(tmp_path / "bundle") as writer:
        manifest = fill(writer)
        os.symlink("/etc/passwd", writer.folder / "extra")
        writer.commit(manifest)
