"""How the bundle tests damage a bundle, and ask that it is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tmd_engines import Bundle, BundleError

Edit = Callable[[dict[str, Any]], None]


def edit_manifest(folder: Path, edit: Edit) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def reseal(folder: Path) -> None:
    """Makes sizes and hashes right again, as somebody who wants to harm would."""

    def edit(document: dict[str, Any]) -> None:
        for name in document["files"]:
            content = (folder / name).read_bytes()
            document["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit_manifest(folder, edit)


def edit_graph(folder: Path, edit: Callable[[onnx.ModelProto], object], name: str = "backbone") -> None:
    path = folder / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    reseal(folder)


def impossible_transpose(model: onnx.ModelProto) -> None:
    """A graph that opens, and that no engine loads: the same axis three times."""
    node = next(node for node in model.graph.node if node.op_type == "Transpose")
    node.attribute[0].ints[:] = [1, 1, 1]


def move_behind_links(folder: Path, blobs: Path) -> Path:
    """Moves the files of a bundle into `blobs`, under other names, and leaves relative links to them; returns it."""
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:064x}", folder))
    return folder


def refused(folder: Path) -> str:
    """The message with which the folder is refused; it is one line."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message
