"""A family that only the tests know goes the whole way: tmd-export, inspect, verify, tmd-run, frames.

No shared module is changed for it: it is one object in the registry of each part (tests/helpers/drift_family.py).
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from tests.helpers.drift_family import CHANNELS, Drift, DriftExport, DriftRuntime, DriftSource, Network
from tmd_engines.bundle.families import FAMILIES
from tmd_engines.command.cli import main as tmd_engine
from tmd_export.families import FAMILIES as EXPORTED
from tmd_ref.vae import WanVAE, WanVAEConfig
from tmd_runtime import NoiseStream
from tmd_runtime.command.cli import command as tmd_run
from tmd_runtime.sampling import SAMPLING
from tmd_runtime.sampling.schedule import uniform_times

STEPS, SEED = 4, 5


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "drift", Drift())
    monkeypatch.setitem(EXPORTED, "drift", DriftExport())
    monkeypatch.setitem(SAMPLING, "drift", DriftRuntime())
    monkeypatch.delitem(sys.modules, "tmd_export.cli", raising=False)  # its choices are those of the registry


def invoke(command: Any, *arguments: object) -> str:
    done = CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def decoder(file: Path) -> WanVAE:
    """A narrow VAE for the latents, left in `file` as its publishers leave one."""
    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig(dim=4)).eval()
    for name, weight in vae.named_parameters():
        gain = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        weight.copy_(1 + 0.2 * torch.randn_like(weight) if "gamma" in name else gain * torch.randn_like(weight))
    torch.save({f"model.{name}": weight for name, weight in vae.state_dict().items()}, file)
    return vae


@pytest.mark.long
@torch.no_grad()
def test_a_new_family_goes_from_the_exporter_to_frames(
    registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vae = decoder(tmp_path / "vae.pth")
    tmd_export = importlib.import_module("tmd_export.cli").command
    invoke(tmd_export, "--model", "drift-1m", "--random-weights", 3, "--decoder", "vae.pth", "--out", "bundle")
    inspected = json.loads(invoke(tmd_engine, "inspect", "bundle", "--json"))
    assert inspected["model"]["family"] == "drift" and inspected["run"]["nfe"] == STEPS
    assert set(inspected["stages"]) == {"backbone", "flow_head", "update", "decoder"}
    assert "FAILED" not in invoke(tmd_engine, "verify", "bundle")
    save_file(
        {"prompt_embeds": np.zeros((8, 8), np.float32)}, "e.safetensors", {"format": "tmd-embeds-1", "prompt": "x"}
    )
    run = ("--bundle", "bundle", "--embeds", "e.safetensors", "--seed", SEED, "--out", "frames", "--json")
    made = json.loads(invoke(tmd_run, *run))
    assert (made["rule"], made["steps"], made["frames"]) == ("euler", STEPS, 5)

    network = Network()
    for name, weight in network.named_parameters():
        weight.copy_(DriftSource(3).tensor("student", name))
    x = torch.from_numpy(NoiseStream(SEED).normal((1, CHANNELS, 2, 4, 8)).copy())
    for t, after in itertools.pairwise(uniform_times(STEPS)):
        x = x + (after - t) * network.velocity(network.features(x, torch.tensor([t], dtype=torch.float32)))
    expected = (vae.decode(x.float())[0] * 127.5 + 127.5).permute(1, 2, 3, 0).numpy()
    assert expected.std() > 5
    for k, frame in enumerate(expected):
        shown = np.asarray(Image.open(f"frames/frame_{k:04}.png")).astype(float)
        assert np.abs(shown - frame).max() <= 1.01
