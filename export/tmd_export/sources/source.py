"""What a source of weights is: the sizes of the models of one bundle, and their weights one tensor at a time.

A `Source` gives one tensor at a time, so that an export holds no more than the tensor in work. Which sources there are
is in the modules beside this one; which of them a command line means, in `open`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import tmd_ref
from tmd_ref.vae import WanVAEConfig

from ..checkpoints.mapped import Codes
from ..errors import ExportError
from ..parts import VIDEO_PARTS

FILE_OF = {"student": "student.safetensors", "vae": "vae.safetensors", "text_encoder": "umt5.safetensors"}
TOKENIZER = "tokenizer.model"

T = TypeVar("T")


class Source(ABC):
    """The models of one bundle.

    `model` is the name in the manifest, `family` that of its family, `origin` the sentence in its provenance.
    `tokenizer` is the file that belongs to the text encoder, None if there is none; `parts` are the graphs that such a
    model can have, `default_parts` those to export when none are named. `sampler` is the manifest's entry of that name,
    None for the default preset of the family, and `sampler_note` the sentence that says where it was found; `notes` are
    sentences that the user should read. `trained` is False for weights from a seed, to which words are noise like any
    other.
    """

    model: str
    family: str
    origin: str
    tokenizer: Path | None = None
    parts: tuple[str, ...] = VIDEO_PARTS
    default_parts: tuple[str, ...]
    sampler: dict[str, Any] | None = None
    sampler_note: str | None = None
    notes: tuple[str, ...] = ()
    trained: bool = True

    @abstractmethod
    def model_entry(self) -> dict[str, Any]:
        """The manifest's `model`, but for its name and family."""

    @abstractmethod
    def latents_entry(self) -> dict[str, Any]:
        """The manifest's `latents`."""

    @abstractmethod
    def text_entry(self) -> dict[str, Any]:
        """The manifest's `text`, but for the file of its tokenizer."""

    @abstractmethod
    def check(self, parts: tuple[str, ...]) -> None:
        """Raises ExportError, before any work, if one of `parts` cannot be built from this source."""

    @property
    def encodes_with(self) -> Source:
        """The source whose VAE makes the latents that this one's decoder takes."""
        return self

    @abstractmethod
    def module(self, which: str) -> nn.Module:
        """A model, one of `parts.MODEL_OF`'s values, with its parameters on the meta device. Raises ExportError."""

    @abstractmethod
    def tensor(self, which: str, name: str) -> Tensor:
        """The weight `name` of `module(which).named_parameters()`, on the CPU, as it is stored: mapped from the disk
        where the format allows. Keep it no longer than needed. Raises ExportError if there is none."""

    def codes(self, which: str, name: str) -> Codes | None:
        """The same matrix as small numbers and scales, if the checkpoint keeps it so and nothing is added to it."""
        return None

    def null_embeds(self) -> Tensor | None:
        """Features float32 `[text.max_length, text.dim]` of the empty prompt; None if the bundle encodes it itself."""
        return None

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        """sha256 of each file that `parts` are made from."""
        return {}

    def loras(self) -> tuple[dict[str, Any], ...]:
        """The manifest's `provenance.loras`: what was added to the weights."""
        return ()

    def published_names(self, name: str) -> tuple[str, ...]:
        """How files of weights call the parameter `name` of `module("student")`: first as `tmd_ref` does in the model
        that is not cut in two, then as other layouts do."""
        return (name,)

    def completed(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest's `sampler`, with what no preset can know of this model."""
        return dict(sampler)

    def lora_note(self, path: Path) -> str | None:
        """What the user should know of a LoRA because of the name of its file or folder."""
        return None


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` constructs, in evaluation mode, its parameters on the meta device."""
    with torch.device("meta"):
        return make().eval().requires_grad_(False)


def vae_latents(vae: WanVAEConfig) -> dict[str, Any]:
    """The manifest's `latents` for those of Wan's VAE."""
    return {
        "channels": vae.z_dim,
        "temporal_stride": vae.temporal_stride,
        "spatial_stride": vae.spatial_stride,
        "mean": list(vae.latents_mean),
        "std": list(vae.latents_std),
    }


def built_in_folder() -> Path:
    """Where the weights of the built-in model lie in this installation."""
    return Path(tmd_ref.__file__).parent / "weights" / "tiny"


def read_file(path: Path, read: Callable[[Path], T]) -> T:
    """`read(path)`, with all that a wrong file can cause as one sentence."""
    from safetensors import SafetensorError

    try:
        return read(path)
    except SafetensorError as error:
        raise ExportError(f"{path} is not a complete safetensors file ({error}): copy it again.") from None
    except (OSError, ValueError) as error:
        raise ExportError(str(error)) from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{path} does not fit its own configuration: {reason}. Copy it again.") from None
