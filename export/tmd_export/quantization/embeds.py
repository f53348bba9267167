"""Prompts to the features that the backbone reads, by the text encoder's graph as it stands in the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tmd_engines import Bundle
from tmd_engines.bundle.manifest import TextInfo
from tmd_engines.onnxruntime.engine import OnnxRuntimeEngine
from tmd_ref.text import Tokenizer

_NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def embed_prompts(
    bundle: Bundle, tokenizer: Path, prompts: Sequence[str], null_embeds: np.ndarray | None = None
) -> np.ndarray:
    """float32 `[len(prompts), text, text.dim]`: text.max_length rows, zero behind each prompt's end, or where prompts
    are not padded as many as the longest has, the others filled up with `null_embeds`. Raises EngineError."""
    text = bundle.manifest.text
    tokens = _plain(tokenizer, prompts, text) if text.tokenization == "plain" else _padded(tokenizer, prompts, text)
    longest = max(len(given["input_ids"][0]) for given in tokens)
    embeds = np.zeros((len(prompts), longest, text.dim), np.float32)
    if null_embeds is not None:
        embeds[:] = null_embeds[:longest]
    with OnnxRuntimeEngine(bundle, "text_encoder", "cpu", None, as_stored=True) as engine:
        for row, given in zip(embeds, tokens, strict=True):  # one at a time: an encoder's memory grows with the batch
            if text.embedding is not None:
                table = text.embedding
                stored = np.memmap(bundle.folder / table.file, _NUMPY[table.dtype], "r", shape=(table.rows, table.dim))
                given["token_embeds"] = stored[given["input_ids"]].astype(np.float32)
            inputs = {name: np.ascontiguousarray(given[name]) for name in engine.inputs}
            engine.run(inputs, {"prompt_embeds": row[None, : given["input_ids"].shape[1]]})
    return embeds


def _padded(tokenizer: Path, prompts: Sequence[str], text: TextInfo) -> list[dict[str, np.ndarray]]:
    ids, mask = Tokenizer(tokenizer, text.max_length)(prompts)
    return [{"input_ids": row[None], "attention_mask": of[None]} for row, of in zip(ids, mask, strict=True)]


def _plain(tokenizer: Path, prompts: Sequence[str], text: TextInfo) -> list[dict[str, np.ndarray]]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=tokenizer.read_bytes())
    before, behind = ([] if mark is None else [mark] for mark in (text.bos_id, text.eos_id))
    room = text.max_length - len(before) - len(behind)
    framed = ([*before, *model.encode(prompt)[:room], *behind] for prompt in prompts)
    return [{"input_ids": np.array([ids], np.int64)} for ids in framed]
