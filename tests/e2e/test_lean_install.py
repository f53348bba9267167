"""The README's first command, in an environment made for it: no torch comes along, and a video comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av

ROOT = Path(__file__).parents[2]


def run(*command: object, **kw) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kw)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_lean_install_brings_no_torch_and_makes_a_video(tmp_path):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{ROOT}[cpu]", env=clean)
    packages = {entry["name"].lower() for entry in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    assert "onnxruntime" in packages
    assert not packages & {"torch", "transformers", "diffusers", "tensorrt", "openvino"}

    out = tmp_path / "circle.mp4"
    prompt = "a red circle moving right on a black background"
    # fmt: off
    printed = run(tmp_path / "env" / "bin" / "tmd-run", "--prompt", prompt, "--out", out, "--seed", 1, "--json",
                  env=clean, cwd=tmp_path)
    # fmt: on
    document = json.loads(printed)
    assert (document["frames"], document["width"], document["height"]) == (17, 64, 64)
    with av.open(str(out)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 17 and frames[0].shape == (64, 64, 3)
