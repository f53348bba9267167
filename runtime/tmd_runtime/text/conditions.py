"""The condition of a run: embeddings of its prompt and of the negative prompt, or the number of a class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RuntimeFailure
from .embedding import TokenEmbedding
from .encoder import PromptEncoder
from .vocabulary import unknown_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tmd_engines import Bundle, Engine

    from ..clock import Timings
    from ..settings import Settings


class Conditions:
    """The conditions of a bundle's runs; remembers the latest negative prompt, which a file of prompts shares."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._manifest, self.encoder = bundle, bundle.manifest, PromptEncoder(bundle)
        self._negative: tuple[str, NDArray[np.float32]] | None = None
        self._negative_notes: list[str] = []

    def __call__(
        self,
        prompt: str,
        prompt_embeds: NDArray[Any] | None,
        negative_embeds: NDArray[Any] | None,
        settings: Settings,
        load_encoder: Callable[[], Engine],
        timings: Timings,
        warnings: list[str],
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Embeddings of the prompt and, with guidance, of the negative prompt.

        Embeddings that are None are encoded; those of an empty negative prompt come from the bundle if it stores them.
        A model of classes gets the numbers of its class and of no class. Adds to `warnings` what people should know.
        Raises as `PromptEncoder`.
        """
        guided = settings.passes == 2
        if settings.label is not None:
            no_class = np.array([self._manifest.family.classes(self._manifest.model)])
            return np.array([settings.label]), no_class if guided else None
        if not guided:
            negative_embeds = None
        elif negative_embeds is None and self._negative is not None and self._negative[0] == settings.negative_prompt:
            negative_embeds = self._negative[1]
            warnings += self._negative_notes
        encodes_negative = guided and negative_embeds is None and not self.stores_negative(settings)
        total = (prompt_embeds is None) + encodes_negative
        if prompt_embeds is None:
            prompt_embeds, notes = self.encoder(prompt, load_encoder, timings, total=total)
            warnings += notes
            warnings += unknown_words(prompt, self._manifest.draws)
        if encodes_negative:
            negative = settings.negative_prompt
            negative_embeds, notes = self.encoder(negative, load_encoder, timings, total, total, allow_empty=True)
            notes = [note.replace("the prompt is", "the negative prompt is") for note in notes]
            self._negative, self._negative_notes = (negative, negative_embeds), notes
            warnings += notes
        elif guided and negative_embeds is None:
            negative_embeds = self.null_embeds(prompt_embeds.shape[1])
        return prompt_embeds, negative_embeds

    def stores_negative(self, settings: Settings) -> bool:
        """Whether the negative prompt of a run needs no encoder: it is empty, and its embeddings are in the bundle."""
        return not settings.negative_prompt and self._manifest.text.null_embeds is not None

    def null_embeds(self, rows: int) -> NDArray[np.float32] | None:
        """The empty prompt's embeddings `[1, rows, E]` beside a prompt of as many; None if the bundle has none.

        Raises RuntimeFailure for more rows than a prompt can have.
        """
        table = self._manifest.text.null_embeds
        if table is None:
            return None
        if rows > table.rows:
            raise RuntimeFailure(
                f"the prompt has {rows} rows of embeddings, and this bundle reads at most {table.rows}."
            )
        return TokenEmbedding(self._bundle.folder, table)(np.arange(rows)[None])

    def same_length(
        self, prompt_embeds: NDArray[Any], negative_embeds: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Both with as many rows as the longer one has; the shorter one ends in rows of the empty prompt.

        The model's text encoder gives the same for a shorter prompt that is padded. Embeddings stay as they are if the
        bundle stores none of the empty prompt, or if their shape is another one.
        """
        shapes = [prompt_embeds.shape, (prompt_embeds if negative_embeds is None else negative_embeds).shape]
        alike = all(len(shape) == 3 and shape[::2] == (1, self._manifest.text.dim) for shape in shapes)
        if negative_embeds is None or not alike or shapes[0] == shapes[1]:
            return prompt_embeds, negative_embeds
        null = self.null_embeds(max(shape[1] for shape in shapes))
        if null is None:
            return prompt_embeds, negative_embeds
        positive, negative = (
            np.concatenate((embeds, null[:, embeds.shape[1] :]), axis=1) for embeds in (prompt_embeds, negative_embeds)
        )
        return positive, negative

    def forget(self) -> None:
        """Lets go of the negative prompt."""
        self._negative = None
