"""How often a model draws what the caption says: teacher and student on held-out captions, read back by the oracle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tmd_ref.checkpoint import load_model
from tmd_ref.distill.data import NEGATIVE_PROMPT, encode_prompts
from tmd_ref.distill.vae import to_frames, to_video
from tmd_ref.oracle import ATTRIBUTES, read_clip
from tmd_ref.samplers import effective_nfe, tmd_sample, unipc_sample
from tmd_ref.scenes import Scene, caption, render, sample_scene
from tmd_ref.student import load_student
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE
from tmd_ref.wan import WanTransformer

GUIDANCE = 3.0
TEACHER_STEPS = 50


def held_out(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Scenes of combinations never seen in training, and a caption of each."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    return scenes, [caption(scene, rng) for scene in scenes]


def score(scenes: list[Scene], clips: np.ndarray) -> dict[str, float]:
    """Share of clips, uint8 `[B,F,H,W,3]`, in which each attribute is as described; `all` counts whole scenes."""
    right = [read_clip(clip).agrees(scene) for scene, clip in zip(scenes, clips, strict=True)]
    result = {name: float(np.mean([r[name] for r in right])) for name in ATTRIBUTES}
    return result | {"all": float(np.mean([all(r.values()) for r in right]))}


@torch.no_grad()
def evaluate(
    folder: Path, out: Path, outer_steps: int, inner_steps: int, count: int = 208, seed: int = 7,
    batch: int = 16, report: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Measure the models in `folder` on `count` held-out captions; write `evaluation.json` and `.png` to `out`.

    Rows: the VAE alone (rendered clips encoded and decoded), the teacher (UniPC, guided), the student.
    """
    vae = load_model(folder / "vae.safetensors", WanVAE)
    encoder = load_model(folder / "umt5.safetensors", UMT5Encoder)
    teacher = load_model(folder / "teacher.safetensors", WanTransformer)
    student = (
        load_student(folder / "student.safetensors").float().eval()
        if (folder / "student.safetensors").exists()
        else None
    )
    tokenizer = Tokenizer(folder / "tokenizer.model", teacher.config.text_len)
    scenes, captions = held_out(count, seed)
    embeds = encode_prompts(encoder, tokenizer, captions)
    negative = encode_prompts(encoder, tokenizer, [NEGATIVE_PROMPT])

    def autoencode(index: slice, generator: torch.Generator) -> Tensor:
        return vae.encode(to_video(np.stack([render(scene) for scene in scenes[index]])))

    def from_teacher(index: slice, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(scenes[index]), 16, 5, 8, 8, generator=generator)
        prompt = embeds[index]
        return unipc_sample(teacher, noise, prompt, negative.expand_as(prompt), TEACHER_STEPS, 3.0, GUIDANCE)

    def from_student(index: slice, generator: torch.Generator) -> Tensor:
        assert student is not None
        noise = torch.randn(len(scenes[index]), 16, 5, 8, 8, generator=generator)
        draws = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
        return tmd_sample(student, noise, embeds[index], outer_steps, inner_steps, inner_noise=draws)

    rows: dict[str, Callable] = {"autoencoder": autoencode, f"teacher {TEACHER_STEPS}x2": from_teacher}
    nfe = {"autoencoder": 0.0, f"teacher {TEACHER_STEPS}x2": 2.0 * TEACHER_STEPS}
    if student is not None:
        name = f"student M={outer_steps} N={inner_steps}"
        rows[name] = from_student
        nfe[name] = effective_nfe(outer_steps, inner_steps, student.head_blocks, student.config.num_layers)
    results, clips = {}, {}
    for name, sample in rows.items():
        generator = torch.Generator().manual_seed(seed)
        began = time.monotonic()
        chunks = [to_frames(vae.decode(sample(slice(i, i + batch), generator))) for i in range(0, count, batch)]
        clips[name] = np.concatenate(chunks)
        results[name] = {"nfe": nfe[name], **score(scenes, clips[name])}
        rounded = {k: round(v, 3) for k, v in results[name].items()}
        report(f"{name}: {json.dumps(rounded)} in {time.monotonic() - began:.0f} s")
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(
        json.dumps({"captions": count, "seed": seed, "rows": results}, indent=1) + "\n"
    )
    write_png(out / "evaluation.png", contact_sheet([clips[name][:12] for name in rows]))
    return results


def contact_sheet(columns: list[np.ndarray], shown: int = 5, scale: int = 2, gap: int = 4) -> np.ndarray:
    """Clips side by side: a row per clip, in it `shown` frames of each column's clip. uint8 `[H,W,3]`.

    `columns`: uint8 `[B,F,H,W,3]` each, of the same size.
    """
    frames = columns[0].shape[1]
    chosen = np.linspace(0, frames - 1, shown).round().astype(int)
    lines = []
    for row in range(len(columns[0])):
        line = []
        for column in columns:
            for frame in chosen:
                picture = column[row, frame].repeat(scale, 0).repeat(scale, 1)
                line += [picture, np.full((picture.shape[0], gap, 3), 255, np.uint8)]
            line.append(np.full((picture.shape[0], 3 * gap, 3), 255, np.uint8))
        lines += [np.concatenate(line, 1), np.full((gap, sum(p.shape[1] for p in line), 3), 255, np.uint8)]
    return np.concatenate(lines, 0)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write uint8 `[H,W,3]` as PNG."""
    import av

    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = picture.shape[1], picture.shape[0], "rgb24"
    encoder.time_base = Fraction(1)
    packets = encoder.encode(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    ) + encoder.encode(None)
    path.write_bytes(b"".join(bytes(packet) for packet in packets))
