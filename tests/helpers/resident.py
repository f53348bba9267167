"""Weights that are large enough to be looked for in the memory of a process, and what it holds of their file. Linux."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.bundle_tools import reseal
from tests.helpers.synthetic import TEXT_DIM

WIDTH = 32768
_FLOAT = np.dtype("float32")


def widen_backbone(folder: Path, dtype: np.dtype = _FLOAT) -> int:
    """Puts a layer of `WIDTH` channels, computed in `dtype`, before the synthetic backbone's text; returns the size of
    its data file."""
    path, data = folder / "backbone.onnx", folder / "backbone.onnx.data"
    model = onnx.load(path)
    rng = np.random.default_rng(1)
    weights = [
        numpy_helper.from_array(rng.normal(0, 1 / np.sqrt(rows), (rows, columns)).astype(dtype), name)
        for name, rows, columns in (("wide.up", TEXT_DIM, WIDTH), ("wide.down", WIDTH, TEXT_DIM))
    ]
    layers = [
        helper.make_node("Cast", ["prompt_embeds"], ["text.typed"], to=helper.np_dtype_to_tensor_dtype(dtype)),
        helper.make_node("MatMul", ["text.typed", "wide.up"], ["wide"]),
        helper.make_node("MatMul", ["wide", "wide.down"], ["wide.typed"]),
        helper.make_node("Cast", ["wide.typed"], ["narrow"], to=TensorProto.FLOAT),
    ]
    for node in model.graph.node:
        node.input[:] = ["narrow" if name == "prompt_embeds" else name for name in node.input]
    nodes = [*layers, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(weights)
    data.unlink()
    onnx.save(model, path, save_as_external_data=True, location=data.name)
    reseal(folder)
    return data.stat().st_size


def resident_file_bytes(name: str, process: int | str = "self") -> int:
    """What the process holds of its mappings of files with this name, which may be gone."""
    total, wanted = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text().split("\n"):
        if "-" in line.partition(" ")[0]:  # the first line of a mapping, which ends with its file
            wanted = line.removesuffix(" (deleted)").endswith(f"/{name}")
        elif wanted and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total
