"""`tmd-export` as a user types it, and the two graphs of its bundle in the loop of the paper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tmd_engines import Bundle, load
from tmd_export import RandomSource
from tmd_ref.samplers import shift_grid, tmd_sample
from tmd_ref.student import TMDStudent
from tmd_ref.wan import WAN_CONFIGS

ROOT = Path(__file__).parents[2]


def tmd_export(*arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "export", "engines"))
    command = [sys.executable, "-m", "tmd_export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def sample_on_engines(bundle: Bundle, noises: list[torch.Tensor], prompt_embeds: torch.Tensor) -> np.ndarray:
    """TMD Algorithm 1 on the exported graphs, 2 x 2 steps."""
    x = noises[0].numpy()
    batch, _, frames, height, width = x.shape
    dims = {"batch": batch, "frames": frames, "height": height, "width": width}
    dims |= {"tokens": frames * height * width // 4, "text": prompt_embeds.shape[1]}
    student = TMDStudent(WAN_CONFIGS["tiny"], 2)
    rope = dict(zip(("rope_cos", "rope_sin"), (table.numpy() for table in student.rope(noises[0])), strict=True))
    t, s = shift_grid(2, 10.0), shift_grid(2, 10.0)

    def full(value: float) -> np.ndarray:
        return np.full(batch, value, np.float32)

    with load(bundle, "backbone", threads=1) as backbone, load(bundle, "flow_head", threads=1) as head:
        for i in (2, 1):
            features = {name: backbone.empty(name, **dims) for name in ("features", "context")}
            backbone.run({"x": x, "t": full(t[i]), "prompt_embeds": prompt_embeds.numpy(), **rope}, features)
            noise = y = noises[3 - i].numpy()
            for j in (2, 1):
                y_next = head.empty("y_next", **dims)
                given = {"y": y, "noise": noise, "s": full(s[j]), "r": full(s[j - 1]), **features, **rope}
                head.run(given, {"y_next": y_next})
                y = y_next
            x = x - np.float32(t[i] - t[i - 1]) * y
    return x


def test_the_exported_loop_equals_the_reference_sampler(tmp_path: Path) -> None:
    done = tmd_export(
        "--model", "tiny", "--random-weights", 0, "--parts", "backbone,flow_head", "--out", tmp_path / "bundle"
    )
    assert done.returncode == 0, done.stderr
    assert "backbone" in done.stdout and "flow_head" in done.stdout
    assert "Warning" not in done.stderr and "torch" not in done.stderr
    bundle = Bundle.open(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    student = reference_student()
    generator = torch.Generator().manual_seed(7)
    noises = [torch.randn(1, 16, 3, 8, 6, generator=generator) for _ in range(3)]
    prompt_embeds = torch.randn(1, 32, student.config.text_dim, generator=generator)
    expected = tmd_sample(student, noises[0], prompt_embeds, 2, 2, inner_noise=torch.stack(noises[1:]))
    found = sample_on_engines(bundle, noises, prompt_embeds)
    assert 0.1 < expected.std() < 10
    assert np.abs(found - expected.numpy()).max() <= 1e-4


def reference_student() -> TMDStudent:
    """The whole student of `--random-weights 0`."""
    source = RandomSource("tiny", 0)
    student = source.module("student")
    assert isinstance(student, TMDStudent)
    names = [name for name, _ in student.named_parameters()]
    student.load_state_dict({name: source.tensor("student", name) for name in names}, strict=False, assign=True)
    return student
