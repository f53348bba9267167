"""Decoders: what `--decoder FILE` refuses, in one sentence that says what it is, and what bfloat16 costs ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from tests.helpers.export_tools import small_source
from tests.helpers.plain_taehv import PUBLISHED, PUBLISHED22
from tmd_export import ExportError, RandomSource, open_source
from tmd_export.checkpoints.names import converted
from tmd_export.cli import command
from tmd_export.families.build import build
from tmd_export.graphs.accuracy import SIZES
from tmd_export.sources.decoders import WithDecoder, read_decoder
from tmd_export.weights.precision import lower
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig

TAEHV = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in PUBLISHED.items()}
VAE = {name: torch.zeros_like(weight) for name, weight in WanVAE(WanVAEConfig(dim=4)).state_dict().items()}


def changed(weights: dict[str, torch.Tensor], **shapes: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """`weights` with other shapes for some names ("." written as "__"); None: without that one."""
    result = dict(weights)
    for name, shape in shapes.items():
        result.pop(name.replace("__", "."), None)
        if shape is not None:
            result[name.replace("__", ".")] = torch.zeros(shape)
    return result


REFUSED = {
    "no decoder": (changed({}, text_model__weight=(3,)), "no decoder that is known here: .* 'text_model.weight'"),
    "another TAEHV": (changed(TAEHV, decoder__1__weight=(256, 32, 3, 3)), "TAEHV decoder .* 32 channels .Hunyuan"),
    "TAEHV of Wan2.2 with faults": (
        changed(TAEHV, decoder__1__weight=(256, 48, 3, 3)),
        r"'decoder.22.weight' is \[3, 64, 3, 3\] instead of \[12, 64, 3, 3\]",
    ),
    "TAEHV super": (changed(TAEHV, decoder__1__conv__0__weight=(1024, 1, 7, 7)), "the large variant of TAEHV"),
    "TAEHV with faults": (
        changed(TAEHV, decoder__22__bias=None, decoder__7__conv__weight=(512, 256, 1, 1), decoder__30__weight=(3,)),
        r"'decoder.22.bias' is missing, 'decoder.30.weight' is unexpected, 'decoder.7.conv.weight' is \[512, 256",
    ),
    "another VAE": (changed(VAE, conv2__weight=(32, 32, 1, 1, 1)), "a Wan VAE for latents of 32 channels .Hunyuan"),
    "VAE of Wan2.2 with faults": (changed(VAE, conv2__weight=(48, 48, 1, 1, 1)), "does not fit Wan's VAE"),
    "VAE with faults": (
        changed(VAE, decoder__conv1__bias=None, decoder__head__2__bias=(4,), other=(1,)),
        r"1 missing \('decoder.conv1.bias'\); 1 unexpected \('other'\); .*'decoder.head.2.bias' is \[4\] instead of",
    ),
}


@pytest.mark.parametrize(("weights", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_decoder_of_these_latents_is_named(weights: dict, said: str, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "file.safetensors")
    with pytest.raises(ExportError, match=said):
        read_decoder(tmp_path / "file.safetensors")


def test_a_file_that_could_run_a_program_is_refused(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self):
            return (exit, (3,))

    torch.save({**TAEHV, "decoder.1.bias": Program()}, tmp_path / "taew2_1.pth")
    with pytest.raises(ExportError, match="holds more than tensors"):
        read_decoder(tmp_path / "taew2_1.pth")


def test_a_decoder_of_another_geometry_or_none_is_refused(tmp_path: Path) -> None:
    save_file(TAEHV, tmp_path / "taehv.safetensors")
    source = WithDecoder(small_source(), tmp_path / "taehv.safetensors")
    with pytest.raises(ExportError, match="4 frames of 8x8 pixels, and this model's are of 16 channels for 2 frames"):
        source.check(("decoder_first",))
    wan22 = WithDecoder(RandomSource("wan2.2-ti2v-5b", 0, fusion=None), tmp_path / "taehv.safetensors")
    with pytest.raises(ExportError, match="8x8 pixels, and this model's are of 48 channels for 4 frames of 16x16"):
        wan22.check(("decoder_first",))
    with pytest.raises(ExportError, match="there is no file"):
        open_source("tiny", decoder=tmp_path / "absent.pth")
    absent, out = str(tmp_path / "absent.pth"), str(tmp_path / "bundle")
    result = CliRunner().invoke(command, ["--model", "tiny", "--decoder", absent, "--out", out])
    assert result.exit_code == 1
    assert f"there is no file {absent}" in result.output


@pytest.mark.parametrize("kind", ["taehv", "vae", "vae of diffusers"])
def test_a_decoder_for_wan22_is_recognised(kind: str, tmp_path: Path) -> None:
    vae = WanVAE(replace(WAN_VAE_CONFIGS["wan2.2"], dim=4, decoder_dim=8)).state_dict()
    if kind == "taehv":
        weights = {name: torch.zeros(shape) for name, shape in PUBLISHED22.items()}
    else:
        weights = {name if kind == "vae" else converted("vae", name): weight for name, weight in vae.items()}
    save_file(weights, tmp_path / "file.safetensors")
    source = WithDecoder(RandomSource("wan2.2-ti2v-5b", 0, fusion=None), tmp_path / "file.safetensors")
    source.check(("decoder_first", "decoder_step"))
    names = {name for name, _ in source.module("vae").named_parameters()}
    assert names == set(PUBLISHED22 if kind == "taehv" else source.module("vae").state_dict()) and len(names) > 30
    assert all(
        source.tensor("vae", name).shape == weight.shape for name, weight in source.module("vae").named_parameters()
    )
    with pytest.raises(
        ExportError, match="48 channels for 4 frames of 16x16 pixels, and this model's are of 16 channels"
    ):
        WithDecoder(RandomSource("wan1.3b", 0, fusion=None), tmp_path / "file.safetensors").check(("decoder_first",))


def test_the_other_models_stay_those_of_the_source(tmp_path: Path) -> None:
    save_file(TAEHV, tmp_path / "taehv.safetensors")
    base = small_source()
    base.notes, base.sampler = ("be careful",), {"rule": "euler"}
    source = WithDecoder(base, tmp_path / "taehv.safetensors")
    for name in ("model", "family", "default_parts", "tokenizer", "notes", "sampler", "trained"):
        assert getattr(source, name) == getattr(base, name), name
    for entry in ("model_entry", "latents_entry", "text_entry"):
        assert getattr(source, entry)() == getattr(base, entry)(), entry
    name = next(name for name, _ in base.module("text_encoder").named_parameters())
    assert torch.equal(source.tensor("text_encoder", name), base.tensor("text_encoder", name))
    assert source.tensor("vae", "decoder.22.bias").dtype == torch.float16
    assert {name for name, _ in source.module("vae").named_parameters()} == set(PUBLISHED)


@torch.no_grad()
@pytest.mark.parametrize("part", ["decoder_first", "decoder_step"])
def test_the_built_in_decoder_in_bfloat16_passes_the_gate_of_an_export(part: str) -> None:
    """In torch, which rounds as the graph does; with half of what the gate allows to spare."""
    source = open_source("tiny")
    outputs = []
    for precision in ("fp32", "bf16"):
        graph, weights = build(source, part)
        weights.fill(graph.module)
        lower(graph.module, precision)
        given = [graph.random_inputs(seed, **dims) for seed, dims in enumerate(SIZES, 1)]
        outputs.append([value for inputs in given for value in graph.module(*inputs.values())])
    rounded = [(a.double().flatten(), b.double().flatten()) for a, b in zip(*outputs, strict=True) if not a.equal(b)]
    assert min(torch.nn.functional.cosine_similarity(a, b, dim=0) for a, b in rounded) > 0.99995
