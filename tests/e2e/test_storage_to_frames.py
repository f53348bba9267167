"""A transformer in GGUF and a text encoder in scaled fp8, through tmd-export and tmd-run to frames.

The trained tiny model. The same weights as plain bfloat16 give the same bundle, byte by byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from tests.helpers import storage_files as stored
from tmd_engines import Bundle
from tmd_export import graph_export
from tmd_export.checkpoints.names import converted
from tmd_export.cli import command as tmd_export
from tmd_export.graphs.graph import Graph
from tmd_export.graphs.trace import trace
from tmd_export.sources.source import built_in_folder
from tmd_export.weights.weights import Weights
from tmd_ref.umt5 import UMT5_CONFIGS
from tmd_runtime.command.cli import command as tmd_run
from tmd_runtime.files.tensor_files import load_latents


@pytest.fixture(autouse=True)
def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two exports, the second takes the graphs of the first; their weights are its own."""
    traced: dict[str, onnx_ir.Model] = {}

    def once(graph: Graph, weights: Weights) -> onnx_ir.Model:
        if graph.name not in traced:
            traced[graph.name] = trace(graph, weights)
        return traced[graph.name].clone()

    monkeypatch.setattr(graph_export, "trace", once)


def export(out: Path, *arguments: Any) -> Bundle:
    """`arguments`: checkpoints and options."""
    words = [word for one in arguments for word in (("--checkpoint", one) if isinstance(one, Path) else (one,))]
    called(tmd_export, "--model", "tiny", *words, "--preset", "wan", "--no-verify", "--out", out)
    return Bundle.open(out)


def called(command: Any, *arguments: Any) -> Result:
    done = CliRunner().invoke(command, [str(word) for word in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def generated(bundle: Bundle, out: Path) -> np.ndarray:
    """Latents of a prompt, whose video is written to `out`."""
    latents = out.with_suffix(".safetensors")
    wishes = ("--prompt", "a red circle", "--seed", 1, "--steps", 4, "--frames", 5, "--threads", 1, "--quiet")
    engine = ("--engine", "onnxruntime")
    called(tmd_run, "--bundle", bundle.folder, *wishes, *engine, "--save-latents", latents, "--out", out)
    return load_latents(latents, bundle.manifest).latents


def test_gguf_and_scaled_fp8_give_the_frames_of_the_weights_that_they_mean(tmp_path: Path) -> None:
    built_in = built_in_folder()
    teacher = {name: weight.float() for name, weight in load_file(built_in / "teacher.safetensors").items()}
    text = {
        converted("text_encoder", name): weight.float()
        for name, weight in load_file(built_in / "umt5.safetensors").items()
    }
    words = UMT5_CONFIGS["tiny"].vocab_size  # the built-in one has fewer than a model of this name may have
    table = text["shared.weight"]
    text["shared.weight"] = torch.nn.functional.pad(table, (0, 0, 0, words - len(table)))
    tokenizer = (built_in / "tokenizer.model").read_bytes()
    gguf, fp8 = tmp_path / "wan-Q8_0.gguf", tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    meant = stored.write_gguf(gguf, teacher, "Q8_0")
    text_meant = stored.write_scaled_fp8(fp8, text)
    carried = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    rest = load_file(fp8)
    save_file({**rest, "spiece_model": carried}, fp8)
    bundle = export(tmp_path / "bundle", gguf, fp8, built_in / "vae.safetensors")
    assert "stored as GGUF Q8_0 (" in bundle.manifest.provenance["source"]
    assert "stored as scaled fp8 (" in bundle.manifest.provenance["source"]
    assert (bundle.folder / "tokenizer.model").read_bytes() == tokenizer

    save_file({**teacher, **meant}, tmp_path / "wan.safetensors")
    save_file({**{name: rest[name] for name in text}, **text_meant}, tmp_path / "text.safetensors")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer)
    files = (tmp_path / "wan.safetensors", tmp_path / "text.safetensors", tmp_path / "tokenizer.model")
    plain = export(tmp_path / "plain", *files, "--parts", "text_encoder,backbone,flow_head")
    ours, theirs = ({path.name: path.read_bytes() for path in one.folder.iterdir()} for one in (bundle, plain))
    assert sum(len(data) for data in theirs.values()) > 1 << 20
    assert {name for name in theirs if ours[name] != theirs[name]} == {"manifest.json"}

    latents = generated(bundle, tmp_path / "video.mp4")
    assert 0.1 < latents.std() < 10 and (tmp_path / "video.mp4").stat().st_size > 500
