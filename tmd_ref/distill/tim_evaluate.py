"""How often a model of stills draws what the caption says, at each number of steps: read back by the oracle.

Stills are the middle frames of rendered clips, where the shape is in the place that its caption's clip moves around.
Motion cannot be read from a still and does not count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmd_ref.distill.data import encode_prompts, still
from tmd_ref.distill.evaluate import as_typed, by_group, contact_sheet, held_out, report_groups, shares, write_png
from tmd_ref.distill.frechet import clip_features, frechet_distance
from tmd_ref.distill.tim_config import Evaluation
from tmd_ref.distill.vae import to_frames, to_video
from tmd_ref.oracle import read_clip
from tmd_ref.partial import write_whole
from tmd_ref.scenes import Scene
from tmd_ref.text import Tokenizer
from tmd_ref.tim.model import TiM, rope_tables, token_grid
from tmd_ref.tim.sampling import tim_sample, uniform_times
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE

ATTRIBUTES = ("shape", "color", "background")
GROUPS = ("shape", "size", "background", "color")
REPEATED = 3  # oracle and features want clips


def judge(scenes: list[Scene], stills: np.ndarray) -> list[dict[str, bool]]:
    """Which attributes of each still, uint8 `[B,H,W,3]`, are as described; `all`: the whole picture is."""
    clips = np.repeat(stills[:, None], REPEATED, 1)
    read = [read_clip(clip).agrees(scene) for scene, clip in zip(scenes, clips, strict=True)]
    right = [{name: found[name] for name in ATTRIBUTES} for found in read]
    return [{**r, "all": all(r.values())} for r in right]


def score(scenes: list[Scene], stills: np.ndarray) -> dict[str, float]:
    """The shares of what `judge` found."""
    return shares(judge(scenes, stills))


@torch.no_grad()
def measure(
    model: TiM, vae: WanVAE, encoder: UMT5Encoder, tokenizer: Tokenizer, negative: Tensor, out: Path,
    settings: Evaluation, *, size: tuple[int, int], batch: int = 16, report: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Measure `model` on held-out captions; write `evaluation.json` and `.png` to `out`. `negative` `[1,S,E]`.

    First row: the VAE alone, the ceiling of all others. Then one row per number of steps, from the same noise: NFE, the
    share of stills in which the oracle reads what the caption says, and the Fréchet distance to other rendered stills
    of held-out combinations. In the file also `groups`, the shares of each value of some attributes, and `typed`, those
    of the prompts of `as_typed`.
    """
    count, seed = settings.captions, settings.seed
    scenes, captions = held_out(count, seed)
    embeds = encode_prompts(encoder, tokenizer, captions)
    reference = _features(np.stack([still(scene, size) for scene in held_out(count, seed + 1)[0]]))
    scale = reference.std(0) + 1e-6
    shape = (model.config.in_channels, size[0] // 8, size[1] // 8)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(embeds.device)
    rope = rope_tables(*token_grid(noise, model.config.patch), model.config.head_dim, embeds.device)

    typed_scenes, typed_prompts = as_typed(count)
    typed_embeds = encode_prompts(encoder, tokenizer, typed_prompts)

    def draw(prompt: Tensor, part: slice, steps: int) -> Tensor:
        return tim_sample(
            lambda x, t, r, y: model(x, t, r, y, rope), noise[part], prompt, uniform_times(steps),
            negative.expand_as(prompt), settings.guidance, settings.interval, settings.instant,
        ).unsqueeze(2)  # fmt: skip

    def autoencode(part: slice) -> Tensor:
        stills = np.stack([still(scene, size)[None] for scene in scenes[part]])
        return vae.encode(to_video(stills).to(embeds.device))

    results: dict[str, dict[str, float]] = {}
    groups: dict[str, Any] = {}
    typed: dict[str, dict[str, float]] = {}
    sheet = []
    for steps in (0, *settings.steps):
        began = time.monotonic()
        parts = [slice(i, i + batch) for i in range(0, count, batch)]
        made = [to_frames(vae.decode(draw(embeds[p], p, steps) if steps else autoencode(p))) for p in parts]
        clips = np.concatenate(made)
        sheet.append(clips[:12])
        name = f"{steps} steps" if steps else "autoencoder"
        right = judge(scenes, clips[:, 0])
        results[name] = {"nfe": evaluations(steps, settings), **shares(right)}
        groups[name] = {key: found for key, found in by_group(scenes, right).items() if key in GROUPS}
        if steps:
            first = slice(len(typed_scenes))  # of the noise
            pictures = to_frames(vae.decode(draw(typed_embeds, first, steps)))
            typed[name] = score(typed_scenes, pictures[:, 0])
        results[name]["frechet"] = frechet_distance(_features(clips[:, 0]) / scale, reference / scale)
        rounded = {k: round(v, 3) for k, v in results[name].items()}
        report(f"{name}: {json.dumps(rounded)} in {time.monotonic() - began:.0f} s")
        report_groups(groups[name], typed.get(name), report)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "captions": count,
        "seed": seed,
        "guidance": settings.guidance,
        "rows": results,
        "groups": groups,
        "typed": typed,
    }
    write_whole(out / "evaluation.json", f"{json.dumps(about, indent=1)}\n".encode())
    write_png(out / "evaluation.png", contact_sheet(sheet, shown=1))
    return results


def evaluations(steps: int, settings: Evaluation) -> float:
    """Runs of the network in so many steps: two in a step with guidance."""
    low, high = settings.interval
    guided = settings.guidance != 1
    return float(sum(1 + (guided and low < t < high) for t in uniform_times(steps)[:-1])) if steps else 0.0


def _features(stills: np.ndarray) -> np.ndarray:
    """`clip_features` of stills uint8 `[B,H,W,3]`; what tells of change in time is 0."""
    return clip_features(np.repeat(stills[:, None], REPEATED, 1))
