"""What every family brings to an export, and the defaults that most share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..presets import Preset

if TYPE_CHECKING:
    import numpy as np

    from ..graphs.graph import Graph, Interface
    from ..sources.source import Source

    Arrays = dict[str, np.ndarray]
    Builder = Callable[[Any, Interface], Graph]


GRIDS = ("wan", "diffusers")
"""Whose time grid a model of any number of steps is sampled on."""


@dataclass(frozen=True)
class Request:
    """What the command line names: a model (None: its tensors say which) and where its weights are. Without
    `checkpoints` and `seed`: the weights that come with the package. `decoder` and `text_encoder` are weights of other
    people's models."""

    model: str | None
    checkpoints: tuple[Path, ...] = ()
    seed: int | None = None
    decoder: Path | None = None
    text_encoder: Path | None = None


class ExportFamily(ABC):
    """One family of models; its name is that of `tmd_engines.bundle.families`.

    `models` are what `--model` can be, `built_in` those of them whose weights come with the package, `videos` the
    default output of models that were not made for that of their preset. The first of `presets` is the default one.
    `known_by` completes "this checkpoint ...", `missing_parts` tells how to add a part that has no weights.

    `exact` and `products` are patterns of the names of layers in the two graphs of the denoiser: those that stay in
    float32 in every precision, because the whole result would feel their rounding, and the linear ones that can have 8
    bits. `small_patches` (frames, height, width) is what a model of large videos is calibrated on.

    `is_wan`: the denoiser is a transformer of Wan, whose weights have a file of their own; `adds_layers`: with layers
    beside it, without which trained weights are no model.

    With `any_size`, `open` takes a model of any size without a name.
    """

    name: str
    models: tuple[str, ...]
    built_in: tuple[str, ...] = ()
    presets: Mapping[str, Preset]
    videos: Mapping[str, Mapping[str, int]] = {}  # read only
    known_by: str
    missing_parts: str = "give another --checkpoint that has them"
    exact: str
    products: str
    small_patches: tuple[int, int, int] = (2, 6, 6)
    any_size: bool = False
    is_wan: bool = False
    adds_layers: bool = False

    @abstractmethod
    def open(self, request: Request) -> Source:
        """The weights that `request` names. Raises ExportError if there are none.

        The source can be one of another family that shares the model: what a checkpoint is, its tensors say.
        """

    def found_in(self, checkpoints: Sequence[Path]) -> list[str]:
        """The models of this family that `checkpoints` hold by what they alone are called; see `any_size` too."""
        return []

    def on_grid(self, sampler: Mapping[str, Any], grid: str) -> dict[str, Any]:
        """The manifest's `sampler` on the time grid of another project, one of `GRIDS`. Raises ExportError."""
        raise ExportError(f"--grid {grid} is for Wan without inner steps, and this checkpoint {self.known_by}.")

    def builders(self) -> dict[str, Builder]:
        """Graph -> what makes it from the model of `parts.MODEL_OF`."""
        from ..graphs.autoencoder import decoder_first, decoder_step, encoder
        from ..graphs.text import text_encoder

        return {
            "encoder": encoder,
            "text_encoder": text_encoder,
            "decoder_first": decoder_first,
            "decoder_step": decoder_step,
        }

    def has_products(self, part: str, model: Any) -> bool:
        """Whether the graph `part` has products that 8 bits are for; `model` is that section of the manifest."""
        return True

    def samplings(self, sampler: Any) -> list[tuple[int, int]]:
        """The (steps, inner steps) to calibrate on; `sampler` is that section of the manifest."""
        return [(sampler.steps, 1)]

    def beside(self, part: str, inputs: Arrays) -> list[Arrays]:
        """Further inputs to measure the graph `part` on, beside those `inputs` of a call in a run."""
        return []

    def compared(self, part: str, inputs: Arrays) -> Arrays:
        """The inputs to compare the graph `part` on in two precisions, made of those of a call in a run."""
        return inputs
