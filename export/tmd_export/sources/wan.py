"""Published Wan checkpoints as a source of weights: official folders, diffusers' layout, single files, mixtures.

The parts may come from different places: a distilled transformer from its own file; text encoder, tokenizer and VAE
from the folder of the model that it was made from. How files are found and recognised is in `checkpoints`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tmd_engines.bundle.files import sha256_hex
from tmd_ref.checkpoint import read_config
from tmd_ref.student import TimeGrids, TMDStudent, read_student
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Config, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig
from tmd_ref.wan import WAN_CONFIGS, WanConfig

from ..checkpoints import Checkpoint, Found, WeightFiles, find
from ..checkpoints.contents import MODEL_INDEX
from ..checkpoints.hub_cache import called
from ..checkpoints.mapped import Codes
from ..checkpoints.names import uncut
from ..checkpoints.recognise import PARTS as CALLED
from ..checkpoints.recognise import TOKENIZER as CARRIED
from ..checkpoints.scheduler import DMD, Scheduler, pipeline_class, read_scheduler
from ..errors import ExportError
from ..parts import MODEL_OF
from ..presets.anyflow import scheduled_flow_map
from ..presets.tmd import student_sampler
from ..presets.wan import distilled_preset, scheduled_sampler
from .source import on_meta, read_file
from .wan21 import HEAD_BLOCKS, Wan21Source, architecture, check_architecture, vae_name
from .wan_sizes import check_config, known_name, read_gate, read_sizes

# What a file can hold -> the model of `parts.MODEL_OF` that is made from it.
_MODEL_OF_FILE = {"transformer": "student", "student": "student", "vae": "vae", "text_encoder": "text_encoder"}

_WHERE_FROM = {
    "student": "diffusion_pytorch_model.safetensors (or a folder transformer, or the file of a distilled one)",
    "vae": "Wan2.1_VAE.pth, for Wan2.2-TI2V-5B Wan2.2_VAE.pth (or a folder vae)",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth (or a folder text_encoder)",
}


class WanSource(Wan21Source):
    """Checkpoints named by the user. Nothing but headers is read before a weight is asked for.

    A transformer without inner flow is cut before its last `head_blocks` blocks; a student of our own distillation has
    its own cut. `default_parts` are those that there are weights for.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        model: str | None = None,
        *,
        head_blocks: int | None = None,
        wan: WanConfig | None = None,
        vae: WanVAEConfig | None = None,
        text: UMT5Config | None = None,
        expert: bool = False,
    ) -> None:
        """`model` is one of `HEAD_BLOCKS`, whose sizes the transformer must have, or any name if all sizes are given;
        None: its tensors say what it is.

        `paths` are files and folders; a file given by itself comes before the same part of a folder. `expert`: the
        transformer is one of the two of a Wan2.2-A14B.
        Raises ExportError if a path holds nothing that is known, two of them the same, another model, or more than is
        used.
        """
        found = [find(Path(path), [Path(other) for other in paths if other != path], expert) for path in paths]
        self._found = found
        self._given = "checkpoint " + " + ".join(dict.fromkeys(called(one.path) for one in found))
        self.origin = self._given
        self._parts = _by_model(found)
        self._carried: tempfile.TemporaryDirectory[str] | None = None
        self._roots = [one.path for one in found if one.path.is_dir()]
        self.tokenizer = _tokenizer(found) or self._carried_tokenizer()
        self.fusion = None
        self._grids: TimeGrids | None = None
        self.wan = wan or (WAN_CONFIGS[model] if model else self._sizes())
        self.model = model or known_name(self.wan)
        self._vae_config, self._text_config = vae, text
        self.head_blocks = min(head_blocks or _head_blocks(self.model, self.wan), self.wan.num_layers - 1)
        if "student" in self._parts:
            self._take_student(self._parts["student"].open())
        self._named = {_MODEL_OF_FILE[name]: one.path for one in found for name in one.named}
        here = {*self._parts, *self._named}
        self.default_parts = tuple(part for part in self.parts if MODEL_OF[part] in here)
        self.origin = "; ".join([self._given, *self._stored_as()])
        self.notes = self._notes()

    @property
    def vae(self) -> WanVAEConfig:
        if self._vae_config is None:
            self._vae_config = self._own_config("vae", WanVAE) or WAN_VAE_CONFIGS[vae_name(self.model, self.wan)]
        return self._vae_config

    @cached_property
    def text(self) -> UMT5Config:
        """Sizes of the text encoder."""
        if self._text_config is None:
            xxl = UMT5_CONFIGS["tiny" if self.model == "tiny" else "umt5-xxl"]
            self._text_config = self._own_config("text_encoder", UMT5Encoder) or xxl
        return self._text_config

    @cached_property
    def sampler(self) -> dict[str, Any] | None:  # type: ignore[override]  # read when it is needed
        """What a student was distilled for, or what the scheduler of a folder in diffusers' layout says; else None.

        Raises ExportError if that scheduler is not computed here.
        """
        if self._grids is not None:
            return student_sampler(self._grids)
        if self._distilled:
            return dict(distilled_preset(architecture(self.wan)).sampler)
        scheduler = self._scheduler
        if scheduler is None:
            return None
        if scheduler.flow_map != (self.gate is not None):
            told = "one time" if self.gate is None else "two times"
            raise ExportError(
                f"{self._given} is sampled by {scheduler.called}, and its transformer is told {told}: they do not "
                "belong together. Copy the checkpoint again, or choose how to sample it with --preset."
            )
        if scheduler.flow_map:
            return scheduled_flow_map(scheduler.shift)
        return scheduled_sampler(scheduler.rule, scheduler.shift, architecture(self.wan))

    @property
    def sampler_note(self) -> str | None:  # type: ignore[override]
        if self._distilled:
            return f"sampled as its folder says, which names {DMD}: {distilled_preset(architecture(self.wan)).about}."
        return None if self._scheduler is None else f"sampled as its folder says: {self._scheduler}."

    @cached_property
    def _distilled(self) -> bool:
        """Whether the folder of the transformer names the pipeline of FastVideo's few-step models."""
        return self._home is not None and pipeline_class(self._home) == DMD

    @cached_property
    def _scheduler(self) -> Scheduler | None:
        """Of the folder that the transformer is taken from."""
        return None if self._home is None else read_scheduler(self._home)

    @cached_property
    def _home(self) -> Path | None:
        """The folder that a transformer without inner flow is taken from."""
        part = self._parts.get("student")
        if part is None or self._grids is not None:
            return None
        return next((root for root in self._roots if part.files.files[0].is_relative_to(root)), None)

    def check(self, parts: tuple[str, ...]) -> None:
        for part in parts:
            if MODEL_OF[part] not in self._parts:
                there = [part for part in self.default_parts if MODEL_OF[part] in self._parts]
                possible = f" (--parts {','.join(there)})" if there else ""
                if MODEL_OF[part] in self._named:
                    raise ExportError(
                        f"{self._named[MODEL_OF[part]] / MODEL_INDEX} names a model that {part} is made from, and its "
                        "weights are not there: the download is incomplete. Start it again, give these weights as a "
                        f"--checkpoint of their own, or choose other parts{possible}."
                    )
                raise ExportError(
                    f"{self._given} has nothing to make {part} from: add a --checkpoint with "
                    f"{_WHERE_FROM[MODEL_OF[part]]}, or choose other parts{possible}."
                )
        if any(MODEL_OF[part] == "vae" for part in parts):
            self._check_latents(self._parts["vae"].open())
        for which in dict.fromkeys(MODEL_OF[part] for part in parts):
            self._checkpoint(which)
        self.origin = "; ".join([self._given, *self._stored_as()])
        if "text_encoder" in parts:
            self._check_text()

    def module(self, which: str) -> nn.Module:
        if which == "student" and self.fusion is not None:
            path = self._parts[which].files.files[0]
            return on_meta(lambda: read_file(path, read_student))
        makers: dict[str, Any] = {
            "student": self.without_flow,
            "vae": lambda: WanVAE(self.vae),
            "text_encoder": lambda: UMT5Encoder(self.text),
        }
        return on_meta(makers[which])

    def tensor(self, which: str, name: str) -> Tensor:
        checkpoint, stored = self._stored(which, name)
        return checkpoint.read(stored)

    def codes(self, which: str, name: str) -> Codes | None:
        checkpoint, stored = self._stored(which, name)
        return checkpoint.codes(stored)

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        models = dict.fromkeys(MODEL_OF[part] for part in parts)
        parts_of = [self._parts[which] for which in models]
        files = [file for part in parts_of for file in (*part.files.files, *part.open().tensors.beside)]
        if "text_encoder" in parts and self.tokenizer is not None and self._carried is None:
            files.append(self.tokenizer)
        found = {}
        for path in files:
            with open(path, "rb", buffering=0) as file:
                found[self._name(path)] = sha256_hex(file)
        return found

    def _sizes(self) -> WanConfig:
        """Of the transformer or student that there is. Raises ExportError if there is none."""
        if "student" not in self._parts:
            raise ExportError(
                f"{self.origin} has no transformer, which says what model this is: name it with --model, or add the "
                "--checkpoint of its transformer."
            )
        checkpoint = self._parts["student"].open()
        if checkpoint.part != "student":
            return read_sizes(checkpoint)
        student: Any = on_meta(lambda: read_file(checkpoint.tensors.files[0], read_student))
        config: WanConfig = student.config
        return config

    def _carried_tokenizer(self) -> Path | None:
        """The tokenizer that the text encoder's file carries, written where it stays as long as this source."""
        part = self._parts.get("text_encoder")
        content = part.checkpoint.tokenizer() if part is not None and part.checkpoint is not None else None
        if content is None:
            return None
        self._carried = tempfile.TemporaryDirectory(prefix="tmd-tokenizer-")
        path = Path(self._carried.name) / CARRIED
        path.write_bytes(content)
        return path

    def _stored_as(self) -> list[str]:
        """How the weights that were opened so far are stored, where that is not as floating point."""
        opened = [part.checkpoint for part in self._parts.values() if part.checkpoint is not None]
        return [checkpoint.stored_as for checkpoint in opened if checkpoint.stored_as]

    def _checkpoint(self, which: str) -> Checkpoint:
        """The tensors of a model, complete and of the right sizes. Raises ExportError."""
        part = self._parts[which]
        checkpoint = part.open()
        if not part.fits:
            weights = self.module(which).named_parameters()
            checkpoint.fit(
                {self._stored_name(which, name): tuple(weight.shape) for name, weight in weights}, self.model
            )
            part.fits = True
        return checkpoint

    def _stored(self, which: str, name: str) -> tuple[Checkpoint, str]:
        """The checkpoint that a weight is in, and its name there."""
        checkpoint, stored = self._checkpoint(which), self._stored_name(which, name)
        if stored not in checkpoint:
            stored = f"backbone.{name.removeprefix('head.')}"  # what the two parts of a student share is stored once
        return checkpoint, stored

    def _stored_name(self, which: str, name: str) -> str:
        if which == "student" and self.fusion is None:
            return uncut(name, self.wan.num_layers - self.head_blocks)
        return name

    def _take_student(self, checkpoint: Checkpoint) -> None:
        if checkpoint.part == "student":
            path = checkpoint.tensors.files[0]
            student: TMDStudent = read_file(path, read_student)
            check_architecture(student.config, self.wan, self.model, path)
            self.fusion, self.head_blocks = student.fusion, student.head_blocks
            self._grids = student.grids
        else:
            found, wanted = checkpoint.size(), (self.wan.dim, self.wan.num_layers)
            if (found.dim, found.blocks) != wanted and found.dim and found.blocks:
                known = [name for name, c in WAN_CONFIGS.items() if (c.dim, c.num_layers) == (found.dim, found.blocks)]
                raise ExportError(
                    f"{checkpoint.where} is {f'that of {known[0]}' if known else 'a Wan transformer of another size'} "
                    f"({found}), and {self.model} has width {wanted[0]}, {wanted[1]} blocks: "
                    f"choose {f'--model {known[0]}' if known else 'another checkpoint'}, or leave --model out."
                )
            check_config(checkpoint, self.wan)
            self.gate = read_gate(checkpoint)
        self._checkpoint("student")

    def _own_config(self, which: str, kind: type) -> Any:
        """The sizes that a file of tmd-distill states itself; None for a published one."""
        if which not in self._parts or "config" not in (tensors := self._parts[which].open().tensors).metadata:
            return None
        return read_file(tensors.files[0], lambda path: read_config(path, kind))

    def _check_latents(self, vae: Checkpoint) -> None:
        latents = (vae.shape("conv2.weight") or (self.vae.z_dim,))[0]
        if latents != self.wan.out_channels:
            raise ExportError(
                f"{vae.where} has latents of width {latents}, but the transformer makes latents of width "
                f"{self.wan.out_channels}: they do not belong together. Wan2.1_VAE.pth has 16, and Wan2.2_VAE.pth, "
                "which is for Wan2.2-TI2V-5B, has 48."
            )

    def _check_text(self) -> None:
        if self.tokenizer is None:
            raise ExportError(
                f"{self._given} has no tokenizer, which text_encoder needs: add a --checkpoint with "
                "google/umt5-xxl/spiece.model (a tokenizer.json alone is not read, nor the vocabulary in a GGUF file), "
                "or choose other --parts."
            )
        words = read_file(self.tokenizer, lambda path: Tokenizer(path, self.wan.text_len)).vocab_size
        if self.text.dim != self.wan.text_dim or words > self.text.vocab_size:
            raise ExportError(
                f"{self._checkpoint('text_encoder').where} knows {self.text.vocab_size} words and makes features of "
                f"width {self.text.dim}; {self.tokenizer} has {words} words, and the transformer reads width "
                f"{self.wan.text_dim}: they do not belong together."
            )

    def _name(self, path: Path) -> str:
        """A file's name in the provenance, from the folder that was given."""
        root = next((root for root in self._roots if path.is_relative_to(root)), None)
        return called(path) if root is None else f"{called(root)}/{path.relative_to(root).as_posix()}"

    def _notes(self) -> tuple[str, ...]:
        notes = [note for one in self._found for note in one.notes]
        notes += [f"{stored_as}." for stored_as in self._stored_as()]
        student = self._parts["student"].open() if "student" in self._parts else None
        wrapper = student.tensors.wrapper if student else None
        if student is not None and wrapper is not None:
            notes.append(f"of {student.where}, the weights under {wrapper!r} are taken.")
        if wrapper is not None and wrapper.startswith("generator"):
            notes.append(
                "autoregressive checkpoints (CausVid, Self-Forcing) have the same tensors as bidirectional ones: if "
                "this is one, its videos will be wrong, and nothing here can tell."
            )
        return tuple(notes)


