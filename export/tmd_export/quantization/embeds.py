"""Prompts to the features that the backbone reads, by the text encoder's graph as it stands in the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tmd_engines import Bundle
from tmd_engines.onnxruntime_engine import OnnxRuntimeEngine
from tmd_ref.text import Tokenizer

_NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def embed_prompts(bundle: Bundle, tokenizer: Path, prompts: Sequence[str]) -> np.ndarray:
    """float32 `[len(prompts), text.max_length, text.dim]`, zero behind each prompt's end. Raises EngineError."""
    text = bundle.manifest.text
    ids, mask = Tokenizer(tokenizer, text.max_length)(prompts)
    given = {"attention_mask": mask}
    if text.embedding is None:
        given["input_ids"] = ids
    else:
        table = text.embedding
        rows = np.memmap(bundle.folder / table.file, _NUMPY[table.dtype], "r", shape=(table.rows, table.dim))
        given["token_embeds"] = rows[ids].astype(np.float32)
    embeds = np.empty((len(prompts), text.max_length, text.dim), np.float32)
    with OnnxRuntimeEngine(bundle, "text_encoder", "cpu", None, as_stored=True) as engine:
        for row in range(len(prompts)):  # one at a time: a large encoder's memory grows with the batch
            inputs = {name: np.ascontiguousarray(given[name][row : row + 1]) for name in engine.inputs}
            engine.run(inputs, {"prompt_embeds": embeds[row : row + 1]})
    return embeds
