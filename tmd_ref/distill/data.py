"""Latents and prompt embeddings on disk: safetensors shards with an index, written once, drawn from at random.

A shard holds `latents` float16 `[n,16,T,h,w]`, normalised; `prompt_embeds` float16 `[n,P,S',E]`, P captions of each
clip, cut where all are zero; `null_embeds` `[S,E]`, the negative prompt's. `index.json` beside the shards lists them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tmd_ref.captions import caption, typed_caption
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.state import TrainingError
from tmd_ref.distill.vae import to_video
from tmd_ref.partial import write_whole
from tmd_ref.scenes import Scene, render, sample_scene
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE
from tmd_ref.wan import WanConfig, rope_tables

CLIP_FRAMES = 17  # of a rendered scene
PHRASINGS = 4  # captions per rendered clip, every other as somebody might type it
BATCH = 8  # clips encoded at a time; convolutions of batch 1 are several times slower
NEGATIVE_PROMPT = ""  # the built-in model's null condition: dropped prompts in training, negative one of guidance
INDEX = "index.json"
MADE = "made.json"  # what the shards beside it are made of, written before the first of them


class DataError(TrainingError):
    """Training data that cannot be used."""


@torch.no_grad()
def encode_prompts(encoder: UMT5Encoder, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Prompt embeddings `[len(prompts), S, E]`, zero after the last token, on the encoder's device."""
    device = next(encoder.parameters()).device
    input_ids, attention_mask = (torch.from_numpy(a).to(device) for a in tokenizer(prompts))
    return encoder(input_ids, attention_mask)


def channel_statistics(vae: WanVAE, seed: int, clips: int = 200, floor: float = 0.1) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over rendered clips, for the VAE's configuration.

    A channel that the VAE does not use has almost no spread; `floor` keeps the normalisation from blowing it up.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        batches = [np.stack([render(sample_scene(rng)) for _ in range(BATCH)]) for _ in range(clips // BATCH)]
        means = torch.cat([vae.posterior(to_video(batch))[0] for batch in batches])
    std, mean = torch.std_mean(means, dim=(0, 2, 3, 4))
    return mean.tolist(), std.clamp_min(floor).tolist()


def write_shard(path: Path, latents: Tensor, prompt_embeds: Tensor, null_embeds: Tensor, **made: str) -> None:
    """Write one shard, whole or not at all. latents `[n,16,T,h,w]`, prompt_embeds `[n,P,S,E]`, null_embeds `[S,E]`.

    Raises DataError if a number is not finite, TrainingError if the disk is full.
    """
    if not (latents.isfinite().all() and prompt_embeds.isfinite().all()):
        raise DataError(f"{path.name}: latents or prompt embeddings hold numbers that are not finite; nothing written.")
    used = int(prompt_embeds.abs().amax(dim=(0, 1, 3)).count_nonzero())  # zero after the last token
    tensors = {
        "latents": latents.half().cpu().contiguous(),
        "prompt_embeds": prompt_embeds[:, :, : max(1, used)].half().cpu().contiguous(),
        "null_embeds": null_embeds.half().cpu().contiguous(),
    }
    try:
        write_whole(path, save(tensors, metadata={"clips": str(len(latents)), **made}), sync=True)
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error}). The shards before it are intact: make room on the disk and run "
            "the same command again."
        ) from error


