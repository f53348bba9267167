"""What every family says of itself, and the defaults that most share.

Two graph names are slots that a family fills: `backbone` is what is computed once for several calls of `flow_head`.
In a TMD student that is once per outer step, and `flow_head` is an inner step; in a Wan transformer without inner flow
`flow_head` is the rest of the same step; in a Transition Model `backbone` is what depends on the prompt alone, and
`flow_head` is one whole step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..sections import ModelInfo, SamplerInfo
from .signature import AUTOENCODER, TEXT_ENCODER, Signature, check_interfaces, geometry

if TYPE_CHECKING:
    from ..manifest import Manifest


class Calls(NamedTuple):
    """A run in numbers: how often each of the two graphs runs, on how many `rows` at once."""

    backbone: int
    flow_head: int
    rows: int = 1


class Family(ABC):
    """One family of models. `model` and `sampler` are the types of these sections of its manifest."""

    name: str
    model: type[ModelInfo] = ModelInfo
    sampler: type[SamplerInfo]
    makes_stills = False  # one frame, whose autoencoder works in tiles
    keeps_prompt_length = False  # prompts may be unpadded, with stored features of the empty one
    graphs: Mapping[str, Signature]  # of the denoiser

    def check(self, manifest: Manifest) -> None:
        """Raises ValueError for parts that contradict each other, graph interfaces included."""
        if not self.keeps_prompt_length and (
            manifest.text.tokenization != "wan" or manifest.text.null_embeds is not None
        ):
            raise ValueError(f"text.tokenization 'plain' and text.null_embeds are not for family '{self.name}'")
        check_interfaces(manifest, self.signatures, self.geometry(manifest), self.flags(manifest))

    @property
    def signatures(self) -> dict[str, Signature]:
        """Of every graph that a bundle of the family may hold."""
        return {"text_encoder": TEXT_ENCODER, **AUTOENCODER, **self.graphs}

    def geometry(self, manifest: Manifest) -> dict[str, int]:
        """The numbers that shapes in `signatures` are made of."""
        return geometry(manifest)

    def flags(self, manifest: Manifest) -> set[str]:
        """Which of the tensors with a `when` there are."""
        classes = self.classes(manifest.model) is not None
        padded = manifest.text.tokenization == "wan"
        table = manifest.text.embedding is not None
        return {"classes" if classes else "prompt", "table" if table else "ids"} | ({"padded"} if padded else set())

    def classes(self, model: Any) -> int | None:
        """How many numbered classes the model draws in place of a prompt; None: it takes a prompt."""
        return None

    def attentions_per_block(self, model: Any) -> int:
        """One among the latents, and one to the prompt of a model that takes it."""
        return 2 if self.classes(model) is None else 1

    def inner_steps(self, sampler: Any) -> int | None:
        """The default number of inner steps; None: the family has none."""
        return None

    def passes(self, sampler: Any) -> int:
        """Evaluations per step by default: 2 with guidance."""
        return 1 if sampler.guidance == 1 else 2

    def rows(self, sampler: Any) -> tuple[int, ...]:
        """Batch sizes that a run by default binds the denoiser for."""
        return (1,)

    @abstractmethod
    def calls(self, steps: int, inner_steps: int, passes: int) -> Calls:
        """What a run of so many steps, with so many passes each, asks of the two graphs."""

    def nfe(self, model: Any, steps: int, inner_steps: int, passes: int) -> float:
        """Evaluations of the whole model, M·(1 + (N - 1)·H/L) per pass  (TMD Eq. 16)."""
        return passes * steps * (1 + (inner_steps - 1) * model.head_blocks / model.num_layers)

    def describe_model(self, model: Any) -> str:
        """How the network is divided, for people."""
        return f"{model.num_layers} blocks, {model.head_blocks} of them flow head"

    @abstractmethod
    def describe(self, sampler: Any) -> str:
        """The sampler in a line for people."""


def listed(values: tuple[int, ...] | None) -> str:
    """Allowed counts for people."""
    return "/".join(map(str, values)) if values else "any number"
