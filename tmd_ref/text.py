"""Prompts to token ids: the cleaning and the tokenizer that Wan2.1 puts before UMT5. Needs sentencepiece, not torch."""

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PAD_ID = 0
EOS_ID = 1


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice), collapse white space. Letters and punctuation stay."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """A sentencepiece model with T5's framing: `</s>` (id 1) after the text, padding (id 0) up to `max_length`.

    Text that looks like a special token ("</s>") is text here; Hugging Face's tokenizers would turn it into the token.
    A sentencepiece model may offer its bytes for a character that it lacks. Wan was trained behind Hugging Face's
    tokenizer for T5, which has no such fallback, so they become the unknown token here.
    """

    def __init__(self, model_file: str | os.PathLike[str], max_length: int) -> None:
        """Raises FileNotFoundError if there is no such file, ValueError if it does not use T5's special ids."""
        from sentencepiece import SentencePieceProcessor

        if not Path(model_file).is_file():
            raise FileNotFoundError(
                f"there is no tokenizer at {os.fspath(model_file)}: give the sentencepiece file, "
                "called spiece.model or tokenizer.model."
            )
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: it must hold at least the end token, so be 1 or more.")
        self.max_length = max_length
        try:
            self._model = SentencePieceProcessor(model_file=os.fspath(model_file))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{os.fspath(model_file)} is not a sentencepiece model: copy or make it again.") from error
        found = (self._model.pad_id(), self._model.eos_id())
        if found != (PAD_ID, EOS_ID):
            raise ValueError(
                f"{os.fspath(model_file)} has padding id {found[0]} and end id {found[1]}, UMT5 has {PAD_ID} and "
                f"{EOS_ID}: this is the tokenizer of another model."
            )

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of cleaned prompts. Prompts that are too long lose their end; the end token stays.

        Returns input_ids and attention_mask (1 text, 0 padding), both int64 `[len(prompts), max_length]`.
        """
        input_ids = np.full((len(prompts), self.max_length), PAD_ID, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            ids = [*self._known(self._model.encode(clean_prompt(prompt)))[: self.max_length - 1], EOS_ID]
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask

    def _known(self, ids: Sequence[int]) -> list[int]:
        """`ids` with each run of bytes as one unknown token, as a run of unknown characters is one."""
        unknown = self._model.unk_id()
        known = [unknown if self._model.is_byte(token) else token for token in ids]
        return [token for k, token in enumerate(known) if token != unknown or k == 0 or known[k - 1] != unknown]
