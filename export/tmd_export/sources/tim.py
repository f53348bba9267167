"""Transition Models as a source of weights: the released files, a folder of tmd-distill, or a seed.

A released file holds the transformer alone. Its text encoder (Gemma) and decoder (DC-AE or SD-VAE) are other people's
models, each of which comes from a folder of its own (`gemma.py`, `still_vae.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmd_engines.bundle.files import sha256_hex
from tmd_engines.errors import quote
from tmd_ref.checkpoint import read_config
from tmd_ref.text import EOS_ID, PAD_ID
from tmd_ref.tim.model import TIM_CONFIGS, TiM, TiMConfig
from tmd_ref.tim.released import PROJECTOR, RELEASED
from tmd_ref.tim.split import SplitTiM, uncut
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Config, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig

from ..checkpoints import Tensors, open_tensors
from ..checkpoints.contents import refuse_incomplete
from ..checkpoints.hub_cache import called
from ..errors import ExportError
from ..parts import MODEL_OF, PARTS
from ..presets.tim import PRESETS
from .gemma import BOS_ID as GEMMA_BOS
from .gemma import PAD_ID as GEMMA_PAD
from .gemma import GemmaFolder
from .random_weights import random_tensor
from .source import FILE_OF, TOKENIZER, Source, built_in_folder, on_meta, read_file, vae_latents
from .still_vae import VAEFolder

WEIGHTS = "tim.safetensors"  # as tmd-distill leaves it, with its sizes in the metadata

# The latents that each released model was trained on: pixels per latent, and the factor that brings them to about 1.
# DC-AE's factor is that of its sana-1.0 configuration; SD-VAE's is Stable Diffusion's.
_LATENTS = {"tim-t2i": (32, 0.41407), "tim-c2i-256": (8, 0.18215), "tim-c2i-512": (32, 0.41407)}
_PARTS = tuple(part for part in PARTS if part != "decoder_step")  # a still has no later latent frame
_OWN_SAMPLING = {"steps": 8, "guidance": 1.0}
_RELEASED = ("backbone", "flow_head")


class TiMSource(Source):
    """A Transition Model: the sizes, and the manifest's entries that go with them."""

    family = "tim"
    parts = _PARTS

    def __init__(self, model: str, config: TiMConfig) -> None:
        self.model, self.config = model, config
        self.default_parts = _RELEASED if model in RELEASED else _PARTS
        if model not in RELEASED:
            self.sampler = {**PRESETS["tim"].sampler, **_OWN_SAMPLING}
        self._decoder: VAEFolder | None = None
        self._text_encoder: GemmaFolder | None = None

    def take_text_encoder(self, folder: str | Path) -> None:
        """Gives the released model of prompts the text encoder in `folder`. Raises ExportError if it does not fit."""
        width = self.config.text_dim
        if self.model not in RELEASED or width is None:
            raise ExportError(
                f"--text-encoder is for tim-t2i: {self.model} "
                f"{'takes no prompt' if width is None else 'has a text encoder of its own'}, so leave it out."
            )
        encoder = GemmaFolder(folder)
        encoder.check(width)
        self._text_encoder, self.tokenizer = encoder, encoder.tokenizer
        self.default_parts = tuple(part for part in _PARTS if part in (*self.default_parts, "text_encoder"))
        self.origin = f"{self.origin}; text encoder {called(encoder.folder)}"

    def null_embeds(self) -> Tensor | None:
        return self._text_encoder.null_features(self.config.text_len) if self._text_encoder else None

    def take_decoder(self, folder: str | Path) -> None:
        """Gives a released model the decoder in `folder`, and the encoder. Raises ExportError if it does not fit."""
        if self.model not in _LATENTS:
            raise ExportError(f"{self.model} has a decoder of its own: leave --decoder out.")
        stride, factor = _LATENTS[self.model]
        decoder = VAEFolder(folder, factor)
        decoder.check(self.config.in_channels, stride)
        self._decoder = decoder
        self.default_parts = tuple(p for p in _PARTS if p in self.default_parts or MODEL_OF[p] == "vae")
        self.origin = f"{self.origin}; decoder {called(decoder.folder)}"

    @property
    def vae(self) -> WanVAEConfig:
        return WAN_VAE_CONFIGS["tiny"]

    def model_entry(self) -> dict[str, Any]:
        config = self.config
        return {
            "architecture": "tim",
            "dim": config.dim,
            "num_layers": config.num_layers,
            "head_blocks": config.num_layers,
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
            "patch_size": [1, config.patch, config.patch],
            "rope": "index",
            "classes": config.num_classes,
        }

    def latents_entry(self) -> dict[str, Any]:
        if self.model not in _LATENTS:
            return vae_latents(self.vae)
        stride, factor = _LATENTS[self.model]
        channels = self.config.in_channels
        spread = {"mean": [0.0] * channels, "std": [1 / factor] * channels}
        return {"channels": channels, "temporal_stride": 1, "spatial_stride": stride, **spread}

    def text_entry(self) -> dict[str, Any]:
        """For a model of classes, which has no text, the smallest that says nothing."""
        config = self.config
        if config.text_dim is None:
            return {"max_length": 1, "dim": config.dim, "pad_id": 0, "eos_id": 0}
        sizes = {"max_length": config.text_len, "dim": config.text_dim}
        if self.model in RELEASED:
            return {**sizes, "pad_id": GEMMA_PAD, "eos_id": None, "bos_id": GEMMA_BOS, "tokenization": "plain"}
        return {**sizes, "pad_id": PAD_ID, "eos_id": EOS_ID}

    def check(self, parts: tuple[str, ...]) -> None:
        absent = [part for part in parts if part not in self.default_parts]
        if absent:
            raise ExportError(
                f"{self.model} gives no {absent[0]} here: choose among {', '.join(self.default_parts)} (--parts)."
            )
        have, want = self.latents_entry()["channels"], self.config.in_channels
        if have != want:
            raise ExportError(
                f"the VAE beside {self.model} has latents of {have} channels, and the model makes {want}: they do not "
                "belong together. Take both from one training run."
            )

    def module(self, which: str) -> nn.Module:
        makers: dict[str, Callable[[], nn.Module]] = {
            "student": lambda: SplitTiM(TiM(self.config)),
            "vae": lambda: WanVAE(self.vae),
            "text_encoder": lambda: UMT5Encoder(self.text),
        }
        if other := self._others(which):
            return other.module()
        return on_meta(makers[which])

    def published_names(self, name: str) -> tuple[str, ...]:
        return (uncut(name),)

    def _others(self, which: str) -> VAEFolder | GemmaFolder | None:
        """The folder of the model `which` if it is not TiM's own."""
        return {"vae": self._decoder, "text_encoder": self._text_encoder}.get(which)

    @property
    def text(self) -> UMT5Config:
        """Sizes of the text encoder of a model of our own."""
        return UMT5_CONFIGS["tiny"]