def claim(folder: Path, made: dict[str, Any], first: bool = True) -> None:
    """Settles that shards in `folder` are made of `made`, before any is written; the `first` process writes that down.

    Shards that are there are kept by who makes them, so they must be of the same. Raises DataError if they are not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = json.loads(json.dumps(made))
    if (folder / MADE).is_file():
        before = json.loads((folder / MADE).read_text())
        other = sorted(key for key in {*before, *made} if before.get(key) != made.get(key))
        if other:
            raise DataError(
                f"{folder} holds what was made with another {', another '.join(other)}: delete that folder, or take "
                "another one with --run."
            )
    elif any(folder.glob("*.safetensors")):
        raise DataError(f"{folder} holds shards, and nothing says what they were made of: delete that folder.")
    elif first:
        write_whole(folder / MADE, f"{json.dumps(made, indent=1)}\n".encode())


def write_index(folder: Path, made: dict[str, Any]) -> int:
    """Write `index.json` over the shards in `folder`; returns the number of clips. Raises DataError for none."""
    files = sorted(folder.glob("*.safetensors"))
    shards = [{"file": file.name, "clips": _Shard(file).clips} for file in files]
    if not shards:
        raise DataError(f"{folder} has no shard: nothing was prepared.")
    index = json.dumps({"format": 1, "made": made, "shards": shards}, indent=1) + "\n"
    write_whole(folder / INDEX, index.encode())
    return sum(shard["clips"] for shard in shards)


@torch.no_grad()
def render_shard(
    path: Path, vae: WanVAE, encoder: UMT5Encoder, tokenizer: Tokenizer, clips: int, seed: int, first: int = 0,
    report=print, frames: int = CLIP_FRAMES, negative_prompt: str = NEGATIVE_PROMPT,
) -> None:  # fmt: skip
    """Render training scenes number `first` to `first + clips`, encode pictures and captions, write one shard.

    `frames`: all of a clip, or 1 for its `still`.
    """
    draw = render if frames == CLIP_FRAMES else lambda scene: still(scene)[None]
    latents, embeds = [], []
    for start in range(first, first + clips, BATCH):
        rng = np.random.default_rng([seed, start])
        scenes = [sample_scene(rng) for _ in range(min(BATCH, first + clips - start))]
        latents.append(vae.encode(to_video(np.stack([draw(scene) for scene in scenes]))).half())
        captions = [(typed_caption if k % 2 else caption)(scene, rng) for scene in scenes for k in range(PHRASINGS)]
        embeds.append(encode_prompts(encoder, tokenizer, captions).unflatten(0, (len(scenes), PHRASINGS)).half())
        if (start - first) // BATCH % 50 == 49:
            report(f"{start + len(scenes)} clips encoded")
    null = encode_prompts(encoder, tokenizer, [negative_prompt])[0]
    made = {"seed": str(seed), "vae": json.dumps(asdict(vae.config))}
    write_shard(path, torch.cat(latents), torch.cat(embeds), null, **made)


def still(scene: Scene, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """The middle frame of a scene, uint8 `[H, W, 3]`."""
    return render(scene, CLIP_FRAMES, size)[CLIP_FRAMES // 2]


class _Shard:
    """One file, read clip by clip; opened when first used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            self.latents, self.prompts, self.null = (
                shapes[name] for name in ("latents", "prompt_embeds", "null_embeds")
            )
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing: the folder is incomplete. Run tmd-distill prepare again.") from error
        except Exception as error:  # safetensors has its own error for a damaged file
            raise DataError(
                f"{path} is no shard of latents ({error}). Delete it and run tmd-distill prepare."
            ) from error
        self.clips = self.latents[0]
        if not self.clips or self.prompts[0] != self.clips or not self.prompts[1]:
            raise DataError(
                f"{path} is empty or incomplete: {self.clips} clips, captions {self.prompts[:2]}. Delete it and run "
                "tmd-distill prepare again."
            )
        self._file: Any = None

    def read(self, name: str, index: int) -> Tensor:
        self._file = self._file or safe_open(self.path, "pt").__enter__()
        return self._file.get_slice(name)[index]

    def null_embeds(self) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor("null_embeds").float()


class LatentDataset:
    """Random access to shards: a folder with an index, or one shard alone. Nothing is held in memory."""

    def __init__(self, path: Path, expect: Sequence[int] | None = None) -> None:
        """`expect`: the latent size (T, h, w) of the run. Raises DataError for missing, empty or odd shards."""
        path = Path(path)
        if path.is_dir() and not (path / INDEX).is_file():
            raise DataError(f"{path} has no {INDEX}: tmd-distill prepare has not been run, or has not finished.")
        if not path.exists():
            raise DataError(f"there is no data at {path}: run tmd-distill prepare first.")
        if path.is_dir():
            listed = json.loads((path / INDEX).read_text())["shards"]
            self._shards = [_Shard(path / shard["file"]) for shard in listed]
        else:
            self._shards = [_Shard(path)]
        if not self._shards:
            raise DataError(f"{path / INDEX} lists no shard: run tmd-distill prepare again.")
        head = self._shards[0]
        self.shape = head.latents[1:]
        for shard in self._shards:
            if (shard.latents[1:], shard.null, shard.prompts[1]) != (self.shape, head.null, head.prompts[1]):
                raise DataError(
                    f"{shard.path} has latents {shard.latents[1:]}, {head.path} has {self.shape}: one size."
                )
        if expect is not None and tuple(expect) != self.shape[1:]:
            raise DataError(
                f"{path} holds latents of {self.shape[1:]} (frames, height, width), the config asks for {tuple(expect)}"
                ": another resolution. Change data.size and data.frames, or prepare the data again."
            )
        self._starts = np.cumsum([0, *(shard.clips for shard in self._shards)])
        self.null_embeds = head.null_embeds()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """A random clip and one of its captions for each sample: latents `[B,16,T,h,w]`, embeddings `[B,S,E]`."""
        clips = draws.integers(len(self)).tolist()
        phrasings = draws.integers(self._shards[0].prompts[1]).tolist()
        latents = torch.stack([self.latents(clip) for clip in clips])
        embeds = torch.stack([self.embeds(clip, k) for clip, k in zip(clips, phrasings, strict=True)])
        return latents.to(draws.device), embeds.to(draws.device)

    def latents(self, clip: int) -> Tensor:
        """One clip, float32 `[16,T,h,w]`."""
        shard, index = self._find(clip)
        return shard.read("latents", index).float()

    def embeds(self, clip: int, phrasing: int = 0) -> Tensor:
        """The embedding of one of its captions, float32 `[S,E]`."""
        shard, index = self._find(clip)
        stored = shard.read("prompt_embeds", index)[phrasing].float()
        return torch.nn.functional.pad(stored, (0, 0, 0, self.null_embeds.shape[0] - stored.shape[0]))

    def rope(self, config: WanConfig, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Rope tables for the size of these latents."""
        frames, height, width = self.shape[1:]
        _, ph, pw = config.patch_size
        return rope_tables(frames, height // ph, width // pw, config.head_dim, device)

    def _find(self, clip: int) -> tuple[_Shard, int]:
        number = int(np.searchsorted(self._starts, clip, side="right")) - 1
        return self._shards[number], clip - int(self._starts[number])
