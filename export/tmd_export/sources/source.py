"""Where the weights come from: the built-in model, a folder of checkpoints, or a seed.

A `Source` tells the sizes of its models and hands out their weights one tensor at a time, so that an export holds no
more than the tensor in work. What this file is not: the reader of official Wan checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import tmd_ref
from tmd_engines.bundle.files import sha256_hex
from tmd_ref.checkpoint import read_config
from tmd_ref.split import SplitWan
from tmd_ref.student import TMDStudent, read_student
from tmd_ref.text import EOS_ID, PAD_ID, Tokenizer
from tmd_ref.tim.model import TIM_CONFIGS
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Config, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig
from tmd_ref.wan import WAN_CONFIGS, WanConfig, WanTransformer

from ..checkpoints import Tensors, open_tensors
from ..errors import ExportError
from ..parts import MODEL_OF, VIDEO_PARTS
from ..presets import student_sampler
from .random_weights import random_tensor

FILE_OF = {"student": "student.safetensors", "vae": "vae.safetensors", "text_encoder": "umt5.safetensors"}
TOKENIZER = "tokenizer.model"
HEAD_BLOCKS = {"tiny": 2, "wan1.3b": 5, "wan14b": 5}  # of students with random weights; TMD's own choice for Wan is 5

T = TypeVar("T")


class Source(ABC):
    """The models of one bundle: their sizes at once, their weights one tensor at a time.

    `model` is the name in the manifest, `origin` the sentence in its provenance, `kind` "tmd" for a student with an
    inner flow and "wan" for a transformer without (then `fusion` is None). `tokenizer` is the file that belongs to the
    text encoder, None if there is none; `parts` are the graphs that a model of this kind can have, `default_parts`
    those to export when none are named. `sampler` is the
    manifest's entry of that name, None for the exporter's default; `notes` are sentences that the user should read.
    """

    model: str
    origin: str
    kind: str = "tmd"
    wan: WanConfig
    head_blocks: int
    fusion: str | None
    tokenizer: Path | None
    parts: tuple[str, ...] = VIDEO_PARTS
    default_parts: tuple[str, ...]
    sampler: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def vae(self) -> WanVAEConfig:
        """Sizes and latent statistics of the VAE whose latents the transformer makes."""
        return WAN_VAE_CONFIGS["wan2.1"]

    def model_entry(self) -> dict[str, Any]:
        """The manifest's `model`, but for its name."""
        wan = self.wan
        return {
            "family": self.kind,
            "architecture": "wan2.1-t2v",
            "dim": wan.dim,
            "num_layers": wan.num_layers,
            "head_blocks": self.head_blocks,
            "num_heads": wan.num_heads,
            "head_dim": wan.head_dim,
            "patch_size": list(wan.patch_size),
            **({} if self.fusion is None else {"fusion": self.fusion}),
        }

    def latents_entry(self) -> dict[str, Any]:
        """The manifest's `latents`."""
        vae = self.vae
        return {
            "channels": vae.z_dim,
            "temporal_stride": 1 << sum(vae.temporal_downsample),
            "spatial_stride": 1 << (len(vae.dim_mult) - 1),
            "mean": list(vae.latents_mean),
            "std": list(vae.latents_std),
        }

    def text_entry(self) -> dict[str, Any]:
        """The manifest's `text`, but for the file of its tokenizer."""
        return {"max_length": self.wan.text_len, "dim": self.wan.text_dim, "pad_id": PAD_ID, "eos_id": EOS_ID}

    @abstractmethod
    def check(self, parts: tuple[str, ...]) -> None:
        """Raises ExportError, before any work, if one of `parts` cannot be built from this source."""

    @abstractmethod
    def module(self, which: str) -> nn.Module:
        """A model, one of `parts.MODEL_OF`'s values, with its parameters on the meta device. Raises ExportError."""

    @abstractmethod
    def tensor(self, which: str, name: str) -> Tensor:
        """The weight `name` of `module(which).named_parameters()`, on the CPU, as it is stored: mapped from the disk
        where the format allows. Keep it no longer than needed. Raises ExportError if there is none."""

    def null_embeds(self) -> Tensor | None:
        """Features float32 `[text.max_length, text.dim]` of the empty prompt; None if the bundle encodes it itself."""
        return None

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        """sha256 of each file that `parts` are made from."""
        return {}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` constructs, in evaluation mode, its parameters on the meta device."""
    with torch.device("meta"):
        return make().eval().requires_grad_(False)


class FolderSource(Source):
    """A folder as the distillation leaves it: student.safetensors, vae.safetensors, umt5.safetensors, tokenizer.model.

    Each safetensors file holds its configuration in its metadata. The folder may lack what `parts` do not need.
    """

    default_parts = VIDEO_PARTS

    def __init__(self, folder: str | Path, model: str, origin: str | None = None) -> None:
        """Reads the student's sizes. `model` names the bundle, and the sizes of the VAE if the folder has none.

        Raises ExportError if there is no student or it cannot be read.
        """
        self.folder, self.model = Path(folder), model
        self.origin = origin or f"checkpoint {self.folder.name}"
        if not self._existing(FILE_OF["student"]):
            raise ExportError(f"{self.folder} has no {FILE_OF['student']}: it is no folder of tmd-distill.")
        self._files: dict[str, Tensors] = {}
        student = self.module("student")
        if not isinstance(student, TMDStudent):
            raise TypeError(f"read_student gave a {type(student).__name__}")
        self.wan, self.head_blocks, self.fusion = student.config, student.head_blocks, student.fusion
        self.sampler = student_sampler(student.grids)
        self.tokenizer = self._existing(TOKENIZER)

    @cached_property
    def vae(self) -> WanVAEConfig:
        path = self._existing(FILE_OF["vae"])
        if path is None:
            return WAN_VAE_CONFIGS[vae_name(self.model)]
        config: WanVAEConfig = read_file(path, lambda path: read_config(path, WanVAE))
        return config

    def check(self, parts: tuple[str, ...]) -> None:
        for part in parts:
            for name in _files_of(part):
                if not self._existing(name):
                    possible = [other for other in self.parts if all(map(self._existing, _files_of(other)))]
                    raise ExportError(
                        f"{self.folder} has no {name}, which {part} needs: put it there, or choose other parts "
                        f"(--parts {','.join(possible)})."
                    )
        kinds = {MODEL_OF[part] for part in parts}
        if "text_encoder" in kinds:
            config = read_file(self.folder / FILE_OF["text_encoder"], lambda path: read_config(path, UMT5Encoder))
            words = read_file(self.folder / TOKENIZER, lambda path: Tokenizer(path, self.wan.text_len)).vocab_size
            self._match("text_encoder", config.dim, "the student reads text features of width", self.wan.text_dim)
            if words > config.vocab_size:
                raise ExportError(
                    f"{self.folder / TOKENIZER} has {words} words and {FILE_OF['text_encoder']} {config.vocab_size}: "
                    "they do not belong together. Take both from one training run."
                )
        if "vae" in kinds:
            self._match("vae", self.vae.z_dim, "the student makes latents of width", self.wan.out_channels)
        for kind in kinds:
            self.module(kind)

    def module(self, which: str) -> nn.Module:
        path = self.folder / FILE_OF[which]
        make: Callable[[Path], nn.Module] = {
            "student": read_student,
            "vae": lambda path: WanVAE(read_config(path, WanVAE)),
            "text_encoder": lambda path: UMT5Encoder(read_config(path, UMT5Encoder)),
        }[which]
        return read_file(path, lambda path: _fitting(path, on_meta(lambda: make(path))))

    def tensor(self, which: str, name: str) -> Tensor:
        if which not in self._files:
            self._files[which] = open_tensors([self.folder / FILE_OF[which]])
        return self._files[which].read(name)

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        found = {}
        for name in dict.fromkeys(name for part in parts for name in _files_of(part)):
            with open(self.folder / name, "rb", buffering=0) as file:
                found[name] = sha256_hex(file)
        return found

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
        kind: str = "tmd",
        wan: WanConfig | None = None,
        head_blocks: int | None = None,
        fusion: str = "gated",
        vae: WanVAEConfig | None = None,
        text: UMT5Config | None = None,
    ) -> None:
        """`model` is one of `parts.MODELS`, or any name if all sizes are given; `kind` as in `Source`."""
        self.model, self.seed, self.kind = model, seed, kind
        self.fusion = fusion if kind == "tmd" else None
        self.origin = f"random weights, seed {seed}"
        self.wan = wan or WAN_CONFIGS[model]
        self.head_blocks = head_blocks or HEAD_BLOCKS[model]
        self._vae_config = vae or WAN_VAE_CONFIGS[vae_name(model)]
        self._text = text or UMT5_CONFIGS["tiny" if model == "tiny" else "umt5-xxl"]
        tokenizer = built_in_folder() / TOKENIZER
        self.tokenizer = tokenizer if model == "tiny" and tokenizer.is_file() else None
        # 5.7 billion parameters of text encoder are of no use without a tokenizer, unless somebody asks for them.
        self.default_parts = tuple(
            part for part in VIDEO_PARTS if part != "text_encoder" or self._text != UMT5_CONFIGS["umt5-xxl"]
        )
        self._shapes: dict[str, dict[str, torch.Size]] = {}

    @property
    def vae(self) -> WanVAEConfig:
        return self._vae_config

    def check(self, parts: tuple[str, ...]) -> None:
        """Everything can be built."""

    def module(self, which: str) -> nn.Module:
        makers: dict[str, Callable[[], nn.Module]] = {
            "student": self._student,
            "vae": lambda: WanVAE(self.vae),
            "text_encoder": lambda: UMT5Encoder(self._text),
        }
        return on_meta(makers[which])

    def tensor(self, which: str, name: str) -> Tensor:
        if which not in self._shapes:
            self._shapes[which] = {key: weight.shape for key, weight in self.module(which).state_dict().items()}
        return random_tensor(f"{which}.{name}", self._shapes[which][name], self.seed)

    def _student(self) -> nn.Module:
        if self.kind == "wan":
            return SplitWan(WanTransformer(self.wan), self.head_blocks)
        return TMDStudent(self.wan, self.head_blocks, self.fusion or "gated")


def built_in_folder() -> Path:
    """Where the weights of the built-in model lie in this installation."""
    return Path(tmd_ref.__file__).parent / "weights" / "tiny"


def open_source(
    model: str,
    checkpoint: str | Path | Sequence[str | Path] | None = None,
    random_seed: int | None = None,
    decoder: str | Path | None = None,
    random_kind: str = "tmd",
    text_encoder: str | Path | None = None,
) -> Source:
    """The source that the command line means. Raises ExportError if there are no such weights.

    `checkpoint`: a folder as tmd-distill leaves it (see `FolderSource`), or one or more published checkpoints (see
    `WanSource`); the transformer must have the sizes of `model`. `random_seed`: weights from this seed, for a
    model of `random_kind` (see `Source.kind`). Neither: the built-in weights, which only `tiny` has. `decoder`: a file
    with another decoder (see `decoders.WithDecoder`), for a Transition Model a folder (see `still_vae.VAEFolder`).
    `text_encoder`: for tim-t2i the folder of its text encoder (see `gemma.GemmaFolder`).
    """
    if model in TIM_CONFIGS:
        from .tim import open_tim

        return open_tim(model, checkpoint, random_seed, decoder, text_encoder)
    if text_encoder is not None:
        raise ExportError(
            f"--text-encoder is for tim-t2i: the text encoder of {model} comes with its --checkpoint, so leave it out."
        )
    if random_kind == "tim":
        raise ExportError(f"the preset tim is for Transition Models, and {model} is none: choose another --preset.")
    if model not in WAN_CONFIGS:
        raise ExportError(f"there is no model {model!r}: choose one of {', '.join((*WAN_CONFIGS, *TIM_CONFIGS))}.")
    if decoder is not None:
        from .decoders import WithDecoder

        return WithDecoder(open_source(model, checkpoint, random_seed, random_kind=random_kind), decoder)
    paths = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint or ())
    if random_seed is not None:
        if paths:
            raise ExportError("a checkpoint has its own weights: give either --checkpoint or --random-weights.")
        return RandomSource(model, random_seed, kind=random_kind)
    if len(paths) == 1 and (Path(paths[0]) / FILE_OF["student"]).is_file():
        source = FolderSource(paths[0], model)
        check_architecture(source.wan, WAN_CONFIGS[model], model, Path(paths[0]))
        return source
    if paths:
        from .wan import WanSource

        return WanSource(paths, model)
    if model != "tiny":
        raise ExportError(f"{model} has no built-in weights: give --checkpoint PATH, or --random-weights SEED.")
    if not built_in_folder().is_dir():
        raise ExportError(
            f"the built-in weights are missing from this installation ({built_in_folder()}): install tmd again, or "
            "give --checkpoint PATH or --random-weights SEED."
        )
    return FolderSource(built_in_folder(), model, "built-in weights")


def check_architecture(found: WanConfig, wanted: WanConfig, model: str, where: Path) -> None:
    """Raises ExportError if the student in `where` has other sizes than `model`, which has those of `wanted`."""
    for name in (field.name for field in fields(found)):
        have, want = getattr(found, name), getattr(wanted, name)
        if have != want:
            raise ExportError(
                f"the student in {where} has {name} {have}, and {model} has {want}: this is another model. "
                "Choose its own --model, or export it from Python with tmd_export.FolderSource and a name of its own."
            )


def _files_of(part: str) -> tuple[str, ...]:
    """Files of a checkpoint that a graph is made from."""
    return (FILE_OF[MODEL_OF[part]], TOKENIZER) if part == "text_encoder" else (FILE_OF[MODEL_OF[part]],)


def _fitting(path: Path, module: nn.Module) -> nn.Module:
    """`module`, if `path` holds its weights and no others. A weight under two names is stored under the first."""
    from safetensors import safe_open

    wanted = {name: weight.shape for name, weight in module.named_parameters()}
    with safe_open(path, "pt") as file:
        found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        have, want = (f"{list(there[name])}" if name in there else "nothing" for there in (found, wanted))
        raise ExportError(
            f"{path} does not hold the weights of its own configuration: it has {have} as {name} where {want} "
            f"belongs{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}. It was changed or comes from another "
            "version; save it again."
        )
    return module


def vae_name(model: str) -> str:
    """Which of `WAN_VAE_CONFIGS` makes the latents of `model`."""
    return "tiny" if model == "tiny" else "wan2.1"


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