class RandomTiM(TiMSource):
    """Weights from a seed, for tests and for sizing; it shows noise."""

    trained = False

    def __init__(self, model: str, seed: int, config: TiMConfig | None = None) -> None:
        """`model` is one of `TIM_CONFIGS`, or any name with a `config`."""
        super().__init__(model, config or TIM_CONFIGS[model])
        self.seed, self.origin = seed, f"random weights, seed {seed}"
        tokenizer = built_in_folder() / TOKENIZER
        self.tokenizer = tokenizer if "text_encoder" in self.default_parts and tokenizer.is_file() else None
        self._shapes: dict[str, dict[str, torch.Size]] = {}

    def tensor(self, which: str, name: str) -> Tensor:
        if other := self._others(which):
            return other.tensor(name)
        if which not in self._shapes:
            self._shapes[which] = {key: weight.shape for key, weight in self.module(which).state_dict().items()}
        return random_tensor(f"{which}.{name}", self._shapes[which][name], self.seed)


class TiMFolder(TiMSource):
    """A folder with the released file of `model`, or one of tmd-distill with text encoder, tokenizer and VAE beside it.

    Of a released file every tensor is read from where it lies, one at a time; a `.bin` by the weights-only unpickler.
    """

    def __init__(self, path: str | Path, model: str, config: TiMConfig | None = None) -> None:
        """`path` is the folder or the file itself. Raises ExportError if it holds no weights of this model."""
        path = Path(path)
        name = RELEASED.get(model, WEIGHTS)
        self._file = path / name if path.is_dir() else path
        self._folder = self._file.parent
        if not self._file.is_file():
            raise ExportError(f"{path} has no {name}: expected the weights of {model}.")
        refuse_incomplete(self._folder)
        stated = None if model in RELEASED else read_file(self._file, lambda file: read_config(file, TiM))
        wanted = config or TIM_CONFIGS[model]
        if stated not in (None, wanted):
            raise ExportError(f"the model in {self._file} has other sizes than {model}: {stated}. It is another model.")
        super().__init__(model, wanted)
        self.origin = f"checkpoint {called(path)}"
        self._files: dict[str, Tensors] = {"student": open_tensors((self._file,))}
        self._fit()
        if model not in RELEASED:
            here = {part for part in _PARTS if all(file.is_file() for file in self._paths(part))}
            self.default_parts = tuple(part for part in _PARTS if part in here)
            self.tokenizer = self._folder / TOKENIZER if "text_encoder" in here else None

    @property
    def vae(self) -> WanVAEConfig:
        path = self._folder / FILE_OF["vae"]
        if self.model in RELEASED or not path.is_file():
            return super().vae
        config: WanVAEConfig = read_file(path, lambda file: read_config(file, WanVAE))
        return config

    @property
    def text(self) -> UMT5Config:
        config: UMT5Config = read_file(self._folder / FILE_OF["text_encoder"], lambda f: read_config(f, UMT5Encoder))
        return config

    def tensor(self, which: str, name: str) -> Tensor:
        if other := self._others(which):
            return other.tensor(name)
        if which not in self._files:
            self._files[which] = open_tensors((self._folder / FILE_OF[which],))
        return self._files[which].read(uncut(name) if which == "student" else name)

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        found = {}
        for path in dict.fromkeys(path for part in parts for path in self._paths(part)):
            with open(path, "rb", buffering=0) as file:
                found[path.name] = sha256_hex(file)
        for which in dict.fromkeys(MODEL_OF[part] for part in parts):
            other = self._others(which)
            found |= other.sha256() if other else {}
        return found

    def _paths(self, part: str) -> list[Path]:
        """Files that a graph is made from."""
        which = MODEL_OF[part]
        if which == "student":
            return [self._file]
        if self._others(which):
            return []
        beside = [FILE_OF[which], TOKENIZER] if which == "text_encoder" else [FILE_OF[which]]
        return [self._folder / name for name in beside]

    def _fit(self) -> None:
        """Raises ExportError unless the file has the model's tensors and, but for the projector, no others."""
        entries = self._files["student"].entries
        found = {name: entry.shape for name, entry in entries.items() if not name.startswith(PROJECTOR)}
        wanted = {name: tuple(weight.shape) for name, weight in on_meta(lambda: TiM(self.config)).named_parameters()}
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if wrong:
            have, want = (list(there[wrong[0]]) if wrong[0] in there else "nothing" for there in (found, wanted))
            more = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
            raise ExportError(
                f"{self._file} does not hold the weights of {self.model}: it has {have} as {quote(wrong[0])} where "
                f"{want} belongs{more}. Copy it again, or choose its own --model."
            )


