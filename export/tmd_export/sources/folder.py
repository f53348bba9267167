"""A folder of checkpoints as the distillation leaves it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from tmd_engines.bundle.files import sha256_hex
from tmd_ref.checkpoint import read_config
from tmd_ref.student import TMDStudent, read_student
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig

from ..checkpoints import Tensors, open_tensors
from ..checkpoints.contents import refuse_incomplete
from ..checkpoints.hub_cache import called
from ..errors import ExportError
from ..parts import MODEL_OF, VIDEO_PARTS
from ..presets.tmd import student_sampler
from .source import FILE_OF, TOKENIZER, on_meta, read_file
from .wan21 import Wan21Source, vae_name
from .wan_sizes import known_name


class FolderSource(Wan21Source):
    """A folder as the distillation leaves it: student.safetensors, vae.safetensors, umt5.safetensors, tokenizer.model.

    Each safetensors file holds its configuration in its metadata. The folder may lack what `parts` do not need.
    """

    default_parts = VIDEO_PARTS

    def __init__(self, folder: str | Path, model: str | None = None, origin: str | None = None) -> None:
        """Reads the student's sizes. `model` names the bundle, and the sizes of the VAE if the folder has none; None:
        the sizes say it.

        Raises ExportError if there is no student or it cannot be read.
        """
        self.folder = Path(folder)
        self.origin = origin or f"checkpoint {called(self.folder)}"
        if not self._existing(FILE_OF["student"]):
            raise ExportError(f"{self.folder} has no {FILE_OF['student']}: it is no folder of tmd-distill.")
        refuse_incomplete(self.folder)
        self._files: dict[str, Tensors] = {}
        student = self.module("student")
        if not isinstance(student, TMDStudent):
            raise TypeError(f"read_student gave a {type(student).__name__}")
        self.wan, self.head_blocks, self.fusion = student.config, student.head_blocks, student.fusion
        self.model = model or known_name(self.wan)
        self.sampler = student_sampler(student.grids)
        self.tokenizer = self._existing(TOKENIZER)

    @cached_property
    def vae(self) -> WanVAEConfig:
        path = self._existing(FILE_OF["vae"])
        if path is None:
            return WAN_VAE_CONFIGS[vae_name(self.model, self.wan)]
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
        models = {MODEL_OF[part] for part in parts}
        if "text_encoder" in models:
            config = read_file(self.folder / FILE_OF["text_encoder"], lambda path: read_config(path, UMT5Encoder))
            words = read_file(self.folder / TOKENIZER, lambda path: Tokenizer(path, self.wan.text_len)).vocab_size
            self._match("text_encoder", config.dim, "the student reads text features of width", self.wan.text_dim)
            if words > config.vocab_size:
                raise ExportError(
                    f"{self.folder / TOKENIZER} has {words} words and {FILE_OF['text_encoder']} {config.vocab_size}: "
                    "they do not belong together. Take both from one training run."
                )
        if "vae" in models:
            self._match("vae", self.vae.z_dim, "the student makes latents of width", self.wan.out_channels)
        for which in models:
            self.module(which)

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

    def _match(self, which: str, have: int, wish: str, want: int) -> None:
        if have != want:
            raise ExportError(
                f"{self.folder / FILE_OF[which]} has width {have}, but {wish} {want}: they do not belong together. "
                "Take both from one training run."
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
