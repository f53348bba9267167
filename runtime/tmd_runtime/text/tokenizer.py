"""Prompt text -> token ids, as the bundle's text encoder saw them in training.

Not a general tokenizer: one sentencepiece model from the bundle and two ways around it. As Wan's UMT5 has it, a text is
cleaned and framed as `ids... </s> pad...`; as Gemma has it ("plain"), it stays as it is and becomes `<bos> ids...`.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import RuntimeFailure, UsageFailure
from .charsmap import has_sound_charsmaps


def clean_prompt(text: str) -> str:
    """Wan's prompt cleaning: repair broken Unicode, undo HTML escapes (twice: they come nested), collapse white space.

    Case and punctuation stay. Never fails: what cannot be encoded (lone surrogates) becomes '?'.
    """
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair, and ftfy is slow to import
        return " ".join(text.split())
    import ftfy

    text = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


@dataclass(frozen=True)
class Tokens:
    """One prompt: `input_ids` and `attention_mask`, int64 `[1, S]`; of its text `kept` tokens are among them, and
    `dropped` did not fit."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    kept: int
    dropped: int

    @property
    def warning(self) -> str | None:
        """What the user should know about this prompt, in one sentence, or None."""
        if not self.dropped:
            return None
        total = self.kept + self.dropped
        return f"the prompt is too long: its last {self.dropped} of {total} tokens are ignored. Shorten it."


class Tokenizer:
    """Sentencepiece model of a bundle; `max_length` counts the marks too. Raises RuntimeFailure for any other file.

    `plain`: no cleaning, no padding, and what the model has no word for becomes bytes. `content` is what was read of
    the file, where that has been done.
    """

    def __init__(
        self,
        model_file: Path,
        max_length: int,
        pad_id: int = 0,
        eos_id: int | None = 1,
        bos_id: int | None = None,
        plain: bool = False,
        content: bytes | None = None,
    ) -> None:
        import sentencepiece

        self.max_length, self.pad_id, self.plain = max_length, pad_id, plain
        self._before, self._behind = ([] if mark is None else [mark] for mark in (bos_id, eos_id))
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            # Handed over as bytes: sentencepiece opens files by a narrow path, which fails for non-ASCII folders on
            # some systems.
            content = Path(model_file).read_bytes() if content is None else content
            if not has_sound_charsmaps(content):
                raise RuntimeError("its character map points out of itself")
            self._model.LoadFromSerializedProto(content)
        except (OSError, RuntimeError) as error:
            raise RuntimeFailure(
                f"{model_file} is no readable sentencepiece model ({error}). Copy the bundle again, or export it anew."
            ) from error

    def __call__(self, prompt: str, allow_empty: bool = False) -> Tokens:
        """Tokens of a prompt: `[1, max_length]`, of a plain one as many as it has.

        Raises UsageFailure if there is no text, unless `allow_empty`: as a negative prompt, nothing means the marks.
        """
        text = prompt.encode("utf-8", "replace").decode("utf-8") if self.plain else clean_prompt(prompt)
        ids = self._model.encode(text) if self.plain else self._known(self._model.encode(text))
        if not (ids and text.strip()) and not allow_empty:
            raise UsageFailure("the prompt is empty: describe the video in a few words.")
        kept = ids[: self.max_length - len(self._before) - len(self._behind)]
        framed = [*self._before, *kept, *self._behind]
        length = len(framed) if self.plain else self.max_length
        input_ids = np.full((1, length), self.pad_id, np.int64)
        input_ids[0, : len(framed)] = framed
        attention_mask = np.zeros_like(input_ids)
        attention_mask[0, : len(framed)] = 1
        return Tokens(input_ids, attention_mask, kept=len(kept), dropped=len(ids) - len(kept))

    def _known(self, ids: list[int]) -> list[int]:
        """`ids` with each run of bytes as one unknown token: the tokenizer of Wan's training fell back to no bytes."""
        unknown = self._model.unk_id()
        known = [unknown if self._model.is_byte(token) else token for token in ids]
        return [token for k, token in enumerate(known) if token != unknown or k == 0 or known[k - 1] != unknown]