def find_tim(paths: Sequence[Path]) -> list[str]:
    """The models that `paths`, files or folders, hold by the names of their files."""
    named = {file: model for model, file in RELEASED.items()}
    return [
        named.get(file) or _model_of_size(path)
        for path in paths
        for file in (*named, WEIGHTS)
        if path.name == file or (path / file).is_file()
    ]


def _model_of_size(path: Path) -> str:
    """Of what tmd-distill left. Raises ExportError if its sizes are those of none."""
    file = path / WEIGHTS if path.is_dir() else path
    stated = read_file(file, lambda file: read_config(file, TiM))
    model = next((name for name, config in TIM_CONFIGS.items() if config == stated), None)
    if model is None:
        raise ExportError(f"the model in {file} has sizes of its own ({stated}): give one of {', '.join(TIM_CONFIGS)}.")
    return model


def open_tim(
    model: str, checkpoints: tuple[Path, ...], seed: int | None, decoder: Path | None, text_encoder: Path | None
) -> TiMSource:
    """What the command line means: one folder or file, or a seed, and folders of other models. Raises ExportError."""
    source = _open_transformer(model, checkpoints, seed)
    if text_encoder is not None:
        source.take_text_encoder(text_encoder)
    if decoder is not None:
        source.take_decoder(decoder)
    return source


def _open_transformer(model: str, checkpoints: tuple[Path, ...], seed: int | None) -> TiMSource:
    if seed is not None:
        if checkpoints:
            raise ExportError("a checkpoint has its own weights: give either --checkpoint or --random-weights.")
        return RandomTiM(model, seed)
    if not checkpoints and model not in RELEASED and (built_in_folder() / WEIGHTS).is_file():
        source = TiMFolder(built_in_folder(), model)
        source.origin = "built-in weights"
        return source
    if len(checkpoints) != 1:
        raise ExportError(f"{model} has no built-in weights: give one --checkpoint PATH, or --random-weights SEED.")
    return TiMFolder(checkpoints[0], model)
