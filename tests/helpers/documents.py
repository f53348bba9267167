"""Manifests as plain documents, one of each family, to be changed and parsed."""

from __future__ import annotations

import copy
import json
from typing import Any

from tests.helpers import synthetic, synthetic_tim
from tmd_engines import Manifest
from tmd_engines.bundle.manifest import parse_manifest

SHA = "0" * 64


def _document(builder: synthetic.GraphBuilder, sampler: dict[str, Any] | None = None) -> dict[str, Any]:
    graph = {
        "file": "backbone.onnx",
        "data": "backbone.onnx.data",
        "opset": 23,
        "precision": "fp32",
        "inputs": builder.inputs,
        "outputs": builder.outputs,
        "accuracy": {"max_abs_error": 1e-6, "cosine": 1.0, "reference": "tmd_ref fp32"},
    }
    document = synthetic.manifest_without_files({"backbone": graph}, sampler)
    names = ("backbone.onnx", "backbone.onnx.data", "tokenizer.model")
    document["files"] = {name: {"size": 10, "sha256": SHA} for name in names}
    return copy.deepcopy(document)  # shapes are shared


def valid_document() -> dict[str, Any]:
    """Of family "tmd"."""
    return _document(synthetic.backbone())


def valid_wan_document() -> dict[str, Any]:
    """Of family "wan", with fixed times and an embedding table outside the graphs."""
    sampler = synthetic.velocity_sampler(
        rule="renoise", steps=2, allowed_steps=[1, 2, 3], times=[1.0, 0.757, 0.522], negative_prompt="static"
    )
    document = _document(synthetic.backbone(), sampler)
    document["text"]["embedding"] = {"file": "table.bin", "dtype": "bfloat16", "rows": 300, "dim": 8}
    document["files"]["table.bin"] = {"size": 300 * 8 * 2, "sha256": SHA}
    return document


def valid_anyflow_document() -> dict[str, Any]:
    """Of family "anyflow"."""
    return _document(synthetic.backbone(flow_map=True), synthetic.flow_map_sampler())


def valid_tim_document() -> dict[str, Any]:
    """Of family "tim": all blocks in the flow head, any number of steps."""
    document = _document(synthetic_tim.backbone(classes=False))
    document["model"] |= {"family": "tim", "rope": "index", "num_layers": 3, "head_blocks": 3}
    del document["model"]["fusion"]
    document["sampler"] = {"rule": "flow_map", "steps": 4, "guidance": 2.5, "guidance_interval": [0.0, 1.0]}
    return document


def valid_plain_document() -> dict[str, Any]:
    """Of family "tim", with prompts as they are and features of the empty one."""
    document = valid_tim_document()
    length, width = document["text"]["max_length"], document["text"]["dim"]
    document["text"] |= {"tokenization": "plain", "bos_id": 2, "eos_id": None}
    document["text"]["null_embeds"] = {"file": "null.bin", "dtype": "float32", "rows": length, "dim": width}
    document["text"]["embedding"] = {"file": "table.bin", "dtype": "bfloat16", "rows": 300, "dim": 8}
    document["files"] |= {
        "null.bin": {"size": 4 * length * width, "sha256": SHA},
        "table.bin": {"size": 2 * 300 * 8, "sha256": SHA},
    }
    return document


def parse(document: Any) -> Manifest:
    return parse_manifest(json.dumps(document).encode(), "manifest.json")


def put(document: Any, path: str, value: Any) -> None:
    """Sets the value at a path whose parts a slash divides; a part of digits is an index."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        document = document[part]
    document[last] = value
