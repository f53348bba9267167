"""From video files and captions to shards of latents and prompt embeddings.

The list is a file of JSON lines, {"video": "clips/0001.mp4", "caption": "..."}; paths are relative to it, `caption` may
be a list of phrasings, of the same length for every video. A video is resampled to the config's frame rate by taking
the nearest frame, cut to its first frames, scaled to cover the size and cropped in the middle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmd_ref.distill.config import Data
from tmd_ref.distill.data import DataError, encode_prompts, write_index, write_shard
from tmd_ref.distill.parallel import World, autocast
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE


@dataclass(frozen=True)
class Entry:
    """A line of the list."""

    video: Path
    captions: tuple[str, ...]


def read_list(path: Path) -> list[Entry]:
    """The videos of a list. Raises DataError naming the line."""
    entries = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # captions may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list of videos {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            captions = fields["caption"]
            captions = (captions,) if isinstance(captions, str) else tuple(captions)
            if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
                raise ValueError("an empty caption")
            entries.append(Entry(path.parent / fields["video"], captions))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}, line {number}: {error!r}; write {{"video": "file.mp4", "caption": "..."}}.'
            ) from error
    if not entries:
        raise DataError(f"{path} lists no video.")
    if len({len(entry.captions) for entry in entries}) > 1:
        raise DataError(f"{path}: every video needs the same number of captions.")
    return entries


def read_video(path: Path, frames: int, size: tuple[int, int], fps: float) -> Tensor:
    """The first `frames` frames at `fps`, float32 `[3,F,H,W]` in -1..1; `size` = (height, width).

    Raises DataError for a file that is no video, is too short, or is smaller than `size`.
    """
    import av

    height, width = size
    pictures: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            before: Tensor | None = None
            before_time = 0.0
            start: float | None = None
            for frame in container.decode(stream):
                time = float(frame.time if frame.time is not None else len(pictures) / fps)
                start = time if start is None else start
                picture = _fit(frame.to_ndarray(format="rgb24"), height, width, path)
                # every wanted moment up to this frame takes the nearer of the two frames around it
                while len(pictures) < frames and start + len(pictures) / fps <= time + 1e-6:
                    moment = start + len(pictures) / fps
                    nearer = picture if before is None or time - moment <= moment - before_time else before
                    pictures.append(nearer)
                if len(pictures) == frames:
                    break
                before, before_time = picture, time
    except (av.FFmpegError, IndexError, OSError) as error:
        raise DataError(f"{path} cannot be read as a video: {error}") from error
    if len(pictures) < frames:
        raise DataError(f"{path} has {len(pictures)} frames at {fps:g} per second, {frames} are needed")
    return torch.stack(pictures, 1)


def _fit(picture: np.ndarray, height: int, width: int, path: Path) -> Tensor:
    """uint8 `[H',W',3]` scaled to cover (height, width) and cropped in the middle, float32 `[3,H,W]` in -1..1."""
    if picture.shape[0] < height or picture.shape[1] < width:
        raise DataError(f"{path} is {picture.shape[1]}x{picture.shape[0]}, smaller than {width}x{height}")
    scale = max(height / picture.shape[0], width / picture.shape[1])
    covering = max(height, round(picture.shape[0] * scale)), max(width, round(picture.shape[1] * scale))
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    if covering != picture.shape[:2]:
        x = F.interpolate(x, covering, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return x[0, :, top : top + height, left : left + width] / 127.5 - 1


@torch.no_grad()
def encode_videos(
    entries: list[Entry], folder: Path, settings: Data, vae: WanVAE, encoder: UMT5Encoder, tokenizer: Tokenizer,
    world: World = World(), bf16: bool = False, report: Callable[[str], None] = print,  # noqa: B008
) -> int:  # fmt: skip
    """Encode videos and captions into shards of `settings.shard` videos, then write the index; returns the clips.

    Shards that are there are kept, so an interrupted run goes on; processes take shards in turn. Videos that cannot be
    used are left out, each with its reason in `skipped.jsonl`. Raises DataError if none can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    null = encode_prompts(encoder, tokenizer, [settings.negative_prompt])[0]
    skipped = 0
    for number, first in enumerate(range(0, len(entries), settings.shard)):
        path = folder / f"{number:06d}.safetensors"
        if number % world.size != world.rank or path.exists():
            continue
        latents, embeds = [], []
        for entry in entries[first : first + settings.shard]:
            try:
                video = read_video(entry.video, settings.frames, settings.size, settings.fps)
            except DataError as error:
                skipped += 1
                with open(folder / "skipped.jsonl", "a") as log:
                    log.write(json.dumps({"video": str(entry.video), "reason": str(error)}) + "\n")
                continue
            with autocast(world, bf16):
                latents.append(vae.encode(video[None].to(world.device))[0].float().cpu())
            embeds.append(encode_prompts(encoder, tokenizer, list(entry.captions)).float().cpu())
        if latents:
            write_shard(path, torch.stack(latents), torch.stack(embeds), null)
            report(f"{path.name}: {len(latents)} clips")
    world.wait()
    clips = write_index(folder, settings.model_dump(mode="json")) if world.first else 0
    world.wait()
    if skipped:
        report(f"{skipped} videos left out; reasons in {folder / 'skipped.jsonl'}")
    return clips
