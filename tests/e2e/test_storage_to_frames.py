"""A transformer in GGUF and a text encoder in scaled fp8, through tmd-export and tmd-run to frames.

Small widths and random weights. The same weights as plain bfloat16 give the same bundle, byte by byte.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from tests.helpers import storage_files as stored
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.synthetic import tokenizer_bytes
from tmd_engines import Bundle
from tmd_export import graph_export
from tmd_export.cli import command as tmd_export
from tmd_export.families import open as opening
from tmd_export.graphs.graph import Graph
from tmd_export.graphs.trace import trace
from tmd_export.sources.source import on_meta
from tmd_export.sources.wan import WanSource
from tmd_export.weights.weights import Weights
from tmd_ref.vae import WanVAE, WanVAEConfig
from tmd_ref.wan import WanTransformer
from tmd_runtime.command.cli import command as tmd_run
from tmd_runtime.files.tensor_files import load_latents

WAN = replace(stored.WIDE, text_dim=made.TEXT.dim)
VAE = WanVAEConfig(dim=4, dim_mult=(1, 1), num_res_blocks=0, temporal_downsample=(True,))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model wan1.3b` has small sizes, and the second export takes the graphs of the first, without their weights."""
    traced: dict[str, onnx_ir.Model] = {}

    def once(graph: Graph, weights: Weights) -> onnx_ir.Model:
        if graph.name not in traced:
            traced[graph.name] = trace(graph, weights)
        return traced[graph.name].clone()

    def open_source(model: str, paths: tuple[Path, ...], *_: Any) -> WanSource:
        return WanSource(paths, model, **{**made.SIZES, "wan": WAN, "vae": VAE})

    monkeypatch.setattr(opening, "open_source", open_source)
    monkeypatch.setattr(graph_export, "trace", once)


def export(out: Path, *arguments: Any) -> Bundle:
    """`arguments`: checkpoints and options."""
    words = [word for one in arguments for word in (("--checkpoint", one) if isinstance(one, Path) else (one,))]
    called(tmd_export, "--model", "wan1.3b", *words, "--preset", "rcm", "--no-verify", "--out", out)
    return Bundle.open(out)


def called(command: Any, *arguments: Any) -> Result:
    done = CliRunner().invoke(command, [str(word) for word in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def generated(bundle: Bundle, out: Path) -> np.ndarray:
    """Latents of a prompt, whose video is written to `out`."""
    latents = out.with_suffix(".safetensors")
    wishes = ("--prompt", "a red circle", "--seed", 1, "--frames", 3, "--size", "32x16", "--quiet")
    engine = ("--engine", "onnxruntime")
    called(tmd_run, "--bundle", bundle.folder, *wishes, *engine, "--save-latents", latents, "--out", out)
    return load_latents(latents, bundle.manifest).latents


@pytest.mark.slow
def test_gguf_and_scaled_fp8_give_the_frames_of_the_weights_that_they_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = {
        name: 0.06 * torch.randn(weight.shape) + (1 if "norm" in name and name.endswith("weight") else 0)
        for name, weight in on_meta(lambda: WanTransformer(WAN)).state_dict().items()
    }
    text, tokenizer = stored.text_state(made.models().text_encoder, "diffusers"), tokenizer_bytes()
    vae = tmp_path / "Wan2.1_VAE.pth"
    torch.save(WanVAE(VAE).state_dict(), vae)
    gguf, fp8 = tmp_path / "wan-Q8_0.gguf", tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    meant = stored.write_gguf(gguf, teacher, "Q8_0")
    text_meant = stored.write_scaled_fp8(fp8, text)
    carried = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    rest = load_file(fp8)
    save_file({**rest, "spiece_model": carried}, fp8)
    bundle = export(tmp_path / "bundle", gguf, fp8, vae)
    assert "stored as GGUF Q8_0 (" in bundle.manifest.provenance.source
    assert "stored as scaled fp8 (" in bundle.manifest.provenance.source
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
