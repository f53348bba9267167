"""What a model makes of the captions of real videos: a Fréchet distance to those videos, and files for VBench.

The distance is that of `frechet.py`, a stand-in for FVD, whose network is a download: compare rows of one table, never
with published FVD. Clips are written as VBench reads them, `PROMPT-INDEX.mp4` in a folder per row.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from tmd_ref.distill.config import Data
from tmd_ref.distill.data import DataError, encode_prompts
from tmd_ref.distill.evaluate import Row, contact_sheet, write_png
from tmd_ref.distill.frechet import clip_features, frechet_distance
from tmd_ref.distill.prepare import Entry, read_video
from tmd_ref.distill.vae import to_frames
from tmd_ref.partial import write_whole
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE

PROMPT_BYTES = 180
"""Of a file's name, which file systems limit; VBench's own prompts are shorter."""


@torch.no_grad()
def measure_videos(
    rows: Sequence[Row], vae: WanVAE, encoder: UMT5Encoder, tokenizer: Tokenizer, entries: Sequence[Entry],
    settings: Data, out: Path, *, clips: int = 1, seed: int = 7, report: Callable[[str], None] = print,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Samples each row `clips` times for the first caption of every video; the first row is the autoencoder's.

    Writes `evaluation.json`, `evaluation.png` and `videos/ROW/PROMPT-INDEX.mp4` into `out`. Returns by row: `nfe`,
    `frechet` and `seconds` per clip. Raises DataError if a video cannot be read or there are fewer than two.
    """
    if len(entries) < 2:
        raise DataError(f"{len(entries)} video is too few to compare with: list at least 2.")
    real = [read_video(entry.video, settings.frames, settings.size, settings.fps) for entry in entries]
    reference = clip_features(to_frames(torch.stack(real)))
    scale = reference.std(0) + 1e-6
    results: dict[str, dict[str, float]] = {}
    sheet = [to_frames(torch.stack(real[:12]))]
    for row in (None, *rows):
        name = "autoencoder" if row is None else row.name
        generator = torch.Generator().manual_seed(seed)
        made, began = [], time.monotonic()
        for entry, video in zip(entries, real, strict=True):
            if row is None:
                latents = vae.encode(video[None].to(device))
            else:
                embeds = encode_prompts(encoder, tokenizer, [entry.captions[0]] * clips)
                latents = row.sample(embeds, generator)
            made.append(to_frames(torch.cat([vae.decode(one[None]) for one in latents])))
        seconds = (time.monotonic() - began) / sum(map(len, made))
        sheet.append(np.stack([one[0] for one in made[:12]]))
        written: Counter[str] = Counter()  # two videos may have one caption
        for entry, videos in zip(entries, made, strict=True):
            prompt = file_name(entry.captions[0])
            for video in videos if row is not None else ():
                folder = out / "videos" / re.sub(r"[^\w=.-]+", "-", name)
                folder.mkdir(parents=True, exist_ok=True)
                write_mp4(folder / f"{prompt}-{written[prompt]}.mp4", video, settings.fps)
                written[prompt] += 1
        # One clip of each caption, whatever `clips`: distances compare at equal numbers alone.
        features = clip_features(np.concatenate([videos[:1] for videos in made]))
        distance = frechet_distance(features / scale, reference / scale)
        results[name] = {"nfe": 0.0 if row is None else row.nfe, "frechet": distance, "seconds": seconds}
        report(f"{name}: {json.dumps({key: round(value, 3) for key, value in results[name].items()})}")
    about = {"videos": len(entries), "clips": clips, "seed": seed, "rows": results}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "evaluation.json", f"{json.dumps(about, indent=1)}\n".encode())
    write_png(out / "evaluation.png", contact_sheet(sheet))
    return results


def file_name(prompt: str) -> str:
    """A prompt as VBench expects it in a file's name, without what no file system takes."""
    safe = re.sub(r"[/\\\0-\x1f]", " ", prompt).strip()
    return safe.encode()[:PROMPT_BYTES].decode(errors="ignore")


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """uint8 `[F,H,W,3]` as H.264."""
    from fractions import Fraction
    from io import BytesIO

    import av

    content = BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "14"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    write_whole(path, content.getvalue())
