"""Wan2.1-T2V-1.3B at its real size, from an official folder to a video: bounded memory, and the reference's latents.

An official folder has no flow head. So the folder is written with random weights and read by the checkpoint reader into
a TMD student, as a distillation would begin; the student's own file and the folder (for its VAE) are exported together.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.helpers.synthetic_checkpoints import write_full_size
from tmd_engines import Bundle
from tmd_export.sources.random_weights import random_tensor
from tmd_export.sources.wan import WanSource
from tmd_ref.samplers import tmd_sample
from tmd_ref.split import SplitWan
from tmd_ref.student import TMDStudent, load_student, save_student
from tmd_ref.wan import WAN_CONFIGS, WanTransformer
from tmd_runtime import NoiseStream
from tmd_runtime.files.tensor_files import Embeddings, load_latents, save_embeds

ROOT = Path(__file__).parents[2]
CONFIG = WAN_CONFIGS["wan1.3b"]
HEAD_BLOCKS, SEED, FRAMES, SIDE = 5, 3, 17, 256
LATENTS = (1, 16, (FRAMES - 1) // 4 + 1, SIDE // 8, SIDE // 8)
WORDS = 23  # rows of the embeddings; the others of the 512 are zero, as Wan pads


class Done(NamedTuple):
    """What a command said, and what it took: peak of memory that no file backs in bytes, and CPU time in seconds."""

    stdout: str
    peak: int
    seconds: float


def run(module: str, *arguments: object) -> Done:
    """`python -m module`, on one thread. Fails the test with what the command said.

    Pages of mapped files do not count, because the kernel may drop them. The process is asked every 50 ms.
    """
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "export", "engines", "runtime"))
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=out, stderr=said, env=environment)
        ended = peak = 0
        while not ended:
            time.sleep(0.05)
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said.seek(0)
        assert process.returncode == 0, said.read()
        return Done(out.read(), peak, usage.ru_utime + usage.ru_stime)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The official folder and, beside it, student.safetensors: 12 GB."""
    home = tmp_path_factory.mktemp("full")
    folder = write_full_size(home / "Wan2.1-T2V-1.3B")
    source = WanSource([folder], "wan1.3b")
    with torch.device("meta"):
        wan = WanTransformer(CONFIG)
    split = SplitWan(wan, source.head_blocks)
    split.load_state_dict({name: source.tensor("student", name) for name in split.state_dict()}, assign=True)
    student = TMDStudent(CONFIG, HEAD_BLOCKS, wan=wan)
    with torch.no_grad():
        for name, weight in student.head.named_parameters():  # what a teacher lacks starts as zeros and near-zeros
            if name.startswith(("fusion.", "interval_")):
                weight.copy_(random_tensor(f"head.{name}", weight.shape, 1))
    save_student(home / "student.safetensors", student)
    del student, split, wan
    yield folder
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def prompt_embeds() -> torch.Tensor:
    rows = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    rows[:, :WORDS].normal_(generator=torch.Generator().manual_seed(2))
    return rows


@pytest.fixture(scope="module")
def expected(folder: Path, prompt_embeds: torch.Tensor) -> np.ndarray:
    """The latents of the PyTorch reference, M = 1, N = 2."""
    stream = NoiseStream(SEED)
    first, inner = (torch.from_numpy(stream.normal(LATENTS)) for _ in range(2))
    student = load_student(folder.parent / "student.safetensors").eval().requires_grad_(False)
    return tmd_sample(student, first, prompt_embeds, 1, 2, inner_noise=inner[None]).numpy()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "size"), [("fp32", 6.5e9), ("bf16", 3.4e9)])
def test_an_official_folder_becomes_a_bundle_and_a_video(
    folder: Path, prompt_embeds: torch.Tensor, expected: np.ndarray, tmp_path: Path, precision: str, size: float
) -> None:
    """Minutes of CPU time per precision, 19 GB of disk, 8 GB of memory."""
    checkpoints = ("--checkpoint", folder.parent / "student.safetensors", "--checkpoint", folder)
    export = run("tmd_export", "--model", "wan1.3b", *checkpoints, "--precision", precision, "--out", tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    manifest = bundle.manifest
    assert export.peak < 4 << 30
    assert set(manifest.graphs) == {"backbone", "flow_head", "decoder_first", "decoder_step"}
    assert 0.95 * size < sum(file.size for file in manifest.files.values()) < 1.05 * size
    for graph in manifest.graphs.values():
        assert graph.accuracy is not None
        assert graph.accuracy.cosine >= (0.999999 if precision == "fp32" else 0.9999)
    assert "on blocks 0 and 24 of 25" in manifest.graphs["backbone"].accuracy.reference  # type: ignore[union-attr]

    save_embeds(tmp_path / "e.safetensors", Embeddings("a prompt", prompt_embeds[:, :WORDS].numpy()), manifest)
    wishes = ("--steps", 1, "--inner-steps", 2, "--frames", FRAMES, "--size", f"{SIDE}x{SIDE}", "--seed", SEED)
    files = ("--embeds", tmp_path / "e.safetensors", "--save-latents", tmp_path / "l.safetensors")
    how = ("--engine", "onnxruntime", "--threads", 1, "--memory", "low", "--json")
    done = run("tmd_runtime", "--bundle", tmp_path / "b", *files, *wishes, *how, "--out", tmp_path / "v.mp4")
    found = load_latents(tmp_path / "l.safetensors", manifest).latents
    shutil.rmtree(tmp_path / "b")
    error, cosine = np.abs(found - expected).max(), cosine_of(found, expected)
    stages = json.loads(done.stdout)["stage_seconds"]
    print(
        f"\n{precision}: tmd-export {export.seconds:.0f} s of CPU time, {export.peak / 2**20:.0f} MiB\n{export.stdout}"
    )
    print(f"tmd-run {done.seconds:.0f} s of CPU time, {done.peak / 2**20:.0f} MiB, wall clock {stages}")
    print(f"latents: deviation {expected.std():.3f}, largest error {error:.2e}, 1 - cosine {1 - cosine:.2e}")
    assert 0.1 < expected.std() < 10
    assert error <= 1e-3 * expected.std() if precision == "fp32" else cosine >= 0.999
    assert frames_of(tmp_path / "v.mp4") == (FRAMES, SIDE, SIDE)


def cosine_of(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def frames_of(path: Path) -> tuple[int, int, int]:
    """Number, width and height of the frames that decode."""
    import av

    with av.open(str(path)) as video:
        frames = list(video.decode(video=0))
    return len(frames), frames[0].width, frames[0].height