@dataclass
class _Part:
    """Where a model comes from. `itself`: the user gave this very file, not its folder."""

    files: WeightFiles
    itself: bool
    checkpoint: Checkpoint | None = None
    fits: bool = False

    def open(self) -> Checkpoint:
        """The recognised tensors. Raises ExportError if the file is not what its name says."""
        if self.checkpoint is None:
            self.checkpoint = Checkpoint(self.files.open(), self.files.expert)
        part, expected = self.checkpoint.part, self.files.part
        if expected is not None and part != expected:
            raise ExportError(
                f"{self.checkpoint.where} holds {CALLED[part]}, and by its name it should hold {CALLED[expected]}: "
                "give each file under its own name."
            )
        return self.checkpoint


def _by_model(found: Sequence[Found]) -> dict[str, _Part]:
    """Model -> the files that it is made from. A file that was given itself outranks what a folder has."""
    chosen: dict[str, _Part] = {}
    for one in found:
        for files in one.weights:
            part = _Part(files, itself=not one.path.is_dir())
            holds = files.part or part.open().part  # what is named for its part is opened when it is needed
            which = _MODEL_OF_FILE[holds]
            other = chosen.get(which)
            if other is not None and other.itself == part.itself:
                raise ExportError(
                    f"{files.files[0]} and {other.files.files[0]} both hold {CALLED[holds]}: give the one that is "
                    "meant as a --checkpoint of its own."
                )
            if other is None or part.itself:
                chosen[which] = part
    return chosen


def _head_blocks(model: str, wan: WanConfig) -> int:
    """Blocks of the flow head: those of a known model, else one in six, as Wan 1.3B's."""
    return HEAD_BLOCKS.get(model, max(1, wan.num_layers // 6))


def _tokenizer(found: Sequence[Found]) -> Path | None:
    """A tokenizer given by itself, else the first that a folder has."""
    given = sorted((one for one in found if one.tokenizer is not None), key=lambda one: one.path.is_dir())
    return given[0].tokenizer if given else None
