"""What a picture or video is made of: embeddings of its prompt and of the negative one, or the number of a class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RuntimeFailure
from .embedding import TokenEmbedding
from .encoder import PromptEncoder

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
        """Embeddings of the prompt and, with guidance, of the negative prompt, encoded where they are not given, an
        empty one taken from the bundle where it lies there; of a model of classes their numbers, and that of none. What
        people should know is added to `warnings`. Raises as `PromptEncoder`.
        """
        if settings.label is not None:
            numbers = np.array([settings.label]), np.array([self._manifest.model.classes])
            return numbers[0], None if settings.passes == 1 else numbers[1]
        if settings.passes == 1:
            negative_embeds = None
        elif negative_embeds is None and self._negative is not None and self._negative[0] == settings.negative_prompt:
            negative_embeds = self._negative[1]
        negative, stored = settings.negative_prompt, self._manifest.text.null_embeds
        encodes = settings.passes == 2 and negative_embeds is None and (bool(negative) or stored is None)
        total = (prompt_embeds is None) + encodes
        if prompt_embeds is None:
            prompt_embeds, said = self.encoder(prompt, load_encoder, timings, total=total)
            warnings += said
        if encodes:
            negative_embeds, _ = self.encoder(negative, load_encoder, timings, total, total, allow_empty=True)
            self._negative = negative, negative_embeds
        elif settings.passes == 2 and negative_embeds is None:
            negative_embeds = self.null_embeds(prompt_embeds.shape[1])
        return prompt_embeds, negative_embeds

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
        """Both with as many rows as the longer one has, the other filled up with the empty prompt's.

        That is what the model's text encoder gives where a shorter prompt is padded. Without stored features, and for
        embeddings of another shape, both stay as they are.
        """
        shapes = [prompt_embeds.shape, (prompt_embeds if negative_embeds is None else negative_embeds).shape]
        alike = all(len(shape) == 3 and shape[::2] == (1, self._manifest.text.dim) for shape in shapes)
        if negative_embeds is None or not alike or shapes[0] == shapes[1]:
            return prompt_embeds, negative_embeds
        null = self.null_embeds(max(shape[1] for shape in shapes))
        if null is None:
            return prompt_embeds, negative_embeds
        given = (prompt_embeds, negative_embeds)
        positive, negative = (np.concatenate((embeds, null[:, embeds.shape[1] :]), axis=1) for embeds in given)
        return positive, negative

    def forget(self) -> None:
        """Lets go of the negative prompt."""
        self._negative = None
