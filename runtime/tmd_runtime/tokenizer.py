"""Prompt text -> token ids, as Wan's UMT5 saw them in training.

Not a general tokenizer: a cleaning rule, one sentencepiece model from the bundle, and the framing `ids... </s> pad...`.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import RuntimeFailure, UsageFailure


def clean_prompt(text: str) -> str:
    """Wan's prompt cleaning: repair broken Unicode, undo HTML escapes (twice: they come nested), collapse white space.

    Case and punctuation stay. Never fails: what cannot be encoded (lone surrogates) becomes '?'.
    """
    import ftfy

    text = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


@dataclass(frozen=True)
class Tokens:
    """One prompt: `input_ids` and `attention_mask`, int64 `[1, max_length]`; `dropped` tokens did not fit."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    dropped: int

    @property
    def warning(self) -> str | None:
        """What the user should know about this prompt, in one sentence, or None."""
        if not self.dropped:
            return None
        kept = self.input_ids.shape[1] - 1
        return (
            f"the prompt is too long: its last {self.dropped} of {kept + self.dropped} tokens are ignored. Shorten it."
        )


class Tokenizer:
    """Sentencepiece model of a bundle; `max_length` counts the end mark. Raises RuntimeFailure for any other file."""

    def __init__(self, model_file: Path, max_length: int, pad_id: int = 0, eos_id: int = 1) -> None:
        import ftfy  # noqa: F401  (slow to import: part of loading, not of the first prompt)
        import sentencepiece

        self.max_length, self.pad_id, self.eos_id = max_length, pad_id, eos_id
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            # Handed over as bytes: sentencepiece opens files by a narrow path, which fails for non-ASCII folders on
            # some systems.
            self._model.LoadFromSerializedProto(Path(model_file).read_bytes())
        except (OSError, RuntimeError) as error:
            raise RuntimeFailure(
                f"{model_file} is no readable sentencepiece model ({error}). Copy the bundle again, or export it anew."
            ) from error

    def __call__(self, prompt: str, allow_empty: bool = False) -> Tokens:
        """Clean and tokenize a prompt; unknown words become unknown tokens.

        Raises UsageFailure if nothing is left, unless `allow_empty`: as a negative prompt, nothing means the end mark.
        """
        ids = self._known(self._model.encode(clean_prompt(prompt)))
        if not ids and not allow_empty:
            raise UsageFailure("the prompt is empty: describe the video in a few words.")
        kept = ids[: self.max_length - 1]
        input_ids = np.full((1, self.max_length), self.pad_id, np.int64)
        input_ids[0, : len(kept)] = kept
        input_ids[0, len(kept)] = self.eos_id
        attention_mask = np.zeros_like(input_ids)
        attention_mask[0, : len(kept) + 1] = 1
        return Tokens(input_ids, attention_mask, dropped=len(ids) - len(kept))

    def _known(self, ids: list[int]) -> list[int]:
        """`ids` with each run of bytes as one unknown token: the tokenizer of Wan's training fell back to no bytes."""
        unknown = self._model.unk_id()
        known = [unknown if self._model.is_byte(token) else token for token in ids]
        return [token for k, token in enumerate(known) if token != unknown or k == 0 or known[k - 1] != unknown]
