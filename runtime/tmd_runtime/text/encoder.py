"""Prompt -> embeddings: tokenizer, then the embedding table if the bundle has one outside the graph, then the graph."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..clock import Timings, check_finite
from ..errors import RuntimeFailure
from .embedding import TokenEmbedding
from .tokenizer import Tokenizer, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tmd_engines import Bundle, Engine

EMBEDS_INSTEAD = "Give it embeddings that another bundle of the model made (--embeds FILE). "


class PromptEncoder:
    """The text stage of a bundle; reads the tokenizer when a prompt first comes."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._tokenizer: Tokenizer | None = None
        self._bound: tuple[int, tuple[int, ...]] | None = None

    def __call__(
        self,
        prompt: str,
        load_encoder: Callable[[], Engine],
        timings: Timings,
        done: int = 1,
        total: int = 1,
        allow_empty: bool = False,
    ) -> tuple[NDArray[np.float32], list[str]]:
        """Embeddings float32 `[1, text, E]` of a prompt, which is `done` of `total`, and warnings for people.

        `load_encoder` gives the engine of the graph when the tokens are there. Raises UsageFailure for an empty prompt
        unless `allow_empty`, RuntimeFailure if the bundle cannot read prompts or the encoder gives NaN or Inf.
        """
        text = self._bundle.manifest.text
        tokens = self.tokens(prompt, timings, allow_empty)
        encoder = load_encoder()
        start = perf_counter()
        prompt_embeds = encoder.empty("prompt_embeds", batch=1, text=tokens.input_ids.shape[1])
        inputs: dict[str, NDArray[Any]] = {}
        if "attention_mask" in encoder.inputs:  # a causal encoder of a prompt without padding has none
            inputs["attention_mask"] = tokens.attention_mask
        if text.embedding is None:
            inputs["input_ids"] = tokens.input_ids
        else:
            inputs["token_embeds"] = TokenEmbedding(self._bundle.folder, text.embedding)(tokens.input_ids)
        binding = perf_counter()
        step = encoder.bind(inputs, {"prompt_embeds": prompt_embeds})
        if self._bound != (id(encoder), prompt_embeds.shape):  # an engine may compile where it is bound
            self._bound = id(encoder), prompt_embeds.shape
            took = perf_counter() - binding
            timings.add("load", took)
            start += took
        step()
        prompt_embeds = np.asarray(prompt_embeds)  # it may lie on a device
        check_finite("text", prompt_embeds)
        seconds = perf_counter() - start
        timings.add("text", seconds)
        timings.report("text", done, total, seconds)
        return prompt_embeds, [tokens.warning] if tokens.warning else []

    def tokens(self, prompt: str, timings: Timings, allow_empty: bool = False) -> Tokens:
        """The tokens of a prompt, without any graph. Raises as a call."""
        text = self._bundle.manifest.text
        if self._tokenizer is None:
            if text.tokenizer is None:
                raise RuntimeFailure(
                    f"this bundle has no tokenizer, so it cannot read a prompt. {EMBEDS_INSTEAD}"
                    "Export it again with text_encoder among --parts."
                )
            with timings.stage("load"):
                self._tokenizer = Tokenizer(
                    self._bundle.folder / text.tokenizer,
                    text.max_length,
                    text.pad_id,
                    text.eos_id,
                    text.bos_id,
                    plain=text.tokenization == "plain",
                    content=self._bundle.read_tokenizer(),
                )
        with timings.stage("text"):
            return self._tokenizer(prompt, allow_empty)
