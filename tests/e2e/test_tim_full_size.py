"""TiM's text-to-image model at full size, random weights: exported in bounded memory, one transition per engine."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.helpers.tim_models import network, run
from tmd_engines import Bundle
from tmd_export.sources.tim import RandomTiM
from tmd_ref.tim.model import rope_tables

MEMORY_KB = 4_000_000
SIZES = {"batch": 2, "text": 12, "height": 8, "width": 8, "tokens": 64}  # 256 x 256 pixels, with guidance


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("tim") / "t2i"
    command = [sys.executable, "-m", "tmd_export", "--model", "tim-t2i", "--random-weights", "0", "--out", str(out)]
    done = subprocess.run([*command, "--json", "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    graphs = json.loads(done.stdout)["graphs"]
    assert all(graph["accuracy"]["max_abs_error"] < 1e-4 for graph in graphs.values())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak of the export: {peak / 1e6:.2f} GB")
    assert peak < MEMORY_KB
    return Bundle.open(out)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """Inputs, and what the reference makes of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 32, 1, 8, 8, generator=generator).expand(2, -1, -1, -1, -1).contiguous()
    y = torch.randn(2, 12, 1152, generator=generator)
    t, r = torch.full((2,), 0.75), torch.full((2,), 0.25)
    model = network(RandomTiM("tim-t2i", 0))
    f, null = model(x.squeeze(2), t, r, y)
    after = x[0, :, 0] - 0.5 * (null + 2.5 * (f - null))
    assert 0.1 < (f - null).std() < 10
    return {"x": x, "prompt_embeds": y, "t": t, "r": r, "after": after}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_one_guided_transition_at_full_size(exported: Bundle, expected: dict[str, torch.Tensor], engine: str) -> None:
    pytest.importorskip(engine)
    context = run(exported, "backbone", {"prompt_embeds": expected["prompt_embeds"]}, SIZES, engine)
    cos, sin = rope_tables(8, 8, 72)
    mix = torch.tensor([[2.5, -1.5], [2.5, -1.5]])
    given = {name: expected[name] for name in ("x", "t", "r")} | {"guidance": mix, "context": torch.from_numpy(context)}
    found = run(exported, "flow_head", {**given, "rope_cos": cos, "rope_sin": sin}, SIZES, engine)
    error = np.abs(found[:, :, 0] - expected["after"].numpy()).max()
    print(f"{engine}: max error {error:.1e} at scale {expected['after'].std():.2f}")
    assert error < 1e-4
