"""How often a model draws what the caption says: teacher and student on held-out captions, read back by the oracle."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmd_ref.captions import caption
from tmd_ref.distill.data import encode_prompts
from tmd_ref.distill.frechet import clip_features, diversity, frechet_distance
from tmd_ref.distill.vae import to_frames, to_video
from tmd_ref.oracle import ATTRIBUTES, read_clip
from tmd_ref.partial import write_whole
from tmd_ref.samplers import dmd_sample, effective_nfe, tmd_sample, unipc_sample
from tmd_ref.scenes import Scene, render, sample_scene
from tmd_ref.student import TMDStudent
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE
from tmd_ref.wan import WanTransformer

GROUPS = ("motion", "shape", "size", "background", "color", "speed")


def held_out(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Scenes of combinations never seen in training, and a caption of each."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    return scenes, [caption(scene, rng) for scene in scenes]


def as_typed(count: int = 100) -> tuple[list[Scene], list[str]]:
    """The first `count` of a hundred prompts as people type them, with the scenes that they mean: written by hand
    apart from `tmd_ref.captions` and without a look at it. Size, speed and place of the scenes say nothing."""
    lines = resources.files(__package__).joinpath("as_typed.jsonl").read_text().splitlines()[:count]
    prompts = [json.loads(line) for line in lines]
    return [Scene(**{name: p[name] for name in ATTRIBUTES}) for p in prompts], [p["prompt"] for p in prompts]


def judge(scenes: list[Scene], clips: np.ndarray) -> list[dict[str, bool]]:
    """Which attributes of each clip, uint8 `[B,F,H,W,3]`, are as described; `all`: the whole scene is."""
    right = [read_clip(clip).agrees(scene) for scene, clip in zip(scenes, clips, strict=True)]
    return [{**r, "all": all(r.values())} for r in right]


def shares(right: list[dict[str, bool]]) -> dict[str, float]:
    """The mean of each entry of what `judge` found."""
    return {name: float(np.mean([r[name] for r in right])) for name in right[0]}


def by_group(scenes: list[Scene], right: list[dict[str, bool]]) -> dict[str, dict[str, dict[str, float]]]:
    """{"motion": {"left": {"clips": 21, "shape": 0.95, ...}, ...}, ...}: `shares` of each value of some attributes."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for group in GROUPS:
        for value in dict.fromkeys(sorted(getattr(scene, group) for scene in scenes)):
            found = [r for scene, r in zip(scenes, right, strict=True) if getattr(scene, group) == value]
            table.setdefault(group, {})[value] = {"clips": len(found), **shares(found)}
    return table


@dataclass(frozen=True)
class Row:
    """A line of the table: how latents are made for some prompt embeddings, and at what cost."""

    name: str
    nfe: float
    sample: Callable[[Tensor, torch.Generator], Tensor]


