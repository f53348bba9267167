"""What `tmd-distill evaluate --videos` leaves behind, with a model that is replaced by noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tmd_ref.distill import evaluate_videos
from tmd_ref.distill.config import Data
from tmd_ref.distill.evaluate import Row
from tmd_ref.distill.prepare import Entry

SHAPE = (3, 5, 32, 32)


class Identity:
    """A VAE whose latents are the video."""

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return video

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def test_no_clip_replaces_another_where_two_videos_have_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(evaluate_videos, "read_video", lambda *_: torch.rand(SHAPE, generator=generator) * 2 - 1)
    monkeypatch.setattr(evaluate_videos, "encode_prompts", lambda _, __, prompts: torch.zeros(len(prompts), 1, 1))
    row = Row("noise", 1.0, lambda embeds, rng: torch.rand(len(embeds), *SHAPE, generator=rng) * 2 - 1)
    long = "long " * 50
    entries = [Entry(tmp_path / f"{number}.mp4", (text,)) for number, text in enumerate(("a", "a", long + "x", long))]
    model: Any = Identity()
    settings = Data(frames=5, size=(32, 32), fps=8)
    evaluate_videos.measure_videos(
        [row], model, model, model, entries, settings, tmp_path, clips=2, report=lambda _: None
    )
    names = sorted(path.name for path in (tmp_path / "videos" / "noise").iterdir())
    cut = long[: evaluate_videos.PROMPT_BYTES]
    assert names == sorted(f"{prompt}-{index}.mp4" for prompt in ("a", cut) for index in range(4))


def test_the_distance_is_that_of_one_clip_of_each_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances compare at equal numbers of clips alone, and the videos are one for each caption."""
    generator = torch.Generator().manual_seed(0)
    videos = {f"{number}.mp4": torch.rand(SHAPE, generator=generator) * 2 - 1 for number in range(4)}
    monkeypatch.setattr(evaluate_videos, "read_video", lambda path, *_: videos[path.name])
    monkeypatch.setattr(evaluate_videos, "encode_prompts", lambda _, __, prompts: torch.zeros(len(prompts), 1, 1))
    row = Row("one", 1.0, lambda embeds, rng: torch.cat((torch.zeros(1, *SHAPE), torch.ones(len(embeds) - 1, *SHAPE))))
    entries = [Entry(tmp_path / name, (name,)) for name in videos]
    model: Any = Identity()
    found = [
        evaluate_videos.measure_videos(
            [row], model, model, model, entries, Data(frames=5, size=(32, 32), fps=8), tmp_path, clips=clips,
            report=lambda _: None,
        )["one"]["frechet"]
        for clips in (1, 3)
    ]  # fmt: skip
    assert found[0] == found[1] > 0
