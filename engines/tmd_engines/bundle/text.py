"""The prompt's side of a manifest: how its text becomes tokens, and tables of features beside the graphs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from .fields import Count, FileName, Part, Text

Word = Annotated[str, StringConstraints(pattern=r"^[a-z0-9']{1,64}$")]
TokenId = Annotated[int, Field(ge=0, le=1 << 24)]


class EmbeddingTable(Part):
    """A table kept outside the graphs: `rows` x `dim` values in `file`, little-endian, row after row."""

    file: FileName
    dtype: Literal["float32", "float16", "bfloat16"]
    rows: Annotated[int, Field(ge=1, le=1 << 24)]
    dim: Count

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.rows * self.dim * (4 if self.dtype == "float32" else 2)


class DrawsInfo(Part):
    """What a model of few words draws. A prompt with words that it does not know gets a note that says so.

    `words`: all that it knows, in lower case, ascending. `description`: what it shows, as half a sentence. `example`: a
    prompt of that kind.
    """

    words: Annotated[tuple[Word, ...], Field(min_length=1, max_length=4096)]
    description: Text
    example: Text

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.words) != sorted(set(self.words)):
            raise ValueError("words must be ascending without repeats")
        return self


class TextInfo(Part):
    """Prompt side: sentencepiece `tokenizer` file (null: none here), `max_length` in tokens, embedding `dim`.

    `tokenization` "wan": the text is cleaned, its tokens end with `eos_id` and are padded with `pad_id`. "plain": the
    text as it is, `bos_id` before it and `eos_id` behind it where they are given, no padding. With an `embedding`, the
    graph `text_encoder` takes `token_embeds` (rows of that table) in place of `input_ids`. `null_embeds` are features
    of the empty prompt, one row per token: as many of the first as a prompt has go beside it.
    """

    tokenizer: FileName | None = None
    max_length: Annotated[int, Field(ge=1, le=65_536)]
    dim: Count
    pad_id: TokenId
    eos_id: TokenId | None
    bos_id: TokenId | None = None
    tokenization: Literal["wan", "plain"] = "wan"
    embedding: EmbeddingTable | None = None
    null_embeds: EmbeddingTable | None = None

    @property
    def tables(self) -> dict[str, EmbeddingTable]:
        """Field -> table, of those that there are."""
        named = {"embedding": self.embedding, "null_embeds": self.null_embeds}
        return {name: table for name, table in named.items() if table is not None}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tokenization == "wan" and (self.eos_id is None or self.bos_id is not None):
            raise ValueError("tokenization 'wan' has an eos_id and no bos_id")
        ids = [token for token in (self.pad_id, self.eos_id, self.bos_id) if token is not None]
        if len(ids) > self.max_length + 1:
            raise ValueError(f"max_length {self.max_length} has no room for bos_id and eos_id")
        if self.embedding is not None and max(ids) >= self.embedding.rows:
            raise ValueError(f"pad_id, eos_id and bos_id ({', '.join(map(str, ids))}) must be rows of embedding")
        null = self.null_embeds
        if null is not None and (null.rows, null.dim) != (self.max_length, self.dim):
            raise ValueError(
                f"null_embeds has {null.rows} x {null.dim} values, and max_length x dim are {self.max_length} x "
                f"{self.dim}"
            )
        return self
