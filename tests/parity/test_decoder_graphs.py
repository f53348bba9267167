"""Decoders from a file, exported and run one latent frame at a time, against others' decoding of the whole clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.export_tools import TEXT, WAN
from tests.helpers.plain_taehv import random_weights, whole_clip
from tmd_engines import Bundle
from tmd_export import RandomSource, export_bundle
from tmd_export.checkpoints.names import converted
from tmd_export.sources.decoders import WithDecoder
from tmd_ref.vae import WanVAE, WanVAEConfig

diffusers = pytest.importorskip("diffusers")

WIDTH = 4  # lightvae has 24, Wan2.1's VAE 96
LATENTS = torch.randn(1, 16, 3, 3, 4, generator=torch.Generator().manual_seed(3))
Decode = Callable[[torch.Tensor], torch.Tensor]


def lightvae(folder: Path) -> tuple[Path, Decode]:
    """A whole VAE in the original names behind a prefix, as `.pth`; decoded by diffusers, in 0..1."""
    torch.manual_seed(0)
    weights = {}
    for name, weight in WanVAE(WanVAEConfig(dim=WIDTH)).state_dict().items():
        gain = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        weights[name] = 1 + 0.2 * torch.randn_like(weight) if "gamma" in name else gain * torch.randn_like(weight)
    torch.save({f"model.{name}": weight for name, weight in weights.items()}, folder / "lightvae.pth")
    vae = diffusers.AutoencoderKLWan(base_dim=WIDTH).eval()
    vae.load_state_dict({converted("vae", name): weight for name, weight in weights.items()}, strict=True)
    mean, std = (torch.tensor(vae.config[f"latents_{kind}"]).view(1, -1, 1, 1, 1) for kind in ("mean", "std"))
    return folder / "lightvae.pth", lambda latents: vae.decode(latents * std + mean).sample / 2 + 0.5


def taehv(folder: Path) -> tuple[Path, Decode]:
    """A published file's decoder in float16, and an encoder that is left aside; decoded all at once, in 0..1."""
    weights = {name: weight.half() for name, weight in random_weights().items()}
    save_file({**weights, "encoder.0.weight": torch.zeros(64, 3, 3, 3)}, folder / "taehv.safetensors")
    exact = {name: weight.float() for name, weight in weights.items()}
    return folder / "taehv.safetensors", lambda latents: whole_clip(exact, latents)


def frame_by_frame(bundle: Bundle, latents: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 `[F,H,W,3]`, and the values in 0..255 that were rounded to them."""
    frames, values = [], []
    caches: dict[str, np.ndarray] = {}
    for k in range(latents.shape[2]):
        model = onnx.load(bundle.graph_path("decoder_step" if k else "decoder_first"))
        exact = next(node.input[0] for node in model.graph.node if node.op_type == "Round")
        model.graph.output.append(onnx.helper.make_tensor_value_info(exact, onnx.TensorProto.FLOAT, None))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [output.name.removesuffix("_next") for output in session.get_outputs()]
        outputs = dict(
            zip(names, session.run(None, {"latents": latents[:, :, k : k + 1].numpy(), **caches}), strict=True)
        )
        frames.append(outputs.pop("frames")[0])
        assert np.isfinite(outputs.pop("magnitude")).all()
        values.append(np.moveaxis(outputs.pop(exact)[0], 0, -1))
        caches = outputs
    return np.concatenate(frames), np.concatenate(values)


@pytest.mark.long
@pytest.mark.parametrize("write", [lightvae, taehv])
@torch.no_grad()
def test_a_decoder_from_a_file_equals_its_authors_decoding(write: Callable, tmp_path: Path) -> None:
    path, decode = write(tmp_path)
    source = WithDecoder(RandomSource("small", 0, wan=WAN, head_blocks=1, vae=WanVAEConfig(dim=WIDTH), text=TEXT), path)
    result = export_bundle(source, tmp_path / "bundle", ("decoder_first", "decoder_step"))
    provenance = result.bundle.manifest.provenance
    assert provenance.source == f"random weights, seed 0; decoder {path.name}"
    assert list(provenance.source_sha256) == [path.name]

    expected = decode(LATENTS)[0].permute(1, 2, 3, 0).numpy()
    frames, values = frame_by_frame(result.bundle, LATENTS)
    assert frames.shape == expected.shape == (9, 24, 32, 3)
    assert ((expected > 0) & (expected < 1)).mean() > 0.3 and expected.std() > 0.02
    assert np.abs(values / 127.5 - 2 * expected).max() <= 1e-4  # a video in -1..1, before it is rounded
    assert np.array_equal(frames, np.rint(values))
