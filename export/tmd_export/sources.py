"""Where the weights come from: the built-in model, a folder of checkpoints, or a seed.

A `Source` knows the sizes of its models and builds the module of one graph when asked, so that an export need not hold
more weights than the graph in work. What it is not: a reader of official Wan checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import tmd_ref
from tmd_engines.files import sha256_hex
from tmd_ref.checkpoint import load_model
from tmd_ref.student import TMDStudent, load_student
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Config, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig
from tmd_ref.wan import WAN_CONFIGS, WanConfig

from .errors import ExportError
from .graphs import BUILDERS, Graph
from .parts import MODEL_OF, PARTS
from .random_weights import fill_at_random

FILE_OF = {"student": "student.safetensors", "vae": "vae.safetensors", "text_encoder": "umt5.safetensors"}
TOKENIZER = "tokenizer.model"
HEAD_BLOCKS = {"tiny": 2, "wan1.3b": 5, "wan14b": 5}  # of students with random weights; TMD's own choice for Wan is 5

T = TypeVar("T")


class Source(ABC):
    """The models of one bundle.

    `model` is the name in the manifest and `origin` the sentence in its provenance. `tokenizer` is the file that
    belongs to the text encoder, None if there is none; `default_parts` the graphs to export when none are named.
    """

    model: str
    origin: str
    wan: WanConfig
    head_blocks: int
    fusion: str
    tokenizer: Path | None
    default_parts: tuple[str, ...]

    @property
    @abstractmethod
    def vae(self) -> WanVAEConfig:
        """Sizes and latent statistics of the VAE."""

    @abstractmethod
    def check(self, parts: tuple[str, ...]) -> None:
        """Raises ExportError, before any work, if one of `parts` cannot be built from this source."""

    @abstractmethod
    def graph(self, part: str) -> Graph:
        """The graph with its weights, float32 on the CPU, in evaluation mode. Raises ExportError."""

    @abstractmethod
    def estimated_bytes(self, part: str) -> int:
        """About how many bytes the weights of this part take in float32."""

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        """sha256 of each file that `parts` are made from."""
        return {}


class FolderSource(Source):
    """A folder as the distillation leaves it: student.safetensors, vae.safetensors, umt5.safetensors, tokenizer.model.

    Each safetensors file holds its configuration in its metadata. The folder may lack what `parts` do not need.
    """

    default_parts = PARTS

    def __init__(self, folder: str | Path, model: str, origin: str | None = None) -> None:
        """Reads the student. `model` names the bundle, and the sizes of the VAE if the folder has none.

        Raises ExportError if there is no student or it cannot be read.
        """
        self.folder, self.model = Path(folder), model
        self.origin = origin or f"checkpoint {self.folder.name}"
        path = self.folder / FILE_OF["student"]
        if not path.is_file():
            raise ExportError(_no_student(self.folder))
        self._student = _read(path, load_student).float().eval().requires_grad_(False)
        self.wan, self.head_blocks = self._student.config, self._student.head_blocks
        self.fusion = self._student.fusion
        self.tokenizer = self._existing(TOKENIZER)

    @property
    def vae(self) -> WanVAEConfig:
        return self._vae.config if self._existing(FILE_OF["vae"]) else WAN_VAE_CONFIGS[_vae_name(self.model)]

    def check(self, parts: tuple[str, ...]) -> None:
        for part in parts:
            for name in _files_of(part):
                if not self._existing(name):
                    possible = [other for other in PARTS if all(map(self._existing, _files_of(other)))]
                    raise ExportError(
                        f"{self.folder} has no {name}, which {part} needs: put it there, or choose other parts "
                        f"(--parts {','.join(possible)})."
                    )
        if "text_encoder" in parts:
            _read(self.folder / TOKENIZER, lambda path: Tokenizer(path, self.wan.text_len))

    def graph(self, part: str) -> Graph:
        kind = MODEL_OF[part]
        if kind == "text_encoder":
            encoder = self._load("text_encoder", UMT5Encoder)
            words = Tokenizer(self.folder / TOKENIZER, self.wan.text_len).vocab_size
            self._match(
                "text_encoder", encoder.config.dim, "the student reads text features of width", self.wan.text_dim
            )
            if words > encoder.config.vocab_size:
                raise ExportError(
                    f"{self.folder / TOKENIZER} has {words} words and {FILE_OF[kind]} {encoder.config.vocab_size}: "
                    "they do not belong together. Take both from one training run."
                )
            return BUILDERS[part](encoder)
        if kind == "vae":
            self._match("vae", self._vae.config.z_dim, "the student makes latents of width", self.wan.out_channels)
            return BUILDERS[part](self._vae)
        return BUILDERS[part](self._student)

    def estimated_bytes(self, part: str) -> int:
        return (self.folder / FILE_OF[MODEL_OF[part]]).stat().st_size

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        found = {}
        for name in dict.fromkeys(name for part in parts for name in _files_of(part)):
            with open(self.folder / name, "rb", buffering=0) as file:
                found[name] = sha256_hex(file)
        return found

    @cached_property
    def _vae(self) -> WanVAE:
        return self._load("vae", WanVAE)

    def _load(self, kind: str, model: type[T]) -> T:
        return _read(self.folder / FILE_OF[kind], lambda path: load_model(path, model))  # type: ignore[type-var]

    def _existing(self, name: str) -> Path | None:
        return self.folder / name if (self.folder / name).is_file() else None

    def _match(self, kind: str, have: int, said: str, want: int) -> None:
        if have != want:
            raise ExportError(
                f"{self.folder / FILE_OF[kind]} has width {have}, but {said} {want}: they do not belong together. "
                "Take both from one training run."
            )


class RandomSource(Source):
    """A model of the right architecture with weights from a seed, for tests and for sizing; it shows noise."""

    def __init__(
        self,
        model: str,
        seed: int,
        *,
        wan: WanConfig | None = None,
        head_blocks: int | None = None,
        fusion: str = "gated",
        vae: WanVAEConfig | None = None,
        text: UMT5Config | None = None,
    ) -> None:
        """`model` is one of `parts.MODELS`, or any name if all sizes are given."""
        self.model, self.seed, self.fusion = model, seed, fusion
        self.origin = f"random weights, seed {seed}"
        self.wan = wan or WAN_CONFIGS[model]
        self.head_blocks = head_blocks or HEAD_BLOCKS[model]
        self._vae_config = vae or WAN_VAE_CONFIGS[_vae_name(model)]
        self._text = text or UMT5_CONFIGS["tiny" if model == "tiny" else "umt5-xxl"]
        tokenizer = built_in_folder() / TOKENIZER
        self.tokenizer = tokenizer if model == "tiny" and tokenizer.is_file() else None
        # 5.7 billion parameters of text encoder are of no use without a tokenizer, unless somebody asks for them.
        self.default_parts = tuple(
            part for part in PARTS if part != "text_encoder" or self._text != UMT5_CONFIGS["umt5-xxl"]
        )

    @property
    def vae(self) -> WanVAEConfig:
        return self._vae_config

    def check(self, parts: tuple[str, ...]) -> None:
        """Everything can be built."""

    def graph(self, part: str) -> Graph:
        kind = MODEL_OF[part]
        model = self._on_meta(kind)
        names = {id(weight): f"{kind}.{name}" for name, weight in model.named_parameters()}
        if kind == "student":
            graph = BUILDERS[part](model)
            fill_at_random(graph.module, names, self.seed)  # this part alone: the other may not fit
            return graph
        fill_at_random(model, names, self.seed)
        return BUILDERS[part](model)

    def estimated_bytes(self, part: str) -> int:
        model = self._on_meta(MODEL_OF[part])
        used: dict[str, nn.Module] = {"backbone": model, "flow_head": model}
        if isinstance(model, TMDStudent):
            used = {"backbone": model.backbone, "flow_head": model.head}
        elif isinstance(model, WanVAE):
            used = {"decoder_first": model.decoder, "decoder_step": model.decoder}
        return sum(4 * weight.numel() for weight in used.get(part, model).parameters())

    def _on_meta(self, kind: str) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module
            if kind == "student":
                model = TMDStudent(self.wan, self.head_blocks, self.fusion)
            else:
                model = WanVAE(self.vae) if kind == "vae" else UMT5Encoder(self._text)
        return model.eval().requires_grad_(False)


def built_in_folder() -> Path:
    """Where the weights of the built-in model lie in this installation."""
    return Path(tmd_ref.__file__).parent / "weights" / "tiny"


def open_source(model: str, checkpoint: str | Path | None = None, random_seed: int | None = None) -> Source:
    """The source that the command line means. Raises ExportError if there are no such weights.

    `checkpoint`: a folder (see `FolderSource`) whose student must have the sizes of `model`. `random_seed`: weights
    from this seed. Neither: the built-in weights, which only `tiny` has.
    """
    if model not in WAN_CONFIGS:
        raise ExportError(f"there is no model {model!r}: choose one of {', '.join(WAN_CONFIGS)}.")
    if random_seed is not None:
        if checkpoint is not None:
            raise ExportError("a checkpoint has its own weights: give either --checkpoint or --random-weights.")
        return RandomSource(model, random_seed)
    if checkpoint is not None:
        source = FolderSource(checkpoint, model)
        _check_architecture(source.wan, model, Path(checkpoint))
        return source
    if model != "tiny":
        raise ExportError(f"{model} has no built-in weights: give --checkpoint DIR, or --random-weights SEED.")
    if not built_in_folder().is_dir():
        raise ExportError(
            f"the built-in weights are missing from this installation ({built_in_folder()}): install tmd again, or "
            "give --checkpoint DIR or --random-weights SEED."
        )
    return FolderSource(built_in_folder(), model, "built-in weights")


def _check_architecture(found: WanConfig, model: str, folder: Path) -> None:
    for name in (field.name for field in fields(found)):
        have, want = getattr(found, name), getattr(WAN_CONFIGS[model], name)
        if have != want:
            raise ExportError(
                f"the student in {folder} has {name} {have}, and {model} has {want}: this is another model. "
                "Choose its own --model, or export it from Python with tmd_export.FolderSource and a name of its own."
            )


def _no_student(folder: Path) -> str:
    expected = (
        "a checkpoint is a folder with student.safetensors (and vae.safetensors, umt5.safetensors, tokenizer.model for "
        "the other parts), as tmd-distill leaves it"
    )
    if not folder.is_dir():
        return f"{folder} is not a folder: {expected}. Check the path."
    official = [*folder.glob("diffusion_pytorch_model*.safetensors"), *folder.glob("*.pth")]
    what = f", only {official[0].name} of an official release, which this version does not read" if official else ""
    return f"{folder} has no student.safetensors{what}: {expected}."


def _files_of(part: str) -> tuple[str, ...]:
    """Files of a checkpoint that a graph is made from."""
    return (FILE_OF[MODEL_OF[part]], TOKENIZER) if part == "text_encoder" else (FILE_OF[MODEL_OF[part]],)


def _vae_name(model: str) -> str:
    return "tiny" if model == "tiny" else "wan2.1"


def _read(path: Path, read: Callable[[Path], T]) -> T:
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
