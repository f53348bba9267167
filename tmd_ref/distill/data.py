"""Latents and captions on disk: clips are rendered and encoded once, then drawn at random."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tmd_ref.distill.vae import to_video
from tmd_ref.scenes import caption, render, sample_scene
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE
from tmd_ref.wan import WanConfig, rope_tables

PHRASINGS = 4  # captions per clip
BATCH = 8  # clips encoded at a time; convolutions of batch 1 are several times slower
NEGATIVE_PROMPT = ""  # the null condition: dropped prompts in training, the negative one of guidance


@torch.no_grad()
def encode_prompts(encoder: UMT5Encoder, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Prompt embeddings `[len(prompts), S, E]`, zero after the last token."""
    input_ids, attention_mask = (torch.from_numpy(a) for a in tokenizer(prompts))
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


@torch.no_grad()
def prepare(
    path: Path, vae: WanVAE, encoder: UMT5Encoder, tokenizer: Tokenizer, clips: int, seed: int, report=print
) -> None:
    """Render `clips` training scenes, encode pictures and captions, write one safetensors shard.

    latents float16 `[clips,16,5,8,8]`, normalised; prompt_embeds float16 `[clips,PHRASINGS,S,E]`; null_embeds `[S,E]`.
    """
    latents, embeds = [], []
    for first in range(0, clips, BATCH):
        rng = np.random.default_rng([seed, first])
        scenes = [sample_scene(rng) for _ in range(min(BATCH, clips - first))]
        latents.append(vae.encode(to_video(np.stack([render(scene) for scene in scenes]))).half())
        captions = [caption(scene, rng) for scene in scenes for _ in range(PHRASINGS)]
        embeds.append(encode_prompts(encoder, tokenizer, captions).unflatten(0, (len(scenes), PHRASINGS)).half())
        if first // BATCH % 50 == 49:
            report(f"{first + len(scenes)}/{clips} clips encoded")
    shard = {
        "latents": torch.cat(latents),
        "prompt_embeds": torch.cat(embeds),
        "null_embeds": encode_prompts(encoder, tokenizer, [NEGATIVE_PROMPT])[0].half(),
    }
    partial = path.with_suffix(".partial")
    save_file(shard, partial, metadata={"clips": str(clips), "seed": str(seed), "vae": json.dumps(asdict(vae.config))})
    partial.replace(path)


class LatentDataset:
    """Random access to a shard written by `prepare`; everything is kept in memory."""

    def __init__(self, path: Path):
        shard = load_file(path)
        self.latents = shard["latents"]
        self.prompt_embeds = shard["prompt_embeds"]
        self.null_embeds = shard["null_embeds"].float()

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` random clips: latents `[B,16,T,h,w]` and one caption's embedding each `[B,S,E]`, float32."""
        index = torch.randint(len(self.latents), (count,), generator=generator)
        phrasing = torch.randint(self.prompt_embeds.shape[1], (count,), generator=generator)
        return self.latents[index].float(), self.prompt_embeds[index, phrasing].float()

    def rope(self, config: WanConfig) -> tuple[Tensor, Tensor]:
        """Rope tables for the size of these latents."""
        frames, height, width = self.latents.shape[2:]
        return rope_tables(frames, height // config.patch_size[1], width // config.patch_size[2], config.head_dim)