def _noise(prompt: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A clip's noise for each prompt: drawn on the CPU, so that every device gets the same."""
    return torch.randn(len(prompt), *shape, generator=generator).to(prompt.device)


def teacher_row(name: str, teacher: WanTransformer, negative: Tensor, steps: int, shift: float, guidance: float,
                shape: tuple[int, ...]) -> Row:  # fmt: skip
    """UniPC with guidance. `negative` `[1,S,E]`, `shape` of one clip's latents."""

    def sample(prompt: Tensor, generator: torch.Generator) -> Tensor:
        noise = _noise(prompt, shape, generator)
        return unipc_sample(teacher, noise, prompt, negative.expand_as(prompt), steps, shift, guidance)

    return Row(name, float(steps * (1 if guidance == 1 else 2)), sample)


def student_row(name: str, student: TMDStudent, outer_steps: int, inner_steps: int, shape: tuple[int, ...]) -> Row:
    """TMD's transitions without guidance, on the student's own time grids."""

    def sample(prompt: Tensor, generator: torch.Generator) -> Tensor:
        noise = _noise(prompt, shape, generator)
        draws = lambda shape: torch.randn(shape, generator=generator).to(prompt.device)  # noqa: E731
        return tmd_sample(student, noise, prompt, outer_steps, inner_steps, inner_noise=draws)

    return Row(name, effective_nfe(outer_steps, inner_steps, student.head_blocks, student.config.num_layers), sample)


def baseline_row(name: str, model: WanTransformer, outer_steps: int, shift: float, shape: tuple[int, ...]) -> Row:
    """DMD2-v without guidance."""

    def sample(prompt: Tensor, generator: torch.Generator) -> Tensor:
        noise = _noise(prompt, shape, generator)
        return dmd_sample(model, noise, prompt, outer_steps, shift)

    return Row(name, float(outer_steps), sample)


@torch.no_grad()
def measure(
    rows: list[Row], vae: WanVAE, encoder: UMT5Encoder, tokenizer: Tokenizer, out: Path, *, count: int, seed: int,
    frames: int, size: tuple[int, int], batch: int = 16, repeats: int = 4, report: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Measure models of rendered scenes on `count` held-out captions; write `evaluation.json` and `.png` to `out`.

    First row: the VAE alone (rendered clips encoded and decoded), the ceiling of all others. Columns: NFE, the share of
    clips in which the oracle reads what the caption says, the Fréchet distance to other rendered clips of held-out
    combinations, and diversity: the mean distance of `repeats` clips of the same caption, in units of that of rendered
    clips of one caption (only the place is free). In the file also `groups`, the shares of each value of some
    attributes, and `typed`, those of the prompts of `as_typed`, at most `count`.
    """
    scenes, captions = held_out(count, seed)
    embeds = encode_prompts(encoder, tokenizer, captions)
    groups = min(count, 24)

    def draw(scene: Scene) -> np.ndarray:
        return render(scene, frames, size)

    reference = clip_features(np.stack([draw(scene) for scene in held_out(count, seed + 1)[0]]))
    scale = reference.std(0) + 1e-6
    rng = np.random.default_rng(seed + 2)
    same = np.stack([draw(another_of(scene, rng)) for scene in scenes[:groups] for _ in range(repeats)])
    free = diversity(clip_features(same).reshape(groups, repeats, -1), scale)

    def autoencode(index: slice) -> Tensor:
        return vae.encode(to_video(np.stack([draw(scene) for scene in scenes[index]])).to(embeds.device))

    typed_scenes, typed_captions = as_typed(count)
    typed_embeds = encode_prompts(encoder, tokenizer, typed_captions)
    results: dict[str, dict[str, float]] = {}
    groups_of: dict[str, Any] = {}
    typed_right: dict[str, dict[str, float]] = {}
    sheet: list[np.ndarray] = []
    for row in [None, *rows]:
        generator = torch.Generator().manual_seed(seed)
        began = time.monotonic()
        made = [
            to_frames(vae.decode(autoencode(part) if row is None else row.sample(embeds[part], generator)))
            for part in (slice(i, i + batch) for i in range(0, count, batch))
        ]
        clips = np.concatenate(made)
        sheet.append(clips[:12])
        name, nfe = ("autoencoder", 0.0) if row is None else (row.name, row.nfe)
        right = judge(scenes, clips)
        results[name] = {"nfe": nfe, **shares(right)}
        groups_of[name] = by_group(scenes, right)
        features = clip_features(clips)
        results[name]["frechet"] = frechet_distance(features / scale, reference / scale)
        if row is not None:
            typed = np.concatenate([to_frames(vae.decode(row.sample(p, generator))) for p in typed_embeds.split(batch)])
            typed_right[name] = shares(judge(typed_scenes, typed))
            prompts = embeds[:groups].repeat_interleave(repeats, 0)
            again = [to_frames(vae.decode(row.sample(chunk, generator))) for chunk in prompts.split(batch)]
            spread = clip_features(np.concatenate(again)).reshape(groups, repeats, -1)
            results[name]["diversity"] = diversity(spread, scale) / free
        rounded = {k: round(v, 3) for k, v in results[name].items()}
        report(f"{name}: {json.dumps(rounded)} in {time.monotonic() - began:.0f} s")
        report_groups(groups_of[name], typed_right.get(name), report)
    out.mkdir(parents=True, exist_ok=True)
    about = {"captions": count, "seed": seed, "rows": results, "groups": groups_of, "typed": typed_right}
    write_whole(out / "evaluation.json", f"{json.dumps(about, indent=1)}\n".encode())
    write_png(out / "evaluation.png", contact_sheet(sheet))
    return results


def report_groups(
    groups: dict[str, dict[str, dict[str, float]]], typed: dict[str, float] | None, report: Callable[[str], None]
) -> None:
    """A line per attribute with the share of whole scenes for each of its values, and one for prompts as typed."""
    for group, values in groups.items():
        shown = (f"{value} {100 * found['all']:.0f} % of {found['clips']}" for value, found in values.items())
        report(f"  {group}: {', '.join(shown)}")
    if typed is not None:
        report(f"  as people type: {json.dumps({name: round(share, 3) for name, share in typed.items()})}")


def another_of(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that the same caption describes: at another place."""
    other = sample_scene(rng)
    return dataclasses.replace(scene, x=other.x, y=other.y)


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
    write_whole(path, b"".join(bytes(packet) for packet in packets))
