"""Training of a small UMT5 encoder and its sentencepiece vocabulary on the captions of rendered scenes.

Wan's text encoder is given; this makes the built-in model's. Every output token must tell every attribute of the scene
through one linear map per attribute, also those that a caption leaves out: features that are that plain are easy to
attend to for a small transformer. Letters lose their case in the vocabulary, so it makes no difference to the model.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.captions import caption, default, typed_caption
from tmd_ref.distill.trainer import Loss
from tmd_ref.partial import write_whole
from tmd_ref.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, SPEEDS, Scene, sample_scene
from tmd_ref.text import EOS_ID, PAD_ID, Tokenizer
from tmd_ref.umt5 import UMT5Encoder

BATCH = 128  # captions of a step
ATTRIBUTES = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "background": tuple(BACKGROUNDS),
    "motion": MOTIONS,
    "size": tuple(SIZES),
    "speed": tuple(SPEEDS),
}


def train_tokenizer(path: Path, vocab_size: int, seed: int, captions: int = 20000) -> None:
    """Write a sentencepiece model with T5's special ids, learnt from captions; unknown characters become bytes."""
    import sentencepiece

    rng = np.random.default_rng(seed)
    sentences = [text for _ in range(captions // BATCH + 1) for text in draw_captions(rng, BATCH)[1]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        hard_vocab_limit=False, byte_fallback=True, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=2, bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    write_whole(path, model.getvalue())


def draw_captions(rng: np.random.Generator, count: int) -> tuple[list[Scene], list[str]]:
    """Training scenes and a caption of each: one in four plain, the others as people type them.

    In half of the latter each part is, at even odds, what a silent caption means.
    """
    scenes = [sample_scene(rng) for _ in range(count)]
    captions = []
    for k, scene in enumerate(scenes):
        if k % 4 == 0:
            captions.append(caption(scene, rng))
            continue
        if k % 2:
            scenes[k] = scene = _with_defaults(scene, rng)
        captions.append(typed_caption(scene, rng))
    return scenes, captions


def _with_defaults(scene: Scene, rng: np.random.Generator) -> Scene:
    motion = default("motion", scene.motion) if rng.random() < 0.5 else scene.motion
    scene = replace(scene, motion=motion)
    unsaid = [name for name in ATTRIBUTES if name != "motion" and rng.random() < 0.5]
    values: dict[str, Any] = {name: default(name, motion) for name in unsaid}
    scene = replace(scene, **values)
    return replace(scene, shape="star") if (scene.shape, motion) == ("circle", "spinning") else scene


class SceneReader(nn.Module):
    """The encoder with one linear classifier per attribute; the classifiers are thrown away after training."""

    def __init__(self, encoder: UMT5Encoder):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({k: nn.Linear(encoder.config.dim, len(v)) for k, v in ATTRIBUTES.items()})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Logits of each attribute for each token, `[B, S, values]`."""
        features = self.encoder(input_ids, attention_mask)
        return {name: head(features) for name, head in self.heads.items()}


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Index of each scene's value of each attribute, int64 `[B]`."""
    return {k: torch.tensor([v.index(getattr(s, k)) for s in scenes]) for k, v in ATTRIBUTES.items()}


def text_loss(reader: SceneReader, tokenizer: Tokenizer, seed: int, batch: int = BATCH) -> Loss:
    """Cross-entropy of all attributes, averaged over the real tokens of each caption."""

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng([seed, step])
        scenes, captions = draw_captions(rng, batch)
        input_ids, mask = (torch.from_numpy(a) for a in tokenizer(captions))
        total = torch.zeros(())
        wrong = torch.zeros(())
        real = mask.bool()
        for name, logits in reader(input_ids, mask).items():
            target = labels(scenes)[name][:, None].expand(mask.shape)[real]
            total = total + F.cross_entropy(logits[real], target)
            wrong = wrong + (logits[real].argmax(-1) != target).float().mean() / len(ATTRIBUTES)
        return total, {"wrong": wrong}

    return loss
