"""A bundle appears under its name complete, or not at all, and nothing else is ever lost for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle_tools import Edit
from tests.helpers.synthetic import backbone, manifest_without_files, write_graph
from tmd_engines import Bundle, BundleError, BundleWriter, unfinished

ROOT = Path(__file__).parents[3]


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
        if str(source).endswith(unfinished.SUFFIX):
            raise PermissionError(13, "no")
        rename(source, target)

    monkeypatch.setattr("os.rename", failing)
    monkeypatch.setattr(unfinished, "exchange", lambda *_: False)
    with pytest.raises(BundleError, match="put in place"), BundleWriter(synthetic_bundle, overwrite=True) as writer:
        writer.commit(fill(writer))
    assert len(Bundle.open(synthetic_bundle).manifest.graphs) == 6
    assert list(synthetic_bundle.parent.iterdir()) == [synthetic_bundle]


KILLED = """
import os, shutil, sys
from pathlib import Path
from tests.unit.engines.test_bundle_writer import fill
from tmd_engines import BundleWriter, unfinished

folder, way, at, moment = Path(sys.argv[1]), sys.argv[2], -1, 0

def watched(call):
    def calling(*arguments, **options):
        pass_moment()
        found = call(*arguments, **options)
        pass_moment()
        return found
    return calling

def pass_moment():
    global moment
    moment += 1
    if moment == at:
        os.kill(os.getpid(), 9)

unfinished.exchange = watched(unfinished.exchange) if way == "exchange" else lambda *_: False
for module, name in ((os, "rename"), (os, "mkdir"), (os, "rmdir"), (shutil, "rmtree")):
    setattr(module, name, watched(getattr(module, name)))
killed = True
while killed:
    at += 1
    child = os.fork()
    if child == 0:
        with BundleWriter(folder / str(at) / "bundle", overwrite=True) as writer:
            writer.commit(fill(writer))
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == 9 or at == 0
"""


@pytest.mark.parametrize("way", ["exchange", "aside"])
def test_kill_9_at_any_moment_leaves_the_old_or_the_new_bundle(synthetic_bundle: Path, way: str) -> None:
    """Just before and just after each call that changes a folder; the next writer sweeps, and finds a whole bundle."""
    parent = synthetic_bundle.parent
    if way == "exchange" and not can_exchange(parent):
        pytest.skip("this file system cannot exchange names")
    for at in range(30):
        shutil.copytree(synthetic_bundle, parent / str(at) / "bundle")
    subprocess.run([sys.executable, "-c", KILLED, str(parent), way], cwd=ROOT, check=True)
    graphs = []
    for at in range(30):
        target = parent / str(at) / "bundle"
        if way == "aside":
            BundleWriter(target, overwrite=True).__enter__().__exit__(None, None, None)
        graphs.append(len(Bundle.open(target).manifest.graphs))
        unfinished.sweep(target.parent)
        assert [path.name for path in target.parent.iterdir()] == ["bundle"]
    changed = graphs.index(1, 1)  # the first was not killed
    assert changed > 3 and set(graphs[1:changed]) == {6} and graphs.count(1) > 5 and graphs[-1] == 6, graphs


def can_exchange(folder: Path) -> bool:
    for name in ("one", "other"):
        (folder / name).mkdir()
    able = unfinished.exchange(folder / "one", folder / "other")
    for name in ("one", "other"):
        (folder / name).rmdir()
    return able


def test_the_name_is_never_missing_where_names_can_be_exchanged(synthetic_bundle: Path) -> None:
    if not can_exchange(synthetic_bundle.parent):
        pytest.skip("this file system cannot exchange names")
    missing, over = [], threading.Event()

    def look() -> None:
        while not over.is_set():
            missing.extend([1] * (not (synthetic_bundle / "manifest.json").exists()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(8):
            with BundleWriter(synthetic_bundle, overwrite=True) as writer:
                writer.commit(fill(writer))
    finally:
        over.set()
        watcher.join()
    assert not missing


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
